"""Leaves and tensors: what a file holds of a leaf, and the leaf that a tensor was.

No module but this one and `_values` knows a dtype.
"""

import math
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple

import jax
import ml_dtypes
import numpy as np

from pytree2safetensors._errors import FileFormatError, UnsupportedLeafError, shorten
from pytree2safetensors._trie import Kind

_Struct: Any = jax.ShapeDtypeStruct  # whose constructor JAX leaves untyped
is_subdtype: Any = jax.dtypes.issubdtype  # type: ignore[attr-defined] # public, and not exported

# --- tables -----------------------------------------------------------------------------------

# The bits of one element of every dtype that the format knows.
BITS: Final = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

# NumPy's names of the dtypes that the format spells.
_NATIVE: Final = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "float16": "F16",
    "bfloat16": "BF16", "uint32": "U32", "int32": "I32", "float32": "F32", "complex64": "C64",
    "uint64": "U64", "int64": "I64", "float64": "F64", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
NUMPY: Final = {spelled: name for name, spelled in _NATIVE.items()}

# The dtypes that it does not spell: noted by their names, stored one value a byte as this dtype.
_NOTED: Final = {
    "int1": "I8", "int2": "I8", "int4": "I8", "uint1": "U8", "uint2": "U8", "uint4": "U8",
    "float4_e2m1fn": "U8", "float6_e2m3fn": "U8", "float6_e3m2fn": "U8", "float8_e3m4": "U8",
    "float8_e4m3": "U8", "float8_e4m3b11fnuz": "U8",
}  # fmt: skip
WIDTHS: Final = {  # in bits, of those that do not fill their byte
    "int1": 1, "int2": 2, "int4": 4, "uint1": 1, "uint2": 2, "uint4": 4, "float4_e2m1fn": 4,
    "float6_e2m3fn": 6, "float6_e3m2fn": 6,
}  # fmt: skip

SCALARS: Final = {"int": "I64", "float": "F64", "bool": "BOOL", "complex": "F64"}
_PRNG: Final = ("threefry2x32", "rbg", "unsafe_rbg")  # what every JAX version registers

COMPLEX128: Final = ("complex128", "weak complex128")  # an axis of 2 for the parts
WEAK: Final = ("weak", "weak complex128")
_WEAK_DTYPES: Final = frozenset({"BOOL", "I32", "I64", "F32", "F64", "C64"})  # JAX has no others
LEAF_KINDS: Final = frozenset({*SCALARS, *_NOTED, *COMPLEX128, *WEAK, "key", "str"})


# --- what a file holds of a leaf --------------------------------------------------------------


