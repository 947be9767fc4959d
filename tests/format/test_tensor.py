"""Dtypes and kinds of leaves, against the table of the specification."""

import io
import itertools
import json
import math

import pytest

from pytree2safetensors import FileFormatError, load_abstract
from pytree2safetensors._format import header, tensor
from pytree2safetensors._format.tensor import check_kind

# The bits of an element of each dtype.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
# What has no kind in the note.
PLAIN = {
    "bool": "BOOL", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "int8": "I8",
    "int16": "I16", "int32": "I32", "int64": "I64", "float16": "F16", "float32": "F32",
    "float64": "F64", "bfloat16": "BF16", "complex64": "C64", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
# For each kind in the note, the dtypes, and the shapes that fit.
NOTED = {
    **dict.fromkeys(["float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"], ({"U8"}, "any")),
    **dict.fromkeys(["float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"], ({"U8"}, "any")),
    **dict.fromkeys(["uint1", "uint2", "uint4"], ({"U8"}, "any")),
    **dict.fromkeys(["int1", "int2", "int4"], ({"I8"}, "any")),
    "complex128": ({"F64"}, "pairs"),
    "weak": ({"BOOL", "I32", "I64", "F32", "F64", "C64"}, "()"),
    "weak complex128": ({"F64"}, "(2,)"),
    "key": ({"U32"}, "any"),
    "bool": ({"BOOL"}, "()"),
    "int": ({"I64"}, "()"),
    "float": ({"F64"}, "()"),
    "complex": ({"F64"}, "(2,)"),
}
WIDTHS = {
    "int1": 1, "uint1": 1, "int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4,
    "float6_e2m3fn": 6, "float6_e3m2fn": 6,
}  # fmt: skip
SHAPES = [(), (1,), (2,), (3,), (2, 2), (2, 3), (0, 2)]


def fits(kind: str, dtype: str, shape: tuple[int, ...]) -> bool:
    dtypes, shapes = NOTED[kind]
    is_fit = {"any": True, "pairs": shape[-1:] == (2,), "()": shape == (), "(2,)": shape == (2,)}
    return dtype in dtypes and is_fit[shapes]


def test_a_kind_fits_the_tensors_of_the_specification() -> None:
    for kind, dtype, shape in itertools.product(NOTED, BITS, SHAPES):
        word = ["key", "rbg"] if kind == "key" else kind
        if fits(kind, dtype, shape):
            check_kind(word, dtype, shape, "a")
            continue
        message = f"'a' is noted as {kind} and stored as {dtype} of shape"
        with pytest.raises(FileFormatError) as caught:
            check_kind(word, dtype, shape, "a")
        assert str(caught.value).startswith(message)
    assert {*NOTED, "str"} == tensor.LEAF_KINDS
    assert tensor.DTYPE_NAMES == PLAIN
    assert {spelled: name for name, spelled in PLAIN.items()} == tensor.NUMPY
    assert tensor.WIDTHS == WIDTHS
    assert tensor.BITS == BITS


@pytest.mark.parametrize("dtype", BITS)
def test_a_tensor_has_the_bytes_of_its_dtype(dtype: str) -> None:
    for count in (0, 4, 12):
        nbytes = count * BITS[dtype] // 8
        entry = {"dtype": dtype, "shape": [count], "data_offsets": [0, nbytes]}
        text = json.dumps({"a": entry}, separators=(",", ":"))
        tensors, _ = header.parse(text.encode(), "x")
        assert tensors.infos == [tensor.TensorInfo(dtype, (count,), nbytes)]
        for wrong in (nbytes - 1, nbytes + 1):
            entry["data_offsets"] = [0, wrong]
            with pytest.raises(FileFormatError):
                header.parse(json.dumps({"a": entry}).encode(), "x")


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_tensor_loads_as_its_dtype(name: str) -> None:
    size = math.prod((3,)) * BITS[PLAIN[name]] // 8
    entry = {"dtype": PLAIN[name], "shape": [3], "data_offsets": [0, size]}
    text = json.dumps({"@a": entry}).encode()
    file = io.BytesIO(len(text).to_bytes(8, "little") + text + bytes(size))
    found = load_abstract(file)
    assert found["a"].dtype.name == name
