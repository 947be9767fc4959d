"""Headers of the usual form, which are read without a parser of JSON."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from pytree2safetensors import FileFormatError, load_pytree
from pytree2safetensors._format import header
from pytree2safetensors._format.header import Tensors
from pytree2safetensors._format.tensor import TensorInfo

A = '"a":{"dtype":"U8","shape":[2,3],"data_offsets":[0,6]}'
B = '"b":{"dtype":"I8","shape":[],"data_offsets":[6,7]}'
INFOS = [TensorInfo("U8", (2, 3), 6), TensorInfo("I8", (), 1)]


@pytest.mark.parametrize("count", range(3))
@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt", "é": "ü"}])
@pytest.mark.parametrize("padding", ["", "   "])
def test_a_header_of_the_usual_form_is_read_quickly(
    count: int, metadata: dict[str, str] | None, padding: str
) -> None:
    entries = [A, B][:count]
    if metadata is not None:
        entries = [f'"__metadata__":{json.dumps(metadata)}', *entries]
    found = header._read_compact(f"{{{','.join(entries)}}}{padding}")
    if metadata is None and not count:  # the other way reads a header of nothing
        assert found is None
        return
    tensors = Tensors(["a", "b"][:count], INFOS[:count], [0, 6][:count])
    assert found == (tensors, metadata or {})


@pytest.mark.parametrize(
    "text",
    [
        f"{{{A},x{B}}}",
        f"{{{A}x,{B}}}",
        f"{{x,{A},{B}}}",
        f"{{{A},{B},}}",
        f"{{{A},{B}}}x",
        f"{{{A},{A}}}",
        f"{{{A},{B.replace('6,7', '6,8')}}}",
    ],
)
def test_no_other_text_is_read_quickly(text: str) -> None:
    assert header._read_compact(text) is None


def parse(entry: str) -> TensorInfo:
    tensors, _ = header.parse(f'{{"a":{entry}}}'.encode(), "the file")
    return tensors.infos[0]


def entry(dtype: str, shape: list[int]) -> str:
    return f'{{"dtype":"{dtype}","shape":{json.dumps(shape)},"data_offsets":[0,0]}}'


def test_an_empty_tensor_has_a_shape_that_memory_could_hold() -> None:
    assert parse(entry("U8", [0, 2**63 - 1])) == TensorInfo("U8", (0, 2**63 - 1), 0)
    assert parse(entry("F32", [2**61 - 1, 0])) == TensorInfo("F32", (2**61 - 1, 0), 0)
    for dtype, size in (("U8", 2**63), ("F32", 2**61)):
        with pytest.raises(FileFormatError, match="beyond what memory can address"):
            parse(entry(dtype, [size, 0]))


def test_a_zip_archive_may_begin_with_a_header_length_that_is_allowed() -> None:
    length = int.from_bytes(b"PK\3\4", "little")  # as in archives of torch.save
    with pytest.raises(FileFormatError) as caught:
        header.check_header(length, 108, "'file'")
    assert str(caught.value) == (
        "'file' is not a safetensors file (it looks like a zip archive): its header should take "
        "67,324,752 bytes, and the file has 108"
    )
    with pytest.raises(FileFormatError) as caught:
        header.parse(bytes(length), "'file'")
    assert str(caught.value) == (
        "'file' is not a safetensors file (it looks like a zip archive): its header does not begin with {"
    )
    for other in (int.from_bytes(b"PK", "little"), 128):  # truncated files may have these
        with pytest.raises(FileFormatError, match=r"^'file' is truncated: its header should take"):
            header.check_header(other, 108, "'file'")


def test_a_gzip_file_is_recognized() -> None:
    guess = r"^'file' is not a safetensors file \(it looks like gzip data: decompress it\): "
    with pytest.raises(FileFormatError, match=guess):
        header.header_length(gzip.compress(b"x", mtime=1)[:8], "'file'")
    head = gzip.compress(b"x", mtime=0)[:8]  # whose header length is allowed
    length = header.header_length(head, "'file'")
    with pytest.raises(FileFormatError, match=guess):
        header.check_header(length, 108, "'file'")
    with pytest.raises(FileFormatError, match=guess):
        header.parse(bytes(length), "'file'")


def test_a_tensor_has_as_many_dimensions_as_an_array_of_numpy() -> None:
    most = max(count for count in range(1, 100) if can_have(count))
    assert parse(entry("U8", [0] * most)) == TensorInfo("U8", (0,) * most, 0)
    with pytest.raises(FileFormatError, match=f"and NumPy arrays have at most {most}$"):
        parse(entry("U8", [0] * (most + 1)))


def can_have(dimensions: int) -> bool:
    try:
        np.zeros((0,) * dimensions)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    "second",
    [
        '[["dtype","F32"],["shape",[]],["data_offsets",[4,8]]]',
        '{"dtype":"F32","shape":"","data_offsets":[4,8]}',
        '{"dtype":"F32","shape":{},"data_offsets":[4,8]}',
        '{"dtype":"F32","shape":[],"data_offsets":[4,8.0]}',
        '{"dtype":"F32","shape":[],"data_offsets":[true,8]}',
    ],
)
def test_a_tensor_like_another_is_checked_as_strictly(second: str, tmp_path: Path) -> None:
    first = '{"dtype":"F32","shape":[],"data_offsets":[0,4]}'
    header = f'{{"@a":{first},"@b":{second}}}'.encode()
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(FileFormatError):
        load_pytree(tmp_path / "file")
