"""The strategies generate what they promise, shrink well, and print briefly."""

import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from oracle import identity, jax_holds
from pytree2safetensors import (
    PyTreeContainer,
    UnkeyedContainer,
    keypath2string,
    pytree2dict,
    string2keypath,
)
from pytree2safetensors._format.tensor import LEAF_KINDS, NOTED_DTYPES
from pytree2safetensors._leaves.describe import describe
from pytree2safetensors._tree.keys import item_key
from pytree2safetensors.testing import NODES, arrays, keypaths, keys, leaves, pytrees
from pytree2safetensors.testing._arrays import DTYPES
from pytree2safetensors.testing._nodes import Keyed, Nothing, Pair, Record, Unkeyed

quiet = settings(
    database=None, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)


def generated(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """What a strategy generates from a fixed seed."""
    found: list[Any] = []

    @settings(quiet, max_examples=count, phases=[Phase.generate])
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found


# The tests that use one of these are an xdist_group: one process generates for all of them.


@pytest.mark.parametrize("dtype", [">f4", ">i2", ">c8", "<f4", "float32", np.float16])
def test_arrays_have_dtypes_of_every_byte_order(dtype: Any) -> None:
    found = generated(arrays(st.just(dtype)), 100)
    assert {leaf.dtype.newbyteorder("=") for leaf in found} == {np.dtype(dtype).newbyteorder("=")}
    assert any(isinstance(leaf, jax.Array) for leaf in found)


@pytest.mark.parametrize("dtype", ["S3", np.longdouble, "M8[s]", object, "V4"])
def test_arrays_have_only_dtypes_of_files(dtype: Any) -> None:
    message = f"a file cannot hold the dtype {np.dtype(dtype)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        generated(arrays(st.just(dtype)), 1)


@pytest.fixture(scope="module")
def some_keys() -> list[Any]:
    return generated(keys(), 5000)


@pytest.fixture(scope="module")
def some_arrays() -> list[Any]:
    return generated(arrays(), 5000)


@pytest.fixture(scope="module")
def some_leaves() -> list[Any]:
    return generated(leaves(), 5000)


@pytest.fixture(scope="module")
def some_trees() -> list[Any]:
    return generated(pytrees(st.just(0)), 3000)


# --- what is reached --------------------------------------------------------------------------


def has_marker(marker: str) -> Callable[[Any], bool]:
    return lambda key: marker in text_of(key)


KEYS: dict[str, Callable[[Any], bool]] = {
    "attribute": lambda key: type(key) is GetAttrKey,
    "index": lambda key: type(key) is SequenceKey and key.idx > 0,
    "the largest index": lambda key: type(key) is SequenceKey and key.idx > 2**30,
    "index without a key": lambda key: type(key) is FlattenedIndexKey,
    "the reserved name": lambda key: key == GetAttrKey("__metadata__"),
    "an empty name": lambda key: key == GetAttrKey(""),
    "None": lambda key: key == item_key(None),
    "bool": lambda key: type(value_of(key)) is bool,
    "int": lambda key: type(value_of(key)) is int and value_of(key) < 0,
    "an int of 4,300 digits": lambda key: value_of(key) == 10**4300 - 1,
    "float": lambda key: type(value_of(key)) is float and value_of(key) != 0,
    "-0.0": lambda key: repr(value_of(key)) == "-0.0",
    "bytes": lambda key: type(value_of(key)) is bytes and len(value_of(key)) > 1,
    "a tuple in a tuple": lambda key: any(isinstance(item, tuple) for item in items_of(key)),
    "a text in a tuple": lambda key: any(isinstance(item, str) for item in items_of(key)),
    "a long text": lambda key: len(text_of(key)) > 4096,
    "not ASCII": lambda key: not text_of(key).isascii(),
    "beyond 16 bits": lambda key: max(text_of(key), default="") > "\uffff",
    "NUL": lambda key: "\0" in text_of(key),
    "a backslash at the end": lambda key: text_of(key).endswith("\\"),
    "like a literal": lambda key: text_of(key).startswith("\\("),
    **{f"marker {marker}": has_marker(marker) for marker in ".@#\\"},
}


def value_of(key: Any) -> Any:
    return key.key if type(key) is DictKey else "no dict key"


def items_of(key: Any) -> tuple[Any, ...]:
    return value_of(key) if type(value_of(key)) is tuple else ()


def text_of(key: Any) -> str:
    return value_of(key) if type(value_of(key)) is str else ""


@pytest.mark.xdist_group("keys")
@pytest.mark.parametrize("condition", KEYS.values(), ids=KEYS.keys())
def test_keys_reach(some_keys: list[Any], condition: Callable[[Any], bool]) -> None:
    assert any(map(condition, some_keys))


@given(keypaths(min_size=1, max_size=3))
def test_key_paths_keep_to_their_sizes_and_can_be_spelled(path: Any) -> None:
    assert 1 <= len(path) <= 3
    keypath2string(path)


def storable_dtypes() -> dict[str, np.dtype[Any]]:
    """Every numeric dtype of NumPy and ml_dtypes, except those that a file cannot hold."""
    own = {np.dtype(code) for code in np.typecodes["All"]}
    others = {
        np.dtype(kind)
        for kind in vars(ml_dtypes).values()
        if isinstance(kind, type) and issubclass(kind, np.generic)
    }
    found = {dtype.name: dtype for dtype in own | others if dtype.kind not in "OSUVMmgG"}
    found |= {dtype.name: dtype for dtype in others}
    for name in ("float128", "complex256", "longdouble", "clongdouble", "complex32", "bcomplex32"):
        found.pop(name, None)
    return found


def test_the_dtypes_are_all_there_are() -> None:
    assert {dtype.name for dtype in DTYPES} == storable_dtypes().keys()
    assert len(DTYPES) == len({*DTYPES})


@pytest.mark.xdist_group("arrays")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_reach_every_dtype(some_arrays: list[Any], dtype: np.dtype[Any]) -> None:
    found = [leaf for leaf in some_arrays if leaf.dtype == dtype]
    assert any(isinstance(leaf, np.ndarray) for leaf in found)
    assert any(isinstance(leaf, jax.Array) for leaf in found) == jax_holds(dtype)


def all_bits(name: str) -> set[int]:
    dtype = np.dtype(getattr(ml_dtypes, name))
    width = 8 if name.startswith("float8") else int(name.partition("_")[0].lstrip("uintfloa"))
    return set(range(2 ** min(8 * dtype.itemsize, width)))


@pytest.mark.parametrize(
    "name", [dtype.name for dtype in DTYPES if dtype.itemsize == 1 and dtype.num > 255]
)
def test_arrays_reach_every_value_of_a_byte_and_no_other(name: str) -> None:
    strategy = arrays(st.just(getattr(ml_dtypes, name)), shapes=st.just((32,)))
    found = {value for leaf in generated(strategy, 500) for value in identity(np.asarray(leaf))[4]}
    assert found == all_bits(name)


FLOATS: dict[str, Callable[[Any], bool]] = {
    "a quiet NaN with a payload": lambda bits: bits & 0x7FC00000 == 0x7FC00000 and bits & 0x3FFFFF,
    "a signalling NaN": lambda bits: bits & 0x7FC00000 == 0x7F800000 and bits & 0x3FFFFF,
    "a negative NaN": lambda bits: bits > 0xFF800000,
    "-0.0": lambda bits: bits == 0x80000000,
    "a subnormal": lambda bits: 0 < bits & 0x7FFFFFFF < 0x800000,
}


@pytest.mark.parametrize("condition", FLOATS.values(), ids=FLOATS.keys())
def test_arrays_reach_the_edges_of_floats(condition: Callable[[Any], bool]) -> None:
    found = generated(arrays(st.just("float32"), shapes=st.just((8,))), 100)
    words = [np.asarray(leaf).astype("<f4", copy=False).tobytes() for leaf in found]
    assert any(condition(int(word)) for word in np.frombuffer(b"".join(words), "<u4"))


LAYOUTS: dict[str, Callable[[Any], bool]] = {
    "0-d": lambda leaf: leaf.shape == (),
    "zero-size": lambda leaf: leaf.size == 0 and leaf.ndim > 1,
    "four axes": lambda leaf: leaf.ndim == 4 and leaf.size > 0,
    "Fortran": lambda leaf: leaf.flags.f_contiguous and not leaf.flags.c_contiguous,
    "transposed": lambda leaf: (
        leaf.ndim == 3 and leaf.strides[0] > leaf.strides[2] > leaf.strides[1] > 0
    ),
    "negative stride": lambda leaf: leaf.size > 1 and min(leaf.strides) < 0,
    "strided": lambda leaf: leaf.size > 1 and leaf.strides[-1] == 2 * leaf.itemsize,
    "broadcast": lambda leaf: leaf.size > 1 and 0 in leaf.strides,
    "read-only": lambda leaf: not leaf.flags.writeable and leaf.flags.c_contiguous,
    "writable": lambda leaf: leaf.flags.writeable,
    "unaligned": lambda leaf: not leaf.flags.aligned,
    "big-endian": lambda leaf: not leaf.dtype.isnative,
    "scalar": lambda leaf: isinstance(leaf, np.generic),
}


@pytest.mark.xdist_group("arrays")
@pytest.mark.parametrize("condition", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_arrays_reach_every_layout(
    some_arrays: list[Any], condition: Callable[[Any], bool]
) -> None:
    found = [leaf for leaf in some_arrays if isinstance(leaf, np.ndarray | np.generic)]
    assert any(map(condition, found))


@pytest.mark.xdist_group("arrays")
@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (3,), (2, 3), (3, 0), (0, 2), (2, 1, 3), (2, 3, 4, 5)], ids=str
)
def test_arrays_have_the_shape_and_dtype_that_were_drawn(shape: tuple[int, ...]) -> None:
    for leaf in generated(arrays(st.just("float32"), shapes=st.just(shape)), 200):
        assert leaf.shape == shape
        assert leaf.dtype.newbyteorder("=") == np.float32