class Form(NamedTuple):
    """What a file holds of one leaf: a tensor (none where dtype is ""), and a note."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    kind: Kind | None = None


_SMALLEST, _LARGEST = -(2**63), 2**63 - 1
_INT: Final = Form("I64", (), 8, "int")


def describe(leaves: Iterable[Any]) -> list[Form | None]:
    """The form of each leaf; None where a file cannot hold it, or its values are gone."""
    describers: dict[type, Callable[[Any], Form | None]] = {**PYTHON_SCALARS}
    # By the identity of an aval, which many arrays share; kept, so that no other gets its identity.
    known: dict[int, tuple[Any, Form | None]] = {}

    def describe_array(leaf: jax.Array) -> Form | None:
        aval = leaf.aval
        found = known.get(id(aval))
        if found is None:
            found = known[id(aval)] = aval, _array_form(leaf)
        return None if leaf.is_deleted() else found[1]

    forms = []
    for leaf in leaves:
        kind = type(leaf)
        describer = describers.get(kind)
        if describer is None:
            describer = describers[kind] = _describer(kind, describe_array)
        forms.append(describer(leaf))
    return forms


def _describer(
    kind: type, describe_array: Callable[[Any], Form | None]
) -> Callable[[Any], Form | None]:
    if issubclass(kind, jax.core.Tracer | np.ma.MaskedArray):
        return lambda _: None
    if issubclass(kind, np.ndarray | np.generic):
        return lambda leaf: form_of(leaf.dtype, leaf.shape)
    return describe_array if issubclass(kind, jax.Array) else lambda _: None


class DeletedLeaf(UnsupportedLeafError, RuntimeError):  # JAX's own error of it is the latter
    """An array whose values are gone."""


def is_deleted(leaf: Any) -> bool:
    """Whether a leaf is an array whose values are gone."""
    traced = isinstance(leaf, jax.core.Tracer)
    return isinstance(leaf, jax.Array) and not traced and leaf.is_deleted()


# The type of references to arrays, where it has a public name: since JAX 0.8.
REFERENCE: Final[Any] = getattr(jax, "Ref", ())


def is_valueless(leaf: Any) -> bool:
    """Whether a leaf is an array that has no values of its own: traced, abstract, or a reference."""
    return isinstance(leaf, (jax.core.Tracer, jax.ShapeDtypeStruct, REFERENCE))


def _array_form(leaf: jax.Array) -> Form | None:
    aval = leaf.aval
    if is_key_dtype(aval.dtype):
        return _describe_key(leaf)
    form = form_of(aval.dtype, aval.shape)
    if aval.shape or not aval.weak_type or form is None or form.kind in _NOTED:
        return form
    return form._replace(kind="weak" if form.kind is None else "weak complex128")


def is_key_dtype(dtype: Any) -> bool:
    """Whether arrays of a dtype are typed PRNG keys."""
    return not isinstance(dtype, np.dtype) and bool(is_subdtype(dtype, jax.dtypes.prng_key))


def _describe_int(leaf: int) -> Form:
    if _SMALLEST <= leaf <= _LARGEST:
        return _INT
    return Form("", (), 0, ["int", hex(leaf)])


# JSON reads two such halves as the one character that they would be in UTF-16.
_HALVES: Final = re.compile("[\ud800-\udbff][\udc00-\udfff]")


def _describe_str(leaf: str) -> Form | None:
    if not leaf.isascii() and _HALVES.search(leaf):
        return None
    return Form("", (), 0, ["str", leaf])


def _always(form: Form) -> Callable[[Any], Form]:
    return lambda _: form


PYTHON_SCALARS: dict[type, Callable[[Any], Form | None]] = {
    int: _describe_int,
    float: _always(Form("F64", (), 8, "float")),
    bool: _always(Form("BOOL", (), 1, "bool")),
    complex: _always(Form("F64", (2,), 16, "complex")),
    str: _describe_str,
}


_LONG: Final = (np.longdouble, np.clongdouble)  # whatever their size


@lru_cache(maxsize=4096)
def form_of(dtype: np.dtype[Any], shape: tuple[int, ...]) -> Form | None:
    """The form of an array; None where a file cannot hold its dtype."""
    if dtype.type in _LONG:
        return None
    name, count = dtype.name, math.prod(shape)
    if name in _NATIVE:
        return Form(_NATIVE[name], shape, count * dtype.itemsize)
    if name in _NOTED:
        return Form(_NOTED[name], shape, count, name)
    if name == "complex128":
        return Form("F64", (*shape, 2), count * 16, name)
    return None


def _describe_key(leaf: jax.Array) -> Form | None:
    name = _implementation(leaf)
    if name is None:
        return None
    shape = (*leaf.shape, *_key_shape(name))
    return Form("U32", shape, math.prod(shape) * 4, ["key", name])


def _implementation(leaf: Any) -> str | None:
    """The registered name of a key's implementation."""
    found = jax.random.key_impl(leaf)
    if isinstance(found, str):
        return found
    # Older versions answer with an object, which only compares.
    same = (name for name in _PRNG if jax.random.key_impl(jax.random.key(0, impl=name)) == found)
    return next(same, None)


# --- the leaf that a tensor was ---------------------------------------------------------------


def check_kind(kind: Kind, dtype: str, shape: tuple[int, ...], name: str) -> None:
    """Refuse a note that contradicts its tensor."""
    word = kind[0] if isinstance(kind, list) else kind
    if word in SCALARS:
        fits = dtype == SCALARS[word] and shape == ((2,) if word == "complex" else ())
    elif word == "weak":
        fits = shape == () and dtype in _WEAK_DTYPES
    elif word in COMPLEX128:
        fits = dtype == "F64" and (shape == (2,) if word in WEAK else shape[-1:] == (2,))
    elif word == "key":
        fits = dtype == "U32"
    else:
        fits = dtype == _NOTED.get(word)
    if not fits:
        raise FileFormatError(
            f"{shorten(name)} is noted as {word} and stored as {dtype} of shape {list(shape)}, "
            "which contradict each other"
        )


@lru_cache(maxsize=256)
def _numpy_dtype(form_dtype: str, kind: str | None) -> np.dtype[Any] | str:
    """The NumPy dtype of the values of a tensor, or why there is none."""
    word = kind if kind in _NOTED else NUMPY.get(form_dtype)
    if kind in COMPLEX128:
        word = "complex128"
    if word is None:
        return (
            f"is of the packed dtype {form_dtype}, which has no NumPy dtype; "
            "unpack it with the program that wrote it"
        )
    try:
        return np.dtype(getattr(ml_dtypes, word, word))
    except TypeError:
        return f"is of the dtype {word}, which this ml_dtypes lacks; install a newer one"


