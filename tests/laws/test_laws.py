"""The laws, one property each."""

import importlib
import io
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
from hypothesis import assume, event, example, given
from hypothesis import strategies as st
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from oracle import assert_same, canonical, from_bits, identity, jax_holds
from pytree2safetensors import (
    KeyPath,
    KeyPathError,
    PyTreeContainer,
    TreeStructureError,
    UnkeyedContainer,
    UnsupportedLeafError,
    dict2pytree,
    keypath2string,
    load_file,
    load_into_pytree,
    load_pytree,
    pytree2dict,
    save_pytree,
    set_weights,
    string2keypath,
)
from pytree2safetensors._tree.keys import Key
from pytree2safetensors._tree.unflatten import MAX_GAPS
from pytree2safetensors.testing import SELF_DESCRIBING, arrays, keypaths, keys, leaves, pytrees
from pytree2safetensors.testing._nodes import Keyed
from versions import unmapped

wide_dtypes_may_be_numpy = pytest.mark.filterwarnings("ignore:JAX does not support the dtypes")


def makes_no_long_list(key: Key) -> bool:
    """Whether a list up to this index is short, or too long to be made at all."""
    return not isinstance(key, SequenceKey) or not 100 < key.idx <= MAX_GAPS


@pytest.fixture(scope="module", params=[False, True], ids=["x32", "x64"])
def x64(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = jax.config.jax_enable_x64  # type: ignore[attr-defined] # JAX declares no options
    jax.config.update("jax_enable_x64", request.param)  # type: ignore[no-untyped-call] # nor types
    yield request.param
    jax.config.update("jax_enable_x64", before)  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("laws") / "tree.safetensors"


def load_quietly(path: Path) -> tuple[Any, int]:
    """The tree, and how many warnings came with it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return load_pytree(path), len(caught)


# --- 1 and 2: key paths and strings -----------------------------------------------------------


@given(keypaths())
@example((GetAttrKey(""),))
@example((GetAttrKey(""), GetAttrKey("")))
@example((GetAttrKey("__metadata__"),))
@example((GetAttrKey("__metadata__"), DictKey("")))
@example((DictKey("__metadata__"),))
@example((DictKey("a.b"),))
@example((DictKey("a@b"), DictKey("#0")))
@example((DictKey("\\"), DictKey("\\("), DictKey("(3)")))
@example((DictKey(-3), DictKey(3), DictKey("3"), DictKey(True), DictKey(1.0)))
@example((DictKey(-0.0), DictKey(0.0), DictKey(0)))
@example((DictKey((0, ("x",), b"\xff", None)),))
@example((SequenceKey(3), FlattenedIndexKey(3)))
def test_law_1_reading_inverts_spelling(path: KeyPath) -> None:
    found = string2keypath(keypath2string(path))
    assert found == path
    assert [*map(typed, found)] == [*map(typed, path)]


def typed(key: Any) -> tuple[Any, ...]:
    """All that distinguishes keys; 1, 1.0 and True are equal."""
    return type(key), repr(key)


@st.composite
def strings(draw: Any) -> str:
    """Spellings, spellings with something wrong, and others."""
    if draw(st.booleans()):
        return str(draw(st.text(st.sampled_from("a0.@#\\()',1 -")) | st.text()))
    string: str = keypath2string(draw(keypaths(max_size=3)))
    if draw(st.booleans()):
        return string
    start = draw(st.integers(0, len(string)))
    stop = draw(st.integers(start, min(len(string), start + 2)))
    middle: str = draw(st.sampled_from(["", ".", "\\", "(", ")", "#", "0"]))
    return string[:start] + middle + string[stop:]


@given(strings())
@example("")
@example(".")
@example("a.")
@example("@\\(-3)")
@example("@\\(- 3)")
@example("@\\((1, 2))")
def test_law_2_spelling_inverts_reading(string: str) -> None:
    try:
        path = string2keypath(string)
    except KeyPathError:
        event("rejected")
        return
    event("accepted")
    assert keypath2string(path) == string


def attempt(function: Any) -> Any:
    """Return the result of a function, or None if it raises a documented error."""
    try:
        return function()
    except (KeyPathError, TreeStructureError):
        return None


# --- 3 and 4: flat dicts and trees ------------------------------------------------------------

objects = st.builds(object)  # JAX treats them as leaves, and each equals only itself


@st.composite
def dictionaries(draw: Any) -> dict[str, Any]:
    """Flat dicts of trees, half of them with something wrong, in any order."""
    found = pytree2dict(draw(pytrees(objects)))
    if draw(st.booleans()):
        paths = keypaths(keys().filter(makes_no_long_list), max_size=3)
        names = [*found, *draw(st.lists(paths.map(keypath2string), max_size=2))]
        other = draw(st.sampled_from(["", "@a", ".", "#0", "#1", "#\\(0)", "#\\(1)", "@\\(1)"]))
        prefix = draw(st.sampled_from([*names, ""]))
        found[prefix + other] = object()
    return dict(draw(st.permutations([*found.items()])))


@given(dictionaries())
@example({})
@example({"": 1})
@example({"#1": 1})
@example({"@": 1, "@a\\.b": 2})
@example({"@\\(-1)": 1, "@\\(2)": 2})
@example({".": 1, ".@a": 2})
@example({".": 1, ".__metadata__": 2})
@example({"x": 1, "\n\n.x": 2})
def test_law_3_flattening_inverts_building(dictionary: dict[str, Any]) -> None:
    tree = attempt(lambda: [dict2pytree(dictionary)])
    event("accepted" if tree is not None else "rejected")
    if tree is not None:
        found = pytree2dict(tree[0])
        assert found.keys() == dictionary.keys()
        assert all(found[name] is leaf for name, leaf in dictionary.items())


@given(pytrees(objects, nodes=(dict, list, PyTreeContainer, UnkeyedContainer), min_size=1))
@example({"": {"": 1}})
@example({"a.b": 1, "a": {"b": 2}})
@example({-1: 1, 0: 2})
@example({3: 1})
@example([{"a": [[1], 2]}])
@example(PyTreeContainer({"": 1}))
@example(PyTreeContainer({"__class__": PyTreeContainer({"tree_flatten": 1})}))
@example(PyTreeContainer({"\t": 1, "\n\n": PyTreeContainer({"\t": 2})}))
def test_law_4_building_inverts_flattening(tree: Any) -> None:
    found = dict2pytree(pytree2dict(tree))
    treedef: Any = jax.tree_util.tree_structure(tree)
    assert jax.tree_util.tree_structure(found) == treedef
    pairs = zip(jax.tree_util.tree_leaves(found), jax.tree_util.tree_leaves(tree), strict=True)
    assert all(leaf is other for leaf, other in pairs)


# --- 5: without a template --------------------------------------------------------------------


@given(tree=pytrees(nodes=SELF_DESCRIBING))
@example(tree={})
@example(tree=None)
@example(tree=())
@example(tree=[{}, [], (), None, OrderedDict(), PyTreeContainer(), UnkeyedContainer([])])
@example(tree=[None, None, 1, None])
@example(tree=OrderedDict([("b", 1), ("a", 2), (3, None)]))
@example(tree=float("nan"))
@example(tree=-0.0)
@example(tree=2**63)
@example(tree=-(2**63))
@example(tree=-(2**63) - 1)
@example(tree={"a": "", "b": "é\0"})
@example(tree=[jnp.asarray(1), jnp.asarray(1.5), jnp.asarray(1j)])
@example(tree=[from_bits(0x7F800001, "float32"), from_bits(0xFFF0000000000001, "float64")])
@example(tree=np.arange(6.0, dtype=">f8").reshape(2, 3).T)
@example(tree=np.broadcast_to(np.float32(2), (3, 0, 2)))
@example(tree=jax.random.split(jax.random.key(0, impl="rbg"), (2, 0)))
@example(tree={"__metadata__": np.zeros(1)})
@example(tree=PyTreeContainer({"__metadata__": np.zeros(1)}))
def test_law_5_loading_inverts_saving(x64: bool, path: Path, tree: Any) -> None:
    save_pytree(tree, path, durable=False)
    found, count = load_quietly(path)
    assert_same(found, canonical(tree))
    foreign = [leaf for leaf in jax.tree_util.tree_leaves(tree) if not can_be_jax(leaf)]
    assert count == bool(foreign)
    del found


def can_be_jax(leaf: Any) -> bool:
    return not isinstance(leaf, np.ndarray | np.generic) or jax_holds(leaf.dtype)


@wide_dtypes_may_be_numpy
@given(tree=pytrees(nodes=SELF_DESCRIBING))
def test_law_5_holds_for_file_objects_maps_and_checksums(path: Path, tree: Any) -> None:
    buffer = io.BytesIO()
    save_pytree(tree, buffer, checksum=True)
    path = unmapped(path)
    path.write_bytes(buffer.getvalue())
    buffer.seek(0)
    assert_same(load_pytree(buffer), canonical(tree))
    assert_same(load_pytree(path, mmap=True), canonical(tree))


# --- 6: into a template -----------------------------------------------------------------------

struct: Any = jax.ShapeDtypeStruct


@st.composite
def loads(draw: Any) -> tuple[Any, Any, Any]:
    """A tree, a template of it, and what loading into that gives."""
    tree = draw(pytrees())
    flat, treedef = jax.tree_util.tree_flatten(tree)
    slots = [draw(template_leaves(leaf)) for leaf in flat]
    template = jax.tree_util.tree_unflatten(treedef, [slot for slot, _ in slots])
    return tree, template, jax.tree_util.tree_unflatten(treedef, [leaf for _, leaf in slots])


@st.composite
def template_leaves(draw: Any, leaf: Any) -> tuple[Any, Any]:
    """A template leaf that fits a leaf, and the leaf that it gets."""
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # type: ignore[attr-defined] # public, and not exported
        data = np.zeros(jax.random.key_data(leaf).shape, np.uint32)
        blank = jax.random.wrap_key_data(jax.device_put(data), impl=jax.random.key_impl(leaf))
        return draw(st.sampled_from([blank, struct(leaf.shape, leaf.dtype)])), leaf
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return draw(st.sampled_from([type(leaf)(), leaf])), leaf
    plain = canonical(leaf)
    zeros = np.zeros(leaf.shape, leaf.dtype)
    kinds = [(struct(leaf.shape, plain.dtype), plain), (zeros, np.array(leaf, plain.dtype))]
    if not leaf.shape:
        kinds.append((zeros[()], np.array(leaf, plain.dtype)[()]))
    if isinstance(plain, jax.Array):
        kinds.append((jax.device_put(np.zeros(leaf.shape, plain.dtype)), plain))
    template, expected = draw(st.sampled_from(kinds))
    if isinstance(expected, np.ndarray | np.generic):
        expected = np.array(np.asarray(plain)).reshape(leaf.shape)
        expected = expected[()] if isinstance(template, np.generic) else expected
    return template, expected


@wide_dtypes_may_be_numpy
@given(case=loads())
@example(case=({"step": 3}, {"step": 0}, {"step": 3}))
def test_law_6_loading_into_a_template_inverts_saving(x64: bool, path: Path, case: Any) -> None:
    tree, template, expected = case
    save_pytree(tree, path, durable=False)
    assert_same(load_into_pytree(template, path), expected)


@given(case=loads())
def test_law_6_holds_for_set_weights(case: Any) -> None:
    tree, template, expected = case
    assert_same(set_weights(template, pytree2dict(tree)), expected)


# --- 7: safetensors itself --------------------------------------------------------------------

# The dtypes that every supported safetensors.flax loads, and that JAX holds without x64.
LOADABLE = (
    "float32", "bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "bfloat16",
)  # fmt: skip
loadable_arrays = arrays(st.sampled_from([from_bits(0, name).dtype for name in LOADABLE]))


@given(tree=pytrees(loadable_arrays))
def test_law_7_safetensors_reads_the_flat_dict(path: Path, tree: Any) -> None:
    assert load_file is safetensors.flax.load_file
    save_pytree(tree, path, durable=False)
    found = load_file(path)
    expected = canonical(pytree2dict(tree))
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        assert identity(leaf)[1:3] == identity(expected[name])[1:3]
        assert identity(leaf)[4] == identity(expected[name])[4]


contiguous_arrays = loadable_arrays.map(canonical)


def blank(tree: Any) -> Any:
    """The same tree of arrays, of zeros."""
    return jax.tree_util.tree_map(
        lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype)), tree
    )


@given(tree=pytrees(contiguous_arrays))
def test_law_7_what_safetensors_wrote_loads(path: Path, tree: Any) -> None:
    dictionary = pytree2dict(tree)
    expected = attempt(lambda: dict2pytree(dictionary))
    assume(expected is not None)
    safetensors.flax.save_file(dict(dictionary), path)
    assert_same(load_pytree(path), expected)
    assert_same(load_into_pytree(blank(tree), path), tree)


@given(st.dictionaries(st.text().filter(lambda name: name != "__metadata__"), contiguous_arrays))
@example({"a\\": jnp.ones(1), "#": jnp.ones(2), ".a": jnp.ones(3)})
def test_law_7_any_names_load_into_a_template(path: Path, dictionary: dict[str, Any]) -> None:
    safetensors.flax.save_file(dict(dictionary), path)
    template = blank(list(dictionary.values()))
    names = {f"#{index}": name for index, name in enumerate(dictionary)}
    found = load_into_pytree(template, path, rename=names)
    assert_same(found, list(dictionary.values()))


# --- 8: saving --------------------------------------------------------------------------------


@wide_dtypes_may_be_numpy
@given(tree=pytrees(nodes=SELF_DESCRIBING), data=st.data())
def test_law_8_saving_is_deterministic(path: Path, tree: Any, data: st.DataObject) -> None:
    first, second, third = io.BytesIO(), io.BytesIO(), io.BytesIO()
    save_pytree(tree, first, metadata={"a": "1", "b": "2"})
    save_pytree(reordered(tree), second, metadata={"b": "2", "a": "1"})
    assert second.getvalue() == first.getvalue()
    first.seek(0)
    again = load_pytree(first)
    save_pytree(again, third, metadata={"a": "1", "b": "2"})
    assert third.getvalue() == first.getvalue()
    save_pytree(tree, path, durable=False, metadata={"a": "1", "b": "2"})
    assert path.read_bytes() == first.getvalue()


def reordered(tree: Any) -> Any:
    """The same tree, with dict keys and attributes in another order."""
    if isinstance(tree, dict) and not isinstance(tree, OrderedDict):
        return {key: reordered(tree[key]) for key in reversed(tree)}
    if isinstance(tree, PyTreeContainer):
        return PyTreeContainer({name: reordered(tree[name]) for name in reversed([*tree])})
    if type(tree) in {list, tuple}:
        return type(tree)(map(reordered, tree))
    return tree


@given(tree=pytrees(), leaf=st.sampled_from([len, object(), b"a", np.array("a"), np.array([{}])]))
def test_law_8_a_failed_save_changes_nothing(path: Path, tree: Any, leaf: Any) -> None:
    path.write_bytes(b"what was there before")
    with pytest.raises(UnsupportedLeafError):
        save_pytree([tree, leaf], path)
    assert path.read_bytes() == b"what was there before"
    assert [*path.parent.iterdir()] == [path]


@given(tree=pytrees())
def test_saving_changes_no_argument(path: Path, tree: Any) -> None:
    before = [identity(leaf) for leaf in jax.tree_util.tree_leaves(tree)]
    treedef: Any = jax.tree_util.tree_structure(tree)
    metadata = {"a": "b"}
    save_pytree(tree, path, durable=False, metadata=metadata)
    assert metadata == {"a": "b"}
    assert jax.tree_util.tree_structure(tree) == treedef
    assert [identity(leaf) for leaf in jax.tree_util.tree_leaves(tree)] == before


@given(leaf=leaves())
def test_a_single_leaf_is_a_tree(path: Path, leaf: Any) -> None:
    save_pytree(leaf, path, durable=False)
    found, _ = load_quietly(path)
    assert_same(found, canonical(leaf))


def test_an_array_in_a_layout_of_its_own_is_saved_row_by_row(path: Path) -> None:
    if jax.__version_info__ < (0, 7):
        pytest.skip("this JAX spells layouts otherwise")
    layouts: Any = importlib.import_module("jax.experimental.layout")
    rows = jnp.arange(6.0).reshape(2, 3)
    columns = jax.device_put(rows, layouts.Format(layouts.Layout((1, 0)), rows.sharding))
    save_pytree([rows, columns, jnp.int8(1)], path)
    assert_same(load_pytree(path), [rows, rows, jnp.int8(1)])


def test_a_node_that_mixes_kinds_loads_into_a_template(path: Path) -> None:
    tree = Keyed({".a": 1, "@a": 2, "#3": 3, "#\\(0)": 4})
    save_pytree(tree, path)
    assert load_into_pytree(Keyed({".a": 0, "@a": 0, "#3": 0, "#\\(0)": 0}), path).children == {
        ".a": 1,
        "@a": 2,
        "#3": 3,
        "#\\(0)": 4,
    }
    with pytest.raises(TreeStructureError):
        load_pytree(path)


def test_a_node_with_a_gap_between_children_without_keys_loads_into_a_template(path: Path) -> None:
    save_pytree(Keyed({"#\\(1)": 1, "#\\(3)": 3}), path)
    loaded = load_into_pytree(Keyed({"#\\(1)": 0, "#\\(3)": 0}), path)
    assert loaded.children == {"#\\(1)": 1, "#\\(3)": 3}
    with pytest.raises(TreeStructureError, match="lacks 2 of its 4 children"):
        load_pytree(path)