@given(st.data())
def test_arrays_of_any_shape_have_it(data: st.DataObject) -> None:
    shape = data.draw(array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=3))
    dtype = data.draw(st.sampled_from(DTYPES))
    leaf = data.draw(arrays(st.just(dtype), shapes=st.just(shape)))
    assert (leaf.shape, leaf.dtype.newbyteorder("=")) == (shape, dtype)


@pytest.mark.parametrize(
    "layout", sorted(LAYOUTS.keys() - {"0-d", "zero-size", "four axes", "scalar"})
)
def test_one_shape_has_every_layout(layout: str) -> None:
    found = generated(arrays(st.just("float32"), shapes=st.just((2, 3, 4))), 300)
    assert any(LAYOUTS[layout](leaf) for leaf in found if isinstance(leaf, np.ndarray))


@given(arrays())
def test_arrays_of_64_bits_are_numpys(leaf: Any) -> None:
    if not jax_holds(leaf.dtype):
        assert isinstance(leaf, np.ndarray | np.generic)


def is_key_of(impl: str, shape: tuple[int, ...]) -> Callable[[Any], bool]:
    dtype = jax.random.key(0, impl=impl).dtype
    return lambda leaf: is_key(leaf) and leaf.shape == shape and leaf.dtype == dtype


LEAVES: dict[str, Callable[[Any], bool]] = {
    "int": lambda leaf: type(leaf) is int and leaf < 0,
    "int beyond 64 bits": lambda leaf: type(leaf) is int and abs(leaf) > 2**64,
    "2**63": lambda leaf: type(leaf) is int and leaf == 2**63,
    "-(2**63)": lambda leaf: type(leaf) is int and leaf == -(2**63),
    "float": lambda leaf: type(leaf) is float and leaf > 0,
    "NaN": lambda leaf: type(leaf) is float and leaf != leaf,
    "-0.0": lambda leaf: type(leaf) is float and repr(leaf) == "-0.0",
    "bool": lambda leaf: leaf is True,
    "complex": lambda leaf: type(leaf) is complex and leaf.imag > 0,
    "str": lambda leaf: type(leaf) is str and len(leaf) > 3,
    "weak int": lambda leaf: is_weak(leaf) and leaf.dtype == np.int32,
    "weak float": lambda leaf: is_weak(leaf) and leaf.dtype == np.float32,
    "weak complex": lambda leaf: is_weak(leaf) and leaf.dtype == np.complex64,
    "weak NaN": lambda leaf: is_weak(leaf) and leaf.dtype == np.float32 and bool(leaf != leaf),
    "array": lambda leaf: isinstance(leaf, np.ndarray),
    "jax.Array": lambda leaf: isinstance(leaf, jax.Array) and leaf.ndim > 1 and not is_key(leaf),
    **{
        f"{impl} {shape}": is_key_of(impl, shape)
        for impl in ("threefry2x32", "rbg", "unsafe_rbg")
        for shape in ((), (2,), (0,), (1, 2))
    },
}


