"""Draw the charts of the documentation from the published runs: linear bars, one chart for each question.

    python benchmarks/chart.py

The drawings are transparent, and their colors are legible on light and dark pages. The README shows
one as an image; the documentation inlines them, so that its style sheet can set the text's color.
"""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from report import OURS, figures

PUBLISHED = Path(__file__).parents[1] / "docs" / "benchmarks"
WIDTH, LABELS, VALUES, ROW = 420, 170, 58, 25
BLUE, TAN, GRAY = "#3b82f6", "#b08d57", "#7a7a7a"
PEERS = {
    OURS: OURS,
    "safetensors": "safetensors.flax",
    "equinox": "Equinox",
    "orbax": "Orbax",
    "flax msgpack": "Flax msgpack",
    "pickle": "pickle",
}
SHARDED = {
    f"{OURS}, shards": OURS,
    "get_slice, make_array_from_callback": "safetensors slices",
    "safetensors.flax, device_put": "safetensors.flax",
    "orbax": "Orbax",
}


class Line(NamedTuple):
    """A limit that a library can hardly pass: its caption, and its value or the system that measures it."""

    caption: str
    value: float | str


class Panel(NamedTuple):
    """The bars of one task."""

    title: str
    workload: str
    op: str
    line: Line | None = None
    value: str = "wall"  # the member of a figure that is drawn
    systems: dict[str, str] = PEERS


BYTES = Line("dashed: the bytes, without a library", "baseline")
ARRAYS = Line("dashed: JAX alone, 4 µs an array", 0.4)
CHARTS: dict[str, Sequence[Panel]] = {
    "load-and-save": (
        Panel("Load 1 GiB, seconds", "large", "load"),
        Panel("Save 1 GiB, seconds", "large", "save"),
    ),
    "large": (
        Panel("Load 16 arrays, 1 GiB: seconds", "large", "load", BYTES),
        Panel("Save 16 arrays, 1 GiB: seconds", "large", "save", BYTES),
    ),
    "many": (
        Panel("Load 100,000 small arrays: seconds", "many", "load", ARRAYS),
        Panel("Save 100,000 small arrays: seconds", "many", "save"),
    ),
    "sharded": (
        Panel(
            "Load 1 GB, by rows, onto 8 devices: seconds", "rows", "load", BYTES, "wall", SHARDED
        ),
        Panel("By columns: seconds", "columns", "load", BYTES, "wall", SHARDED),
    ),
    "memory": (Panel("Extra memory to load 1 GiB: GB", "large", "load", None, "peak"),),
}


def text(x: float, y: float, content: str, more: str = "") -> str:
    """Write one line of text."""
    return f'<text x="{x:g}" y="{y:g}" {more}>{escape(content)}</text>'


def shown(value: float) -> str:
    """Write a number with two decimals, or none from 10 on."""
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def bars(panel: Panel, runs: list[dict[str, Any]], top: float) -> tuple[list[str], float]:
    """Draw a panel below `top`; return its elements and where it ends."""
    found = {f.system: f for f in figures(runs, panel.workload, panel.op)}
    unit = 1e9 if panel.value == "peak" else 1
    values = {
        name: getattr(found[system], panel.value) / unit
        for system, name in panel.systems.items()
        if system in found
    }
    # A bar more than ten times as long as the median's is cut, and its number says by how much.
    end = max(v for v in values.values() if v < 10 * sorted(values.values())[len(values) // 2])
    scale = (WIDTH - LABELS - VALUES) / end
    parts = [text(0, top + 16, panel.title, 'font-weight="600" font-size="15"')]
    y = first = top + 28
    for name, value in sorted(values.items(), key=lambda item: item[1]):
        ours, cut = name == OURS, value > end
        length = min(value, end) * scale
        color = BLUE if ours else TAN
        weight = 'font-weight="600"' if ours else ""
        parts += [
            text(LABELS - 8, y + 14, name, f'text-anchor="end" {weight}'),
            f'<rect x="{LABELS}" y="{y + 2}" width="{length:.1f}" height="16" rx="2" fill="{color}"/>',
            text(LABELS + length + 6, y + 14, f"{'→ ' if cut else ''}{shown(value)}", weight),
        ]
        y += ROW
    if panel.line:
        value = panel.line.value
        x = LABELS + scale * (found[value].wall if isinstance(value, str) else value)
        parts += [
            f'<path d="M{x:.1f} {first - 2}V{y}" stroke="{GRAY}" stroke-dasharray="4 3"/>',
            text(LABELS, y + 15, panel.line.caption, 'font-size="13"'),
        ]
        y += 22
    return parts, y


def draw(panels: Sequence[Panel], runs: list[dict[str, Any]]) -> str:
    """Return one chart as SVG."""
    parts: list[str] = []
    y = 0.0
    for panel in panels:
        drawn, y = bars(panel, runs, y)
        parts += drawn
        y += 16
    label = "; ".join(panel.title for panel in panels)
    head = (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y - 10:g}" '
        f'width="{1.2 * WIDTH:g}" height="{1.2 * (y - 10):g}" '
        f'role="img" aria-label="Bar chart. {escape(label)}" font-family="system-ui, sans-serif" '
        f'font-size="14" fill="{GRAY}">'
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def write(result: dict[str, Any], folder: Path) -> None:
    """Write every chart whose tasks were measured."""
    measured = {(run["workload"], run["op"]) for run in result["runs"]}
    for name, panels in CHARTS.items():
        if {(panel.workload, panel.op) for panel in panels} <= measured:
            (folder / f"{name}.svg").write_text(draw(panels, result["runs"]), "utf-8")


if __name__ == "__main__":
    write(json.loads((PUBLISHED / "speed.json").read_text("utf-8")), PUBLISHED)
