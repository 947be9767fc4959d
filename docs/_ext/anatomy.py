"""Shows a real file: its parts as a figure, all its bytes with notes, and digests to test against."""

import json
import tempfile
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

import pytree2safetensors as p2s
from pytree2safetensors._format.digests import digest_tensor, hash_blocks
from pytree2safetensors._format.tensor import TensorInfo

WIDTH, LINE = 420, 28
VECTORS = (
    ("@w", "U8", (0,)),
    ("@w", "F32", (2, 3)),
    ("a.b", "I64", ()),
    ("@é\\.x", "U8", (3, 5)),
    ("@big", "U8", (16_777_216,)),
    ("@big", "U8", (16_777_217,)),
    ("@big", "F32", (3, 4_000_000)),
)


class Part(NamedTuple):
    """A part of a file: where it starts, how long it is, and what it is."""

    start: int
    size: int
    what: str


def example() -> bytes:
    """Save a small tree."""
    tree = {"w": (np.array([1.5, -2.0], np.float32),), "step": 7}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "example.safetensors"
        p2s.save_pytree(tree, path)
        return path.read_bytes()


def parts_of(content: bytes) -> list[Part]:
    """List the parts of a file in order."""
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].rstrip(b" ")
    parts = [
        Part(0, 8, f"the length of the header: {length}"),
        Part(8, len(text), "the header, a JSON object"),
        Part(8 + len(text), length - len(text), "padding: spaces"),
    ]
    entries = {name: e for name, e in json.loads(text).items() if name != "__metadata__"}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        shape = ",".join(map(str, entry["shape"]))
        parts.append(Part(8 + length + start, stop - start, f"{name}: {entry['dtype']}[{shape}]"))
    return parts


def layout() -> str:
    """Draw the parts of the example file, one below the other."""
    content = example()
    parts = parts_of(content)
    lines = []
    for number, part in enumerate(parts):
        y = 4 + LINE * number
        lines += [
            f'<text x="30" y="{y + 19}" text-anchor="end" class="code">{part.start}</text>',
            f'<rect x="38" y="{y}" width="{WIDTH - 126}" height="{LINE}" class="box"/>',
            f'<text x="46" y="{y + 19}" class="code">{escape(part.what)}</text>',
            f'<text x="{WIDTH - 80}" y="{y + 19}" class="code">{part.size} bytes</text>',
        ]
    height = 8 + LINE * len(parts)
    lines.append(
        f'<text x="30" y="{height + 15}" text-anchor="end" class="code">{len(content)}</text>'
    )
    label = "The parts of a file: " + "; ".join(f"{part.what}, {part.size} bytes" for part in parts)
    return (
        f'<svg class="path" viewBox="0 0 {WIDTH} {height + 22}" role="img"'
        f' aria-label="{escape(label)}" xmlns="http://www.w3.org/2000/svg">\n'
        + "\n".join(lines)
        + "\n</svg>"
    )


def hexdump() -> Iterator[str]:
    """Give all bytes of the example file, with a note where a part starts."""
    content = example()
    parts = parts_of(content)
    for start in range(0, len(content), 16):
        row = content[start : start + 16]
        notes = [part.what for part in parts if start <= part.start < start + 16 and part.size]
        shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        yield f"{start:04x}  {row.hex(' '):47}  {shown:16}  {'; '.join(notes)}".rstrip()
    yield f"{len(content):04x}"


def vectors() -> list[str]:
    """List digests of tensors."""
    lines = ["| name | dtype | shape | bytes | blocks | digest |", "|---|---|---|---|---|---|"]
    widths = {"U8": 1, "F32": 4, "I64": 8}
    for name, dtype, shape in VECTORS:
        size = int(np.prod(shape)) * widths[dtype]
        data = np.resize(np.arange(251, dtype=np.uint8), size).tobytes()
        hashes = hash_blocks([data])
        digest = digest_tensor(name, TensorInfo(dtype, shape, size), hashes)
        shown = json.dumps(list(shape), separators=(",", ":"))
        lines.append(
            f"| `{name}` | `{dtype}` | `{shown}` | {size:,} | {len(hashes)} | `{digest}` |"
        )
    return lines