def is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and identity(leaf)[0] == "key"


def is_weak(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not is_key(leaf) and bool(leaf.weak_type)


@pytest.mark.xdist_group("leaves")
@pytest.mark.parametrize("condition", LEAVES.values(), ids=LEAVES.keys())
def test_leaves_reach(some_leaves: list[Any], condition: Callable[[Any], bool]) -> None:
    assert any(map(condition, some_leaves))


@pytest.mark.xdist_group("leaves")
def test_leaves_reach_every_kind_in_the_note(some_leaves: list[Any]) -> None:
    infos = [info for info in describe(some_leaves) if info is not None]
    kinds = {info.kind[0] if isinstance(info.kind, list) else info.kind for info in infos}
    unknown = {*NOTED_DTYPES} - {dtype.name for dtype in DTYPES}  # of newer versions of ml_dtypes
    # Without 64-bit types, JAX has no arrays of complex128.
    assert kinds - {None} == LEAF_KINDS - unknown - {"weak complex128"}


def nodes_of(tree: Any) -> list[Any]:
    """A tree and all that is in it."""
    found, pending = [], [tree]
    while pending:
        node = pending.pop()
        found.append(node)
        if not jax.tree_util.all_leaves([node]):
            pending += children_of(node)
    return found


def children_of(node: Any) -> list[Any]:
    def is_child(part: Any) -> bool:
        return part is not node

    return jax.tree_util.tree_leaves(node, is_leaf=is_child)


def has(kind: type, condition: Callable[[Any], bool] = bool) -> Callable[[Any], bool]:
    return lambda tree: any(type(node) is kind and condition(node) for node in nodes_of(tree))


def within(kind: type, other: type) -> Callable[[Any], bool]:
    """Whether a tree has a node of one kind directly below one of another."""
    return has(kind, lambda node: any(type(child) is other for child in children_of(node)))


TREES: dict[str, Callable[[Any], bool]] = {
    "a leaf alone": lambda tree: tree == 0,
    "None alone": lambda tree: tree is None,
    "dict": has(dict),
    "dict, empty": has(dict, lambda node: not node),
    "dict with ints": has(dict, lambda node: len(node) > 1 and {*map(type, node)} == {int}),
    "dict with bytes": has(dict, lambda node: len(node) > 1 and {*map(type, node)} == {bytes}),
    "dict with tuples": has(dict, lambda node: len(node) > 1 and {*map(type, node)} == {tuple}),
    "dict with None": has(dict, lambda node: None in node),
    "dict with ints and floats": has(dict, lambda node: {int, float} <= {*map(type, node)}),
    "OrderedDict": has(OrderedDict),
    "OrderedDict, empty": has(OrderedDict, lambda node: not node),
    "OrderedDict, unsorted": has(
        OrderedDict,
        lambda node: {*map(type, node)} == {str} and [*node] != sorted(node),
    ),
    "OrderedDict, unsortable": has(OrderedDict, lambda node: {str, int} <= {*map(type, node)}),
    "defaultdict": has(defaultdict),
    "list": has(list),
    "list, empty": has(list, lambda node: not node),
    "tuple": has(tuple),
    "tuple, empty": has(tuple, lambda node: not node),
    "namedtuple": has(Pair),
    "namedtuple, empty": has(Nothing, lambda _: True),
    "dataclass": has(Record, lambda _: True),
    "class with keys": has(Keyed, lambda node: bool(node.children)),
    "class with keys of two kinds": has(
        Keyed, lambda node: {*"@."} <= {segment[0] for segment in node.children}
    ),
    "class without keys": has(Unkeyed, lambda node: bool(node.children)),
    "PyTreeContainer": has(PyTreeContainer, lambda node: bool([*node])),
    "PyTreeContainer, empty": has(PyTreeContainer, lambda node: not [*node]),
    "UnkeyedContainer": has(UnkeyedContainer, lambda node: len(node) > 0),
    "UnkeyedContainer, empty": has(UnkeyedContainer, lambda node: len(node) == 0),
    "a list in a list": within(list, list),
    "a tuple in a dict": within(dict, tuple),
    "a container in a dataclass": within(Record, PyTreeContainer),
    "a node without keys in one with them": within(Keyed, Unkeyed),
    "deep": lambda tree: any(path.count("#") > 3 for path in pytree2dict(tree)),
}


@pytest.mark.xdist_group("trees")
@pytest.mark.parametrize("condition", TREES.values(), ids=TREES.keys())
def test_pytrees_reach(some_trees: list[Any], condition: Callable[[Any], bool]) -> None:
    assert any(map(condition, some_trees))


@pytest.mark.parametrize("kind", NODES, ids=lambda kind: kind.__name__)
def test_pytrees_of_one_kind_of_node(kind: type) -> None:
    found = generated(pytrees(st.just(0), nodes=[kind]), 100)
    assert any(type(tree) is kind for tree in found)
    assert {type(node) for tree in found for node in nodes_of(tree)} == {kind, int}


@given(pytrees(st.just(0), nodes=(dict, list), min_size=1, max_depth=2))
def test_pytrees_keep_to_their_sizes(tree: Any) -> None:
    for name in pytree2dict(tree):
        assert len(string2keypath(name)) <= 2
    for node in nodes_of(tree):
        assert type(node) in {dict, list, int}
        assert type(node) is int or len(node) >= 1


@pytest.mark.parametrize("least", [1, 2, 3, 5])
def test_nodes_have_at_least_as_many_children_as_asked_for(least: int) -> None:
    found = generated(pytrees(st.just(0), min_size=least, max_depth=1), 300)
    nodes = [tree for tree in found if type(tree) is not int]
    assert min(len(jax.tree_util.tree_leaves(node)) for node in nodes) >= least
    too_small = {type(None), Nothing} | ({Pair, Record} if least > 2 else set())
    assert {type(node) for node in nodes} == set(NODES) - too_small


STRATEGY = "must be a Hypothesis strategy, such as"
REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: arrays(np.float32),  # type: ignore[arg-type] # what is tested, as below
        TypeError,
        f"arrays: dtypes {STRATEGY} hypothesis.strategies.just('float32'), not type",
    ),
    (
        lambda: arrays(shapes=(2, 3)),  # type: ignore[arg-type]
        TypeError,
        f"arrays: shapes {STRATEGY} hypothesis.strategies.just((2, 3)), not tuple",
    ),
    (
        lambda: leaves(arrays),  # type: ignore[arg-type]
        TypeError,
        f"leaves: arrays {STRATEGY} arrays(), not function",
    ),
    (
        lambda: pytrees(3),  # type: ignore[arg-type]
        TypeError,
        f"pytrees: leaves {STRATEGY} leaves(), not int",
    ),
    (
        lambda: keypaths("a"),  # type: ignore[arg-type]
        TypeError,
        f"keypaths: keys {STRATEGY} keys(), not 'a'",
    ),
    (
        lambda: pytrees(nodes=dict),  # type: ignore[arg-type]
        TypeError,
        "pytrees: nodes must be a collection of types, such as [dict, list], not type",
    ),
    (
        lambda: pytrees(nodes=[dict, set]),
        ValueError,
        "pytrees: nodes must be some of NODES, and these are not: [<class 'set'>]",
    ),
    (lambda: pytrees(max_depth=-1), ValueError, "pytrees: max_depth must be 0 or more, not -1"),
    (lambda: pytrees(min_size=-1), ValueError, "pytrees: min_size must be 0 or more, not -1"),
    (
        lambda: pytrees(max_depth=1.5),  # type: ignore[arg-type]
        TypeError,
        "pytrees: max_depth must be an int, not float",
    ),
    (lambda: pytrees(max_depth=True), TypeError, "pytrees: max_depth must be an int, not bool"),
    (lambda: keypaths(min_size=-1), ValueError, "keypaths: min_size must be 0 or more, not -1"),
    (
        lambda: keypaths(max_size=None),  # type: ignore[arg-type]
        TypeError,
        "keypaths: max_size must be an int, not NoneType",
    ),
    (
        lambda: keypaths(min_size=9),
        ValueError,
        "keypaths: max_size must be min_size=9 or more, not 8",
    ),
    (
        lambda: generated(arrays(shapes=st.just(3)), 1),  # type: ignore[arg-type]
        TypeError,
        "arrays: shapes must generate tuples of ints, not int",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=range(len(REFUSED)))
