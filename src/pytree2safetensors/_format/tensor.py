"""Tensors in the format: dtypes, sizes in bits, shapes, and the kinds of leaves in the note.

Specification: *Leaves*, *The note*.
"""

from typing import Final, NamedTuple

from pytree2safetensors._errors import FileFormatError
from pytree2safetensors._messages import shorten
from pytree2safetensors._types import Kind

# The bits of one element of each dtype of the format.
BITS: Final = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

# NumPy's names of the dtypes of the format.
DTYPE_NAMES: Final = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "float16": "F16",
    "bfloat16": "BF16", "uint32": "U32", "int32": "I32", "float32": "F32", "complex64": "C64",
    "uint64": "U64", "int64": "I64", "float64": "F64", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip

NUMPY: Final = {spelled: name for name, spelled in DTYPE_NAMES.items()}
# Dtypes that the format lacks: the note has their names, and each value takes a byte of this dtype.
NOTED_DTYPES: Final = {
    "int1": "I8", "int2": "I8", "int4": "I8", "uint1": "U8", "uint2": "U8", "uint4": "U8",
    "float4_e2m1fn": "U8", "float6_e2m3fn": "U8", "float6_e3m2fn": "U8", "float8_e3m4": "U8",
    "float8_e4m3": "U8", "float8_e4m3b11fnuz": "U8",
}  # fmt: skip

WIDTHS: Final = {  # in bits, of dtypes that do not fill their byte
    "int1": 1, "int2": 2, "int4": 4, "uint1": 1, "uint2": 2, "uint4": 4, "float4_e2m1fn": 4,
    "float6_e2m3fn": 6, "float6_e3m2fn": 6,
}  # fmt: skip

SCALARS: Final = {"int": "I64", "float": "F64", "bool": "BOOL", "complex": "F64"}
COMPLEX128: Final = ("complex128", "weak complex128")  # stored with an axis of size 2 for the parts
WEAK: Final = ("weak", "weak complex128")
WEAK_DTYPES: Final = frozenset({"BOOL", "I32", "I64", "F32", "F64", "C64"})  # of a "weak" array
LEAF_KINDS: Final = frozenset({*SCALARS, *NOTED_DTYPES, *COMPLEX128, *WEAK, "key", "str"})


class TensorInfo(NamedTuple):
    """How a file stores a leaf: its tensor (dtype is "" if it has none), and its kind in the note."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    kind: Kind | None = None

    @property
    def itemsize(self) -> int:
        """Return the bytes of one element, whose dtype is not packed."""
        return BITS[self.dtype] // 8

    @property
    def array_shape(self) -> tuple[int, ...]:
        """Return the shape of the array; the tensor of a complex128 has an axis for the parts, too."""
        return self.shape[:-1] if self.kind in COMPLEX128 else self.shape


def check_kind(kind: Kind, dtype: str, shape: tuple[int, ...], name: str) -> None:
    """Raise an error if a note contradicts its tensor."""
    word = kind[0] if isinstance(kind, list) else kind
    if word in SCALARS:
        fits = dtype == SCALARS[word] and shape == ((2,) if word == "complex" else ())
    elif word == "weak":
        fits = shape == () and dtype in WEAK_DTYPES
    elif word in COMPLEX128:
        fits = dtype == "F64" and (shape == (2,) if word in WEAK else shape[-1:] == (2,))
    elif word == "key":
        fits = dtype == "U32"
    else:
        fits = dtype == NOTED_DTYPES.get(word)
    if not fits:
        raise FileFormatError(
            f"{shorten(name)} is noted as {word} and stored as {dtype} of shape {list(shape)}, "
            "which contradict each other"
        )