class UnknownHere(FileFormatError):
    """What may be sound, and is not known to what is installed here."""


def numpy_dtype(form: Form, name: str) -> np.dtype[Any]:
    """The NumPy dtype of the values of a tensor."""
    found = _numpy_dtype(form.dtype, form.kind if isinstance(form.kind, str) else None)
    if isinstance(found, str):
        raise UnknownHere(f"{shorten(name)} {found}")
    return found


class Logical(NamedTuple):
    """A leaf without its values: an "array", "key", "str" or a Python scalar's type."""

    kind: Literal["array", "key", "str", "int", "float", "bool", "complex"]
    dtype: np.dtype[Any] | None  # of an array
    shape: tuple[int, ...]
    weak: bool = False
    impl: str = ""  # of a key


class Traced(Logical):
    """A leaf whose values JAX has yet to compute."""

    __slots__ = ()


def logical(form: Form, name: str) -> Logical:
    """What leaf a stored tensor stands for."""
    kind, shape = form.kind, form.shape
    if isinstance(kind, list):
        if kind[0] != "key":
            return Logical(kind[0], None, ())
        data = key_shape(kind[1], name)
        if shape[len(shape) - len(data) :] != data or len(shape) < len(data):
            raise FileFormatError(
                f"{shorten(name)} is noted as a key of {kind[1]}, whose data end in the shape "
                f"{list(data)}, and stored with the shape {list(shape)}"
            )
        return Logical("key", None, shape[: len(shape) - len(data)], impl=kind[1])
    if kind in SCALARS:
        return Logical(kind, None, ())  # type: ignore[arg-type] # one of the literals
    dtype = numpy_dtype(form, name)
    return Logical("array", dtype, shape[:-1] if kind in COMPLEX128 else shape, kind in WEAK)


def key_shape(impl: str, name: str) -> tuple[int, ...]:
    """The shape of the data of one key of an implementation."""
    try:
        return _key_shape(impl)
    except ValueError:
        raise UnknownHere(
            f"{shorten(name)} is a key of the PRNG implementation {shorten(impl)}, which this "
            "process does not know; register it, or install a newer JAX"
        ) from None


@lru_cache(maxsize=16)
def _key_shape(impl: str) -> tuple[int, ...]:
    data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl)))
    return tuple(data.shape)


def _key_dtype(impl: str) -> Any:
    """The dtype of keys of an implementation; no key is made."""
    return jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype


def abstract(leaf: Logical) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array or key."""
    dtype: Any = leaf.dtype
    if leaf.kind == "key":
        dtype = _key_dtype(leaf.impl)
    weak = {"weak_type": True} if leaf.weak and _structs_are_weak() else {}
    struct: jax.ShapeDtypeStruct = _Struct(leaf.shape, dtype, **weak)
    return struct


@lru_cache(maxsize=1)
def _structs_are_weak() -> bool:
    try:
        _Struct((), np.float32, weak_type=True)
    except TypeError:  # before JAX 0.4.34 a struct has no weak type
        return False
    return True


def noted_value(form: Form) -> Any:
    """The leaf that lives in the note alone."""
    word, argument = form.kind if isinstance(form.kind, list) else ("str", "")
    return int(argument, 16) if word == "int" else argument


# --- dtypes in NumPy and in JAX ---------------------------------------------------------------


def rank_of(dtype: np.dtype[Any]) -> int:
    """The place of a dtype's kind in NumPy's order, those of ml_dtypes included."""
    if dtype.kind in "buifc":
        return "buifc".index(dtype.kind)
    return 1 if dtype.name.startswith("uint") else 2 if dtype.name.startswith("int") else 3


@lru_cache(maxsize=16)
def implementation_of(dtype: Any) -> str | None:
    """The registered name of the implementation of keys with this dtype."""
    same = (name for name in _PRNG if _key_dtype(name) == dtype)
    return next(same, None) or _implementation(_Struct((), dtype))


def holds(dtype: np.dtype[Any]) -> bool:
    """Whether a jax.Array can have this dtype, here and now."""
    if dtype.kind in "iufc" and dtype.itemsize == (16 if dtype.kind == "c" else 8):
        return bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined] # JAX declares no options
    return _holds(dtype)


@lru_cache(maxsize=64)
def _holds(dtype: np.dtype[Any]) -> bool:
    if dtype.kind != "V":  # one of NumPy's own
        return True
    try:
        # The answer is the same under a trace, and where transfers are watched for.
        with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
            jax.device_put(np.zeros((), dtype)).block_until_ready()
    except Exception:  # noqa: BLE001 - JAX raises whatever its backend raises
        return False
    return True
