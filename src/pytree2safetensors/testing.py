"""Hypothesis strategies for keys, leaves and trees, and a check that a tree stores and loads."""

import math
import struct
import tempfile
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

try:
    from hypothesis import strategies as st
    from hypothesis.extra.numpy import array_shapes
    from hypothesis.strategies import SearchStrategy
except ImportError:
    raise ImportError(
        "pytree2safetensors.testing needs Hypothesis; install pytree2safetensors[testing]"
    ) from None

from pytree2safetensors._compare import VALUE_BITS, assert_same, assert_same_leaves, is_prng_key
from pytree2safetensors._errors import TreeStructureError, WeightsMismatchError, shorten
from pytree2safetensors._leaves.spec import holds
from pytree2safetensors._load.api import load_pytree
from pytree2safetensors._load.template_api import load_into_pytree
from pytree2safetensors._save.api import save_pytree
from pytree2safetensors._tree.containers import PyTreeContainer, UnkeyedContainer
from pytree2safetensors._tree.flatten import pytree2dict
from pytree2safetensors._tree.keypath import (
    MAX_INDEX,
    DictKey,
    FlattenedIndexKey,
    GetAttrKey,
    Key,
    KeyPath,
    SequenceKey,
    item_key,
    read_segment,
    spell_key,
)
from pytree2safetensors._tree.literal import MAX_DIGITS
from pytree2safetensors._tree.unflatten import MAX_GAPS

__all__ = ["arrays", "assert_round_trips", "keypaths", "keys", "leaves", "pytrees"]

Draw = Callable[..., Any]  # Hypothesis's own type of it cannot be checked at run time

# --- keys and key paths -----------------------------------------------------------------------


@cache
def _texts() -> SearchStrategy[str]:
    """Names of attributes and keys of dicts: any text at all.

    Left out: lone surrogates, which no file can hold.
    """
    special = st.integers(0, len(_SPECIAL) - 1).map(lambda index: _SPECIAL[index])
    return _words("abcxyz01_", 1, 4) | _words("a.@#\\()0", 0, 6) | special | st.text()


