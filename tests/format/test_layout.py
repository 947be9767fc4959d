"""Where tensors are in a file, and how long its header is."""

import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytree2safetensors import FileFormatError, load_pytree, save_pytree
from pytree2safetensors._format import index, layout
from pytree2safetensors._format.tensor import BITS, TensorInfo

SIZES = st.sampled_from([0, 1, 3, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512, 1000])


@st.composite
def tensor_infos(draw: Any) -> dict[str, TensorInfo]:
    names = draw(st.lists(st.text(max_size=4), unique=True, max_size=12))
    infos = {}
    for name in names:
        dtype = draw(st.sampled_from([dtype for dtype in BITS if not dtype.startswith("F4")]))
        shape = (draw(SIZES) * 4,)  # of whole bytes, for the packed dtypes too
        infos[name] = TensorInfo(dtype, shape, math.prod(shape) * BITS[dtype] // 8)
    return infos


def content_of(planned: layout.Layout) -> dict[str, Any]:
    length = int.from_bytes(planned.head[:8], "little")
    assert len(planned.head) == 8 + length
    content: dict[str, Any] = json.loads(planned.head[8:])
    return content


@given(tensor_infos())
def test_tensors_of_a_multiple_of_256_bytes_are_aligned_to_256_and_others_as_they_can(
    infos: dict[str, TensorInfo],
) -> None:
    planned = layout.lay_out(infos, {"format": "flax"})
    content = content_of(planned)
    assert list(content) == ["__metadata__", *planned.order]
    for name, info in infos.items():
        start, stop = content[name]["data_offsets"]
        assert stop - start == info.nbytes
        kept = next(
            size for size in (256, 64, BITS[info.dtype] // 8 or 1) if info.nbytes % size == 0
        )
        assert (len(planned.head) + start) % kept == 0


@given(tensor_infos())
def test_the_order_is_three_groups_by_name(infos: dict[str, TensorInfo]) -> None:
    def rank(name: str) -> tuple[Any, ...]:
        info = infos[name]
        groups = [info.nbytes % 256 != 0, info.nbytes % 64 != 0]
        return (*groups, -(BITS[info.dtype] // 8) if all(groups) else 0, name)

    assert layout.in_order(infos) == sorted(infos, key=rank)


@pytest.mark.parametrize(
    ("size", "multiple"), [(0, 256), (2**20 - 1, 256), (2**20, 4096), (2**20 + 1, 4096)]
)
def test_data_of_a_mebibyte_start_on_a_page(size: int, multiple: int) -> None:
    starts = set()
    for width in range(1, 4096, 61):
        info = TensorInfo("U8", (size,), size)
        planned = layout.lay_out({"w" * width: info}, {})
        assert len(planned.head) % multiple == 0
        starts.add(len(planned.head))
    assert math.gcd(*starts) == multiple


@given(tensor_infos(), st.dictionaries(st.text(), st.text(), max_size=3))
def test_the_length_of_a_header_is_known_without_its_text(
    infos: dict[str, TensorInfo], metadata: dict[str, str]
) -> None:
    planned = layout.lay_out(infos, metadata)
    length, start = layout.empty_length(metadata), 0
    for name in planned.order:
        length += layout.entry_length(name, infos[name], start)
        start += infos[name].nbytes
    if infos or metadata:
        text = planned.head[8:].decode().rstrip(" ")
        assert length == len(text)
    assert len(planned.head) == 8 + layout.padded_length(length, planned.size)


@given(
    st.dictionaries(st.text(min_size=1), st.text(), max_size=5),
    st.text(min_size=1).filter(lambda name: name != "__metadata__"),
)
def test_a_header_is_written_as_python_writes_compact_json(
    metadata: dict[str, str], name: str
) -> None:
    planned = layout.lay_out({name: TensorInfo("U8", (3,), 3)}, metadata)
    entry = {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}
    content = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    text = json.dumps({**content, name: entry}, separators=(",", ":"))
    assert planned.head[8:].decode("ascii").rstrip(" ") == text


@given(
    st.lists(st.integers(1, 2000), min_size=1, max_size=30),
    st.dictionaries(st.text(max_size=5), st.text(max_size=50), max_size=2),
)
def test_a_shard_ends_before_its_header_exceeds_the_limit(
    widths: list[int], metadata: dict[str, str]
) -> None:
    check_shards(widths, metadata)


def test_a_shard_ends_at_the_last_byte_of_the_limit() -> None:
    for width in range(1800, 2100):
        check_shards([3000, 2000, width], {})


def check_shards(widths: list[int], metadata: dict[str, str]) -> None:
    infos = {f"{i:02}" + "w" * width: TensorInfo("U8", (9,), 9) for i, width in enumerate(widths)}
    limit = 4096
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "MAX_SHARD_HEADER", limit)
        shards = index.into_shards(infos, 10**9, metadata)
    assert [name for shard in shards for name in shard] == layout.in_order(infos)
    lengths = [
        len(layout.lay_out({n: infos[n] for n in shard}, metadata).head) - 8 for shard in shards
    ]
    assert max(lengths) <= limit
    for shard, following in pairwise(shards):
        longer = {name: infos[name] for name in [*shard, following[0]]}
        assert len(layout.lay_out(longer, metadata).head) - 8 > limit


def test_the_headers_of_shards_are_what_the_hub_reads(tmp_path: Any) -> None:
    tree = {f"{number:06}" + "w" * 10_000: np.uint8(number % 256) for number in range(2600)}
    save_pytree(tree, tmp_path, max_shard_size="1GB", durable=False)
    shards = sorted(tmp_path.glob("*.safetensors"))
    lengths = [int.from_bytes(shard.read_bytes()[:8], "little") for shard in shards]
    assert len(lengths) == 2
    assert 24_000_000 < max(lengths) <= 25_000_000
    assert len(load_pytree(tmp_path)) == 2600


def test_a_name_beyond_the_header_of_a_shard_is_refused(tmp_path: Any) -> None:
    tree = {"w" * 25_000_000: np.zeros(9, np.uint8), "b": np.zeros(9, np.uint8)}
    text = (
        "the header would take 25,000,184 bytes, and the format allows 25,000,000; "
        "shorten the names of its tensors"
    )
    with pytest.raises(FileFormatError, match=text):
        save_pytree(tree, tmp_path, max_shard_size=10)
    assert list(tmp_path.iterdir()) == []


def test_metadata_that_take_more_than_half_of_the_limit_are_too_long() -> None:
    for key, text in (
        ("a", "shorten the metadata, which take 1,001 of them"),
        ("pytree2safetensors", "save parts of the tree apart, or shorten its strings"),
    ):
        rest = layout.empty_length({key: ""})
        metadata = {key: "x" * (1000 - rest)}
        assert layout.remedy(metadata, 2001, "other") == "other"
        metadata[key] += "x"
        assert layout.remedy(metadata, 2001, "other") == text