def test_wrong_arguments_are_refused_at_once(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'depth'"):
        pytrees(depth=3)  # type: ignore[call-arg]
    with pytest.raises((TypeError, ValueError)):  # the runtime type checks come first
        pytrees(nodes=[{}])  # type: ignore[list-item]


def test_the_smallest_arguments_are_taken() -> None:
    assert generated(pytrees(st.just(0), nodes=[], min_size=0), 5) == [0]
    assert generated(pytrees(st.just(0), max_depth=0), 5) == [0]
    assert generated(keypaths(min_size=0, max_size=0), 5) == [()]


@given(pytrees())
def test_every_tree_has_key_paths(tree: Any) -> None:
    assert len(pytree2dict(tree)) == len(jax.tree_util.tree_leaves(tree))


# --- shrinking and printing -------------------------------------------------------------------

# What is found, and how many characters it may print. Releases of Hypothesis shrink differently well.
SHRUNK: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], bool], int]] = {
    "a key": (keys(), lambda key: True, 20),
    "a path": (keypaths(), lambda path: True, 2),
    "two keys": (keypaths(), lambda path: len(path) >= 2, 60),
    "a marker": (keys(), lambda key: "#" in text_of(key), 20),
    "an array": (arrays(), lambda leaf: True, 40),
    "bfloat16": (arrays(), lambda leaf: leaf.dtype == ml_dtypes.bfloat16, 40),
    "an axis": (arrays(), lambda leaf: leaf.ndim > 0 and leaf.size > 0, 40),
    "a leaf": (leaves(), lambda leaf: True, 40),
    "a str": (leaves(), lambda leaf: type(leaf) is str and leaf != "", 3),
    "a key array": (leaves(), is_key, 60),
    "a tree": (pytrees(), lambda tree: True, 40),
    "a list": (pytrees(st.just(0)), lambda tree: type(tree) is list and tree != [], 5),
    "a tuple in a list": (pytrees(st.just(0)), within(list, tuple), 30),
}


