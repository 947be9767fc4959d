"""The two containers are pytree nodes, and attributes never change how they behave."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from oracle import assert_same
from pytree2safetensors import (
    PyTreeContainer,
    UnkeyedContainer,
    dict2pytree,
    pytree2dict,
    set_weights,
)
from pytree2safetensors.testing import pytrees

# Names that have a meaning for Python, JAX or this class.
NAMES = [
    "", "a", "a.b", "é", " ", "_attrs", "__attrs__", "attrs", "children", "shape", "dtype", "items", "keys", "get",
    "__class__", "__dict__", "__slots__", "__module__", "__doc__", "__init__", "__new__", "__reduce__",
    "__reduce_ex__", "__getattribute__", "__getattr__", "__setattr__", "__delattr__", "__getstate__",
    "__setstate__", "__copy__", "__deepcopy__", "__repr__", "__str__", "__hash__", "__eq__", "__bool__", "__len__",
    "__iter__", "__array__", "__jax_array__", "__weakref__", "tree_flatten", "tree_unflatten",
    "tree_flatten_with_keys", "mro", "_fields", "__treescope_repr__", "__metadata__", "____", "__", "__a",
    "__private", "public__",
]  # fmt: skip


@pytest.fixture
def container() -> PyTreeContainer:
    return PyTreeContainer({"weight": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)})


# --- attributes -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_attribute_may_have_any_name(name: str) -> None:
    container = PyTreeContainer({name: 1, "other": 2})
    assert container[name] == 1
    assert name in container
    assert type(container) is PyTreeContainer
    container[name] = 3
    assert pytree2dict(container)[min(pytree2dict(container), key=len)] in {2, 3}
    assert sorted(jax.tree_util.tree_leaves(container)) == [2, 3]
    doubled = jax.tree_util.tree_map(lambda leaf: 2 * leaf, container)
    assert doubled[name] == 6
    for same in (
        copy.copy(container),
        copy.deepcopy(container),
        pickle.loads(pickle.dumps(container)),
        dict2pytree(pytree2dict(container)),
    ):
        assert_same(same, container)
    assert repr(name) in repr(container) or f"{name}=" in repr(container)
    del container[name]
    assert name not in container
    with pytest.raises(KeyError):
        container[name]


def is_dunder(name: str) -> bool:
    return len(name) > 4 and name.startswith("__") and name.endswith("__")


@pytest.mark.parametrize("name", [name for name in NAMES if not is_dunder(name)])
def test_dots_serve_names_that_are_no_dunders(name: str) -> None:
    container = PyTreeContainer()
    with pytest.raises(AttributeError, match=f"PyTreeContainer has no attribute {name!r}"):
        getattr(container, name)
    with pytest.raises(AttributeError, match=f"PyTreeContainer has no attribute {name!r}"):
        delattr(container, name)
    setattr(container, name, 1)
    assert getattr(container, name) == container[name] == 1
    assert name in dir(container)
    delattr(container, name)
    assert not hasattr(container, name)


@pytest.mark.parametrize("name", [name for name in NAMES if is_dunder(name)])
def test_dots_leave_dunders_to_python(name: str) -> None:
    plain, container = PyTreeContainer(), PyTreeContainer({name: 1})
    assert hasattr(container, name) == hasattr(plain, name)
    if name not in {"__dict__", "__getattr__"} and hasattr(plain, name):
        assert getattr(container, name) is not 1  # noqa: F632 - the very object
    with pytest.raises(AttributeError, match="with container"):
        setattr(container, name, 2)
    with pytest.raises(AttributeError, match=f"PyTreeContainer has no attribute {name!r}"):
        delattr(container, name)
    assert container[name] == 1


def test_attributes_are_copied_and_then_the_containers_own() -> None:
    attrs = {"a": 1}
    container = PyTreeContainer(attrs)
    container.b = 2
    attrs["c"] = 3
    assert attrs == {"a": 1, "c": 3}
    assert [*container] == ["a", "b"]
    other = copy.copy(container)
    other.a = 5
    assert container.a == 1


@pytest.mark.parametrize("name", NAMES)
def test_vars_are_a_copy_of_the_attributes(name: str) -> None:
    container = PyTreeContainer({name: 1, "other": 2})
    found = vars(container)
    assert type(found) is dict
    assert found == {name: 1, "other": 2}
    found[name] = 3
    found["new"] = 4
    assert vars(container) == {name: 1, "other": 2}
    with pytest.raises(AttributeError):
        container.__dict__ = {}  # type: ignore[misc] # what is tested
    with pytest.raises(AttributeError):
        object.__setattr__(container, "__dict__", {})
    assert len({*dir(container)}) == len(dir(container))


class Layer(NamedTuple):
    weight: Any
    bias: Any


def test_vars_make_a_node_of_another_type(container: PyTreeContainer) -> None:
    layer = Layer(**vars(container))
    assert layer.weight is container.weight
    assert layer.bias is container.bias


def test_a_container_is_no_mapping() -> None:
    for name in ("keys", "w"):
        with pytest.raises((TypeError, ValueError)):
            dict(PyTreeContainer({name: 1}))


def test_a_name_is_a_str() -> None:
    container = PyTreeContainer()
    with pytest.raises(
        TypeError, match=r"(an attribute name must be a str, not int|(parameter|argument) 'name')"
    ):
        container[1] = 1  # type: ignore[index] # what is tested
    with pytest.raises(TypeError):
        PyTreeContainer({"a": 1, 2: 3})  # type: ignore[dict-item] # what is tested
    assert 1 not in container


def test_a_container_equals_only_itself() -> None:
    assert PyTreeContainer() != PyTreeContainer()
    assert len({PyTreeContainer(), PyTreeContainer()}) == 2


# --- as pytree nodes --------------------------------------------------------------------------


@given(st.dictionaries(st.text(), st.integers(), max_size=6), st.randoms(use_true_random=False))
@example({"b": 1, "a": 2}, None)
def test_the_treedef_does_not_depend_on_the_order(attrs: dict[str, int], random: Any) -> None:
    shuffled = list(reversed(attrs.items()))
    if random is not None:
        random.shuffle(shuffled)
    assert_same(PyTreeContainer(dict(shuffled)), PyTreeContainer(attrs))
    container = PyTreeContainer()
    for name, value in shuffled:
        container[name] = value
    assert_same(container, PyTreeContainer(attrs))
    assert hash(jax.tree_util.tree_structure(container)) == hash(
        jax.tree_util.tree_structure(PyTreeContainer(attrs))
    )


def test_names_go_with_the_leaves_of_jax_in_any_order() -> None:
    container = PyTreeContainer({"b": 1, "a": 2})
    container.c, container.B = 3, 4
    flat = pytree2dict(container)
    assert [*flat.items()] == [("B", 4), ("a", 2), ("b", 1), ("c", 3)]
    assert [*flat.values()] == jax.tree_util.tree_leaves(container)
    assert pytree2dict(set_weights(container, flat)) == flat


def test_the_treedef_knows_no_dtypes(container: PyTreeContainer) -> None:
    narrow = jax.tree_util.tree_map(lambda leaf: leaf.astype(jnp.bfloat16), container)
    treedef: Any = jax.tree_util.tree_structure(container)
    assert jax.tree_util.tree_structure(narrow) == treedef
    assert narrow.weight.dtype == jnp.bfloat16


def test_jit_traces_containers_of_the_same_names_once(container: PyTreeContainer) -> None:
    traces = []

    @jax.jit
    def double(tree: Any) -> Any:
        traces.append(tree)
        return PyTreeContainer({"weight": tree.weight * 2, "bias": tree.bias * 2})

    found = double(container)
    again = double(PyTreeContainer({"bias": container.bias, "weight": container.weight}))
    assert_same(found, jax.tree_util.tree_map(lambda leaf: leaf * 2, container))
    assert_same(again, found)
    assert len(traces) == 1
    assert "PyTreeContainer" in repr(traces[0])


def test_grad_returns_a_container(container: PyTreeContainer) -> None:
    found = jax.grad(lambda tree: (tree.weight * 3).sum() + tree.bias.sum())(container)
    assert_same(found, PyTreeContainer({"weight": jnp.full((2, 3), 3.0), "bias": jnp.ones(3)}))


def test_vmap_takes_a_container_of_axes(container: PyTreeContainer) -> None:
    axes = PyTreeContainer({"weight": 0, "bias": None})
    found = jax.vmap(lambda tree: tree.weight + tree.bias, in_axes=(axes,))(container)
    assert_same(found, container.weight + container.bias)


def test_eval_shape_and_scan(container: PyTreeContainer) -> None:
    shapes = jax.eval_shape(lambda tree: tree, container)
    assert shapes.weight.shape == (2, 3)
    carry, _ = jax.lax.scan(
        lambda tree, _: (jax.tree_util.tree_map(lambda leaf: leaf + 1, tree), None),
        container,
        None,
        length=3,
    )
    assert_same(carry, jax.tree_util.tree_map(lambda leaf: leaf + 3, container))


def test_leaves_of_any_kind() -> None:
    tree = PyTreeContainer({"a": None, "b": [], "c": UnkeyedContainer([object, None])})
    assert jax.tree_util.tree_leaves(tree) == [object]
    marked = jax.tree_util.tree_map(lambda _: None, tree)  # as JAX itself does
    assert marked.c[0] is None


def test_an_unkeyed_container_is_a_sequence_and_a_node() -> None:
    container = UnkeyedContainer(iter([1, [2, 3]]))
    assert (len(container), container[0], [*container]) == (2, 1, [1, [2, 3]])
    assert container.children == (1, [2, 3])
    assert pytree2dict(container) == {"#\\(0)": 1, "#\\(1)#0": 2, "#\\(1)#1": 3}
    doubled = jax.jit(lambda tree: jax.tree_util.tree_map(lambda leaf: 2 * leaf, tree))(container)
    assert type(doubled) is UnkeyedContainer
    assert [int(leaf) for leaf in jax.tree_util.tree_leaves(doubled)] == [2, 4, 6]
    assert UnkeyedContainer().children == ()


def by_pickle(protocol: int) -> Callable[[Any], Any]:
    return lambda tree: pickle.loads(pickle.dumps(tree, protocol))


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {protocol}": by_pickle(protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES.keys())
@given(tree=pytrees(st.integers(), nodes=(PyTreeContainer, UnkeyedContainer, list)))
def test_copies_and_pickles_are_the_same(make: Callable[[Any], Any], tree: Any) -> None:
    assert_same(make(tree), tree)


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES.keys())
def test_copies_are_other_containers(
    make: Callable[[Any], Any], container: PyTreeContainer
) -> None:
    found = make(container)
    assert_same(found, container)
    assert found is not container


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES.keys())
def test_a_copy_of_what_holds_itself_holds_itself(make: Callable[[Any], Any]) -> None:
    children: list[Any] = []
    container = UnkeyedContainer([children])
    children.append(container)
    made = make(container)
    assert made[0][0] is (container if make is copy.copy else made)


def test_the_signatures_are_those_of_the_constructors() -> None:
    assert [*inspect.signature(PyTreeContainer).parameters] == ["attrs"]
    assert [*inspect.signature(UnkeyedContainer).parameters] == ["children"]


def test_a_deep_copy_shares_nothing() -> None:
    container = PyTreeContainer({"a": [1], "b": np.zeros(2)})
    other = copy.deepcopy(container)
    other.a.append(2)
    other.b[0] = 1
    assert container.a == [1]
    assert container.b[0] == 0


# --- printing ---------------------------------------------------------------------------------


def test_prints_shapes_and_not_values(container: PyTreeContainer) -> None:
    assert repr(container) == "PyTreeContainer(bias=float32[3], weight=float32[2,3])"
    assert repr(UnkeyedContainer([container.bias, 1.5])) == "UnkeyedContainer([float32[3], 1.5])"
    assert str(PyTreeContainer()) == "PyTreeContainer()"
    assert repr(PyTreeContainer({"a b": "text", "": None})) == (
        "PyTreeContainer('': None, 'a b': 'text')"
    )


def test_prints_a_large_tree_on_lines_of_its_own(container: PyTreeContainer) -> None:
    shown = repr(PyTreeContainer({"layers": [container, container], "step": 3}))
    assert shown.splitlines() == [
        "PyTreeContainer(",
        "  layers=[",
        "    PyTreeContainer(bias=float32[3], weight=float32[2,3]),",
        "    PyTreeContainer(bias=float32[3], weight=float32[2,3]),",
        "  ],",
        "  step=3,",
        ")",
    ]


def test_prints_what_is_deep_or_cyclic() -> None:
    deep: Any = PyTreeContainer()
    for _ in range(5000):
        deep = PyTreeContainer({"a": deep})
    assert repr(deep).startswith("PyTreeContainer(")
    cycle = PyTreeContainer()
    cycle.me = [cycle]
    assert "PyTreeContainer(" in repr(cycle)


def test_the_classes_report_the_package() -> None:
    assert repr(PyTreeContainer) == "<class 'pytree2safetensors.PyTreeContainer'>"
    assert repr(UnkeyedContainer) == "<class 'pytree2safetensors.UnkeyedContainer'>"


def test_jax_prints_the_type_and_the_names(container: PyTreeContainer) -> None:
    assert "PyTreeContainer" in str(jax.tree_util.tree_structure(container))
    pairs, _ = jax.tree_util.tree_flatten_with_path(container)
    assert [jax.tree_util.keystr(path) for path, _ in pairs] == [".bias", ".weight"]


def test_a_container_that_holds_itself_is_copied() -> None:
    cycle = PyTreeContainer({"a": 1})
    cycle.me = [cycle]
    for found in (copy.deepcopy(cycle), pickle.loads(pickle.dumps(cycle))):
        assert found is not cycle
        assert found.me[0] is found
        assert found.a == 1


@pytest.mark.parametrize("base", [PyTreeContainer, UnkeyedContainer])
def test_there_are_no_subclasses(base: type) -> None:
    # Its instances would be leaves to JAX.
    with pytest.raises(TypeError, match="register your own pytree node"):
        type("Mine", (base,), {})


def test_only_names_with_underscores_at_both_ends_are_pythons() -> None:
    container = PyTreeContainer({"x__": 1, "__y": 2, "____": 3})
    assert [getattr(container, name) for name in ("x__", "__y", "____")] == [1, 2, 3]
    container.x__ = 4
    del container.x__
    assert "x__" not in container