def _words(alphabet: str, least: int, most: int) -> SearchStrategy[str]:
    """Short texts, each from one number: a tree has many, and Hypothesis takes its time by draws."""
    lengths, base = most - least + 1, len(alphabet)

    def spell(number: int) -> str:
        number, length = divmod(number, lengths)
        return "".join(alphabet[number // base**i % base] for i in range(least + length))

    return st.integers(0, lengths * base**most - 1).map(spell)


# Names that mean something elsewhere, and long ones.
_SPECIAL: Final = (
    "", "__metadata__", "__class__", "__reduce_ex__", "tree_flatten", "items", "\0", "(3)", "\\(3)",
    "é" * 300, "." * 300, "x" * 5000,
)  # fmt: skip


@cache
def _literals() -> SearchStrategy[Any]:
    """Dict keys that are no str.

    Left out: tuples in tuples in tuples, which are as those in tuples.
    """
    atoms = st.none() | _numbers() | st.binary(max_size=12)
    flat = st.lists(atoms | _texts(), max_size=3).map(tuple)
    return atoms | flat | st.lists(atoms | _texts() | flat, max_size=3).map(tuple)


@cache
def _numbers() -> SearchStrategy[Any]:
    finite = st.floats(allow_nan=False, allow_infinity=False)
    return st.booleans() | st.integers() | finite | st.sampled_from((-0.0, 5e-324)) | _limits()


# Around the limits of 64 bits, and of what Python prints.
_LIMITS: Final = (
    2**63 - 1, 2**63, 2**63 + 1, 1 - 2**63, -(2**63), -(2**63) - 1, 2**64, -(2**64), 2**127,
    10**100, 10**MAX_DIGITS - 1, 1 - 10**MAX_DIGITS,
)  # fmt: skip


def _limits() -> SearchStrategy[int]:
    # By index: a strategy prints what it samples from, and these are long.
    return st.integers(0, len(_LIMITS) - 1).map(lambda index: _LIMITS[index])


@cache
def keys() -> SearchStrategy[Key]:
    """Generate single keys of every kind that has a spelling.

    The names are any text without lone surrogates; the keys of dicts are text, `None`, bools, ints
    of up to 4,300 digits, finite floats, bytes, and tuples of these.
    """
    indices = st.integers(0, 9) | st.integers(0, MAX_INDEX)
    return st.one_of(
        st.builds(GetAttrKey, _texts()),
        st.builds(DictKey, _texts()),
        st.builds(SequenceKey, indices),
        st.builds(item_key, _literals()),
        st.builds(FlattenedIndexKey, indices),
    )


def keypaths(
    keys: SearchStrategy[Key] = keys(),  # noqa: B008 - strategies have no state
    *,
    min_size: int = 0,
    max_size: int = 8,
) -> SearchStrategy[KeyPath]:
    """Generate key paths.

    Args:
        keys: What generates the keys.
        min_size: The length of the shortest path.
        max_size: The length of the longest. That is short by default, as each key is spelled
            by itself, but for the first.
    """
    return st.lists(keys, min_size=min_size, max_size=max_size).map(tuple)


# --- leaves -----------------------------------------------------------------------------------

# Left out, as no file holds them: longdoubles, half-precision complex numbers, and whatever is
# no number.
_NAMES: Final = (
    "float32", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float64", "complex64", "complex128", "bfloat16", "float8_e3m4", "float8_e4m3",
    "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    "float8_e8m0fnu", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "int1", "int2", "int4",
    "uint1", "uint2", "uint4",
)  # fmt: skip


def _known(name: str) -> bool:
    try:
        np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:  # this version of ml_dtypes does not have it
        return False
    return True


# Every dtype that a file can hold, and that is known here.
_DTYPES: Final = tuple(np.dtype(getattr(ml_dtypes, name, name)) for name in _NAMES if _known(name))
# Bytes from which signs, exponents and mantissas take their extremes: NaNs with and without
# payloads, infinities, subnormals, zeros of both signs, the largest and smallest integers.
_EDGES: Final = bytes([0x00, 0x01, 0x7F, 0x80, 0xFF, 0x7C, 0xF0, 0xC0] * 32)


def _values(dtype: np.dtype[Any], count: int, raw: bytes, edges: bool) -> NDArray[Any]:
    """Repeat the bytes over so many elements, which own their memory."""
    if edges:
        raw = raw.translate(_EDGES)
    filled = np.resize(np.frombuffer(raw, np.uint8), count * dtype.itemsize)
    if dtype.name in VALUE_BITS:
        filled &= np.uint8(VALUE_BITS[dtype.name])
    return filled.view(dtype)


def _unaligned(values: NDArray[Any]) -> NDArray[Any]:
    return np.frombuffer(b"\0" + values.tobytes(), values.dtype, offset=1).reshape(values.shape)


def _big_endian(values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype.isbuiltin != 1:  # ml_dtypes has native types alone
        return values
    return values.view(values.dtype.newbyteorder(">"))


def _read_only(values: NDArray[Any]) -> NDArray[Any]:
    values.flags.writeable = False
    return values


def _reversed(values: NDArray[Any]) -> NDArray[Any]:
    return values[::-1] if values.ndim else values


def _strided(values: NDArray[Any]) -> NDArray[Any]:
    return np.repeat(values, 2, axis=-1)[..., ::2] if values.ndim else values


def _repeated(values: NDArray[Any]) -> NDArray[Any]:
    return np.broadcast_to(values, (2, *values.shape))


def _scalar(values: NDArray[Any]) -> Any:
    return values[()]


def _jax_array(values: NDArray[Any]) -> Any:
    return jax.device_put(values) if holds(values.dtype) else values


_LAYOUTS: Final[tuple[Callable[[NDArray[Any]], Any], ...]] = (
    _jax_array,
    np.asarray,
    _jax_array,  # twice, as they are most of what is saved
    np.asfortranarray,
    np.transpose,
    _reversed,
    _strided,
    _repeated,
    _read_only,
    _unaligned,
    _big_endian,
    _scalar,
)


def _shape(number: int) -> tuple[int, ...]:
    """The shape of up to four axes of up to four elements that has this number."""
    number, axes = divmod(number, 5)
    return tuple(number // 5**axis % 5 for axis in range(axes))


# From one number, as names are. Left out: sizes and numbers of axes that would only take longer.
_SHAPES: Final = st.integers(0, 5**5 - 1).map(_shape)


@st.composite
def arrays(
    draw: Draw,
    dtypes: SearchStrategy[Any] | None = None,
    *,
    shapes: SearchStrategy[tuple[int, ...]] = _SHAPES,
) -> Any:
    """Generate arrays of every dtype from raw bytes, as `jax.Array`s and as NumPy arrays.

    NumPy's are in C and Fortran order, transposed, reversed, strided, broadcast (with one axis
    more), read-only, unaligned, big-endian, and scalars. JAX's are on the default device, and
    appear for the dtypes that JAX holds: without `jax_enable_x64` none is of 64 bits.

    Args:
        draw: Supplied by Hypothesis.
        dtypes: What generates NumPy dtypes, or what `numpy.dtype` takes; every dtype by default.
        shapes: What generates shapes; small ones by default, 0-d and zero-size included.
    """
    dtype = np.dtype(draw(st.sampled_from(_DTYPES) if dtypes is None else dtypes))
    shape = draw(shapes)
    # More bytes than these say no more about the array; they repeat.
    count = math.prod(shape)
    size = max(1, min(32, count * dtype.itemsize))
    raw = draw(st.binary(min_size=size, max_size=size))
    values = _values(dtype, count, raw, draw(st.booleans())).reshape(shape)
    return draw(st.sampled_from(_LAYOUTS))(values)


@st.composite
def _weak_arrays(draw: Draw) -> Any:
    """Generate weakly typed 0-d JAX arrays, as counters and hyperparameters are."""
    scalar = draw(st.sampled_from([0, 0.0, 0j, False]))
    if scalar is False:  # only comparisons are weak bools
        return jax.lax.eq(jnp.asarray(draw(st.integers(0, 1))), jnp.asarray(1))
    weak = jnp.asarray(scalar)
    size = weak.dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    values = _values(np.dtype(weak.dtype), 1, raw, draw(st.booleans())).reshape(())
    return jax.lax.full_like(weak, jax.device_put(values))


_PRNGS: Final = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}  # the words of one key
# Left out: the implementations that a program registers itself.


@st.composite
def _prng_keys(draw: Draw) -> Any:
    """Generate typed PRNG key arrays of every implementation."""
    impl = draw(st.sampled_from(list(_PRNGS)))
    shape = draw(array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=2))
    raw = draw(st.binary(min_size=16, max_size=16))
    shape = (*shape, _PRNGS[impl])
    data = _values(np.dtype(np.uint32), math.prod(shape), raw, edges=False).reshape(shape)
    return jax.random.wrap_key_data(jnp.asarray(data), impl=impl)


@cache
def _floats() -> SearchStrategy[float]:
    raw = st.binary(min_size=8, max_size=8)
    return (
        st.floats()
        | st.sampled_from((-0.0, math.nan, -math.nan, math.inf))
        | raw.map(lambda bits: float(struct.unpack("<d", bits)[0]))
    )


def leaves(
    arrays: SearchStrategy[Any] = arrays(),  # noqa: B008 - strategies have no state
) -> SearchStrategy[Any]:
    """Generate everything that a file can hold as a leaf.

    Arrays; Python ints beyond 64 bits too, floats (NaNs with payloads, -0.0), bools, complex
    numbers and strs; typed PRNG key arrays; weakly typed 0-d JAX arrays.

    Args:
        arrays: What generates the arrays.
    """
    # Left out: ints that Python does not print, and strs with lone surrogates, which have no UTF-8.
    return st.one_of(
        arrays,
        st.integers() | _limits(),
        _floats(),
        st.booleans(),
        st.builds(complex, _floats(), _floats()),
        st.text(),
        _weak_arrays(),
        _prng_keys(),
        arrays,  # again, as most leaves are
    )


# --- trees ------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A namedtuple."""

    first: Any
    second: Any


class Nothing(NamedTuple):
    """A namedtuple without fields."""


@dataclass(frozen=True)
class Record:
    """A dataclass, with a field that is part of the structure."""

    weight: Any
    bias: Any
    name: str = "record"


class Keyed:
    """A node registered with keys, of any kinds at once, here by their spellings."""

    def __init__(self, children: Mapping[str, Any]) -> None:
        self.children: dict[str, Any] = dict(children)

    def __repr__(self) -> str:
        return f"Keyed({self.children!r})"


class Unkeyed:
    """A node registered without keys."""

    def __init__(self, children: Iterable[Any]) -> None:
        self.children: list[Any] = list(children)

    def __repr__(self) -> str:
        return f"Unkeyed({self.children!r})"


def _flatten_keyed(node: Keyed) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    pairs = [(read_segment(segment), child) for segment, child in node.children.items()]
    return pairs, tuple(node.children)


jax.tree_util.register_dataclass(Record, data_fields=["weight", "bias"], meta_fields=["name"])
jax.tree_util.register_pytree_with_keys(
    Keyed, _flatten_keyed, lambda names, children: Keyed(dict(zip(names, children, strict=True)))
)
jax.tree_util.register_pytree_node(
    Unkeyed, lambda node: (node.children, None), lambda _, children: Unkeyed(children)
)

# The nodes that come back from a file as they were, without a template.
SELF_DESCRIBING: Final[tuple[type, ...]] = (
    dict, list, tuple, type(None), OrderedDict, PyTreeContainer, UnkeyedContainer,
)  # fmt: skip
# Every kind of node. Left out: nodes that give two children one key, which cannot be saved.
NODES: Final[tuple[type, ...]] = (
    *SELF_DESCRIBING, defaultdict, Pair, Nothing, Record, Keyed, Unkeyed,
)  # fmt: skip


def pytrees(
    leaves: SearchStrategy[Any] = leaves(),  # noqa: B008 - strategies have no state
    *,
    nodes: Collection[type] = NODES,
    min_size: int = 0,
    max_depth: int = 4,
) -> SearchStrategy[Any]:
    """Generate trees of every kind of node that JAX users meet.

    These are dicts with keys of every kind, `OrderedDict`s, `defaultdict`s, lists, tuples, `None`,
    namedtuples, a registered dataclass, classes registered with keys and without, and the two
    containers; empty ones; nested in each other; and leaves alone.

    Args:
        leaves: What generates the leaves.
        nodes: The types of the nodes, some of `NODES`. Those of `SELF_DESCRIBING` come back from
            a file without a template.
        min_size: The fewest children of a node. From 1 on, there are no `None`s.
        max_depth: How many nodes are in each other at most; few by default, so that failures are
            readable.
    """
    unknown = set(nodes) - set(NODES)
    if unknown:
        raise ValueError(f"nodes are some of NODES, and these are not: {unknown}")
    unfit = _CHILDLESS if min_size else ()
    kinds = tuple(kind for kind in NODES if kind in nodes and kind not in unfit)
    return _trees(leaves, kinds, min_size, max_depth)


@st.composite
def _trees(draw: Draw, leaves: SearchStrategy[Any], kinds: Any, min_size: int, depth: int) -> Any:
    if not depth:
        return draw(leaves)
    choices = _choices(leaves, kinds, min_size, depth)
    return draw(choices[draw(st.integers(0, len(choices) - 1))])


@lru_cache(maxsize=256)
def _choices(
    leaves: SearchStrategy[Any], kinds: Any, min_size: int, depth: int
) -> list[SearchStrategy[Any]]:
    """What a tree can be: in one of four cases a leaf, to which it shrinks."""
    # Kept, as what a strategy finds out about its parts takes longer than drawing from it.
    children = _trees(leaves, kinds, min_size, depth - 1)
    nodes = [_BUILDERS[kind](children, min_size) for kind in kinds]
    return [leaves] * (len(nodes) // 3 + 1) + nodes


_CHILDLESS: Final = (type(None), Nothing)
_Children = SearchStrategy[Any]
_MOST = 4  # children of one node: a tree of few leaves has no more at its every level


def _dicts(children: _Children, least: int) -> SearchStrategy[dict[Any, Any]]:
    # JAX sorts the keys of one dict, so they are of kinds that compare.
    sortable: Sequence[SearchStrategy[Any]] = (
        _texts(),
        st.integers(),  # which alone are far more frequent than with the floats and bools below
        _numbers(),
        st.binary(max_size=8),
        st.tuples(st.integers(), _texts()),
    )
    alone = st.dictionaries(_literals(), children, min_size=least, max_size=1)
    return st.one_of(
        *(st.dictionaries(kind, children, min_size=least, max_size=_MOST) for kind in sortable),
        alone,
    )


def _ordered_dicts(children: _Children, least: int) -> SearchStrategy[Any]:
    # JAX leaves the order of these as it is, so keys of any kinds stand together.
    pairs = st.dictionaries(_texts() | _literals(), children, min_size=least, max_size=_MOST)
    return pairs.map(OrderedDict).filter(_flattens)


def _default_dicts(children: _Children, least: int) -> SearchStrategy[Any]:
    factories = st.sampled_from([None, list, int])
    return st.builds(defaultdict, factories, _dicts(children, least)).filter(_flattens)


def _flattens(tree: dict[Any, Any]) -> bool:
    """Whether JAX flattens such a dict: from 0.4.36 to 0.6 it does not where a key is None."""
    return None not in tree or _makes_none_keys()


@cache
def _makes_none_keys() -> bool:
    try:
        DictKey(None)
    except TypeError:
        return False
    return True


def _lists(children: _Children, least: int) -> SearchStrategy[list[Any]]:
    return st.lists(children, min_size=least, max_size=_MOST)


def _tuples(children: _Children, least: int) -> SearchStrategy[Any]:
    return _lists(children, least).map(tuple)


def _containers(children: _Children, least: int) -> SearchStrategy[Any]:
    attrs = st.dictionaries(_texts(), children, min_size=least, max_size=_MOST)
    return st.builds(PyTreeContainer, attrs)


def _keyed(children: _Children, least: int) -> SearchStrategy[Any]:
    return st.builds(
        Keyed, st.dictionaries(keys().map(spell_key), children, min_size=least, max_size=_MOST)
    )


def makes_no_long_list(key: Key) -> bool:
    """Whether a list up to this index is short, or too long to be made at all."""
    return not isinstance(key, SequenceKey) or not 100 < key.idx <= MAX_GAPS


_BUILDERS: Final[Mapping[type, Callable[[_Children, int], SearchStrategy[Any]]]] = {
    dict: _dicts,
    OrderedDict: _ordered_dicts,
    defaultdict: _default_dicts,
    list: _lists,
    tuple: _tuples,
    PyTreeContainer: _containers,
    UnkeyedContainer: lambda children, least: st.builds(UnkeyedContainer, _lists(children, least)),
    type(None): lambda _, __: st.none(),
    Nothing: lambda _, __: st.just(Nothing()),
    Pair: lambda children, _: st.builds(Pair, children, children),
    Record: lambda children, _: st.builds(Record, children, children),
    Keyed: _keyed,
    Unkeyed: lambda children, least: st.builds(Unkeyed, _lists(children, least)),
}


# --- round trips ------------------------------------------------------------------------------


def assert_round_trips(tree: Any) -> None:
    """Assert that a tree comes back from a file, into a template and without one.

    The tree is saved to a temporary file. Loaded into a template that holds other values, it is
    what it was: structure, types, dtypes, shapes and bits. Loaded without one, so is a tree of
    dicts, lists, tuples, `None`s and containers; of any other tree, every leaf is under its key
    path, unless nodes of its own mix kinds of keys: such a tree has no form without a template.

    Args:
        tree: Any pytree that can be saved.

    Raises:
        AssertionError: What came back differs; the message names the key path.
        Pytree2SafetensorsError: The tree cannot be saved; the message says why.

    Specification: *Laws*.

    >>> assert_round_trips({"layers": [1.5, None, (True, "text")]})
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # Without 64 bits JAX holds no such arrays, and NumPy arrays come back: as good, here.
        warnings.filterwarnings("ignore", message="JAX cannot hold the dtypes")
        path = Path(folder) / "tree.safetensors"
        save_pytree(tree, path, durable=False)
        template = jax.tree_util.tree_map(_blank, tree)
        try:
            into_template = load_into_pytree(template, path)
        except WeightsMismatchError as error:
            raise AssertionError(_not_rebuilt(error)) from None
        assert_same(tree, into_template, "into a template", same_kinds=True)
        if _is_self_describing(tree):
            assert_same(tree, load_pytree(path), "without a template")
            return
        try:
            loaded = load_pytree(path)
        except TreeStructureError:
            return  # a node mixes kinds of keys
        assert_same_leaves(pytree2dict(tree), pytree2dict(loaded), "without a template")


def _not_rebuilt(error: WeightsMismatchError) -> str:
    """Say what differs between a tree and one that JAX rebuilt from leaves like its own."""
    lines = [
        *(f"{shorten(name)} is gone" for name in error.unexpected),
        *(f"{shorten(name)} is new" for name in error.missing),
        *error.mismatched,
    ]
    more = [f"... and {len(lines) - 20} more"] if len(lines) > 20 else []
    return "\n".join(["the tree that its nodes unflatten to is another:", *lines[:20], *more])


def _blank(leaf: Any) -> Any:
    """A leaf of the same kind, whose values say nothing."""
    if isinstance(leaf, np.ndarray | np.generic):
        blank = np.zeros(leaf.shape, leaf.dtype)
        return blank if isinstance(leaf, np.ndarray) else blank[()]
    if not isinstance(leaf, jax.Array):
        return type(leaf)()
    if is_prng_key(leaf):
        data = np.zeros(jax.random.key_data(leaf).shape, np.uint32)
        return jax.random.wrap_key_data(jax.device_put(data), impl=jax.random.key_impl(leaf))
    if leaf.weak_type:
        return jnp.zeros_like(leaf)
    return jax.device_put(np.zeros(leaf.shape, leaf.dtype))


def _is_self_describing(tree: Any) -> bool:
    pending: list[Any] = [jax.tree_util.tree_structure(tree)]
    while pending:
        treedef = pending.pop()
        data = treedef.node_data()  # None for a leaf
        if data is not None and data[0] not in SELF_DESCRIBING:
            return False
        pending.extend(treedef.children())
    return True