@pytest.mark.parametrize(("strategy", "condition", "length"), SHRUNK.values(), ids=SHRUNK.keys())
def test_shrinks_well(
    strategy: st.SearchStrategy[Any], condition: Callable[[Any], bool], length: int
) -> None:
    found = find(strategy, condition, settings=settings(quiet, max_examples=5000))
    assert len(repr(found)) <= length


@pytest.mark.parametrize(
    "strategy", [keys(), keypaths(), arrays(), leaves(), pytrees()], ids=lambda value: ""
)
def test_prints_briefly(strategy: st.SearchStrategy[Any]) -> None:
    lengths = sorted(len(repr(value)) for value in generated(strategy, 200))
    # Of half of them. Before 6.170.1, Hypothesis draws larger trees.
    assert lengths[100] < (200 if hypothesis.__version_info__ >= (6, 170, 1) else 500)
    assert len(repr(strategy)) < 3000


def test_trees_of_own_nodes_print_as_they_are_built() -> None:
    assert repr(Keyed({"@a": 1})) == "Keyed({'@a': 1})"
    assert repr(Unkeyed([1])) == "Unkeyed([1])"
    assert repr(Pair(1, 2)) == "Pair(first=1, second=2)"
    assert repr(Record(1, 2)) == "Record(weight=1, bias=2, name='record')"
