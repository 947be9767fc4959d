"""Draws the path from a tree to a file: an SVG whose colors follow the page's theme."""

from collections.abc import Sequence
from html import escape

WIDTH = 440
LINE = 17
Step = tuple[str, str, Sequence[str]]  # the function that leads to it, its title, and its lines
SAVE: Sequence[Step] = (
    ("", "a tree", ('{"layers": [(w, b)],', ' "name": "net", "step": 7}')),
    (
        "_tree.flatten.flatten",
        "names and kinds of nodes",
        ("@layers#0#0  @layers#0#1  @name  @step", "@layers#0 is a tuple"),
    ),
    (
        "_leaves.describe.describe",
        "descriptions of leaves",
        ("F32 [2,3]   F32 [3]   I64 []", '@name is the str "net", @step an int'),
    ),
    (
        "_format.note.write_note",
        "the note",
        ('{"leaves":{…},"nodes":{"@layers#0":"tuple"},', ' "version":1}'),
    ),
    (
        "_save.plan.plan_file",
        "the plan: files, each with its header",
        (
            '{"__metadata__":{…},"@step":{"dtype":"I64",',
            ' "shape":[],"data_offsets":[0,8]},…}',
            "spaces, up to a multiple of 256 or 4096",
        ),
    ),
    (
        "_save.writing.write",
        "the file",
        ("length | header | data, in the header's order", "temporary file → flush → rename"),
    ),
)
LOAD: Sequence[Step] = (
    ("", "a file, or a folder of shards", ("length | header | data, in the header's order",)),
    (
        "_load.opening.open_checkpoint",
        "an open checkpoint, checked",
        ("tensors, where each stands, the note, digests",),
    ),
    (
        "_load.matching.compare",
        "which tensor goes to which leaf of a template",
        ("@layers#0#0 → model.layers[0].w, on 8 devices",),
    ),
    (
        "_load.plan.plan_batches",
        "the plan: batches of regions of tensors",
        ("rows 0 to 511 of @layers#0#0 → devices 0 and 1",),
    ),
    (
        "_load.reading.read_leaves",
        "bytes in memory, a batch at a time",
        ("the next batches are read meanwhile",),
    ),
    (
        "_leaves.to_jax.to_jax",
        "arrays, as the template wants them",
        ("cast, wrapped, placed",),
    ),
    ("_tree.unflatten.build", "the tree", ("or jax.tree.unflatten, with a template",)),
)


def text(x: float, y: float, content: str, style: str) -> str:
    return f'<text x="{x}" y="{y}" class="{style}" xml:space="preserve">{escape(content)}</text>'


def draw(steps: Sequence[Step], label: str) -> str:
    """Return the drawing, to stand inside a page."""
    parts: list[str] = []
    tip = f"tip-{label.lower().replace(' ', '-')}"  # unique in the page
    y = 4
    for function, title, lines in steps:
        if function:
            parts.append(f'<path d="M60 {y}v30" class="arrow" marker-end="url(#{tip})"/>')
            parts.append(text(74, y + 20, function, "call"))
            y += 37
        height = 38 + LINE * len(lines)
        parts.append(
            f'<rect x="4" y="{y}" width="{WIDTH - 8}" height="{height}" rx="6" class="box"/>'
        )
        parts.append(text(18, y + 21, title, "title"))
        parts += [text(18, y + 42 + LINE * i, line, "code") for i, line in enumerate(lines)]
        y += height + 4
    return f"""<svg class="path" viewBox="0 0 {WIDTH} {y}" role="img" aria-label="{label}"
 xmlns="http://www.w3.org/2000/svg">
<defs><marker id="{tip}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">
<path d="M0 0 8 4 0 8z" class="tip"/></marker></defs>
{chr(10).join(parts)}
</svg>"""
