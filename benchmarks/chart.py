"""The chart: one panel for each task, a bar for each system."""

from pathlib import Path
from typing import Any

from report import OURS, Figure, figures, ours

PANELS = ("A", "B", "C", "D")
COLORS = {"ours": "#2a78d6", "floor": "#8a8a8a", "peer": "#c9a26b"}


def kind(figure: Figure) -> str:
    """Tell this library, the floor and the others apart."""
    if figure.system.startswith(OURS):
        return "ours"
    return "floor" if "floor" in figure.system or figure.system.startswith("write") else "peer"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw wall times against each other, on a logarithmic axis, with their spread."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": OURS, "svg.fonttype": "none", "font.size": 8})
    import matplotlib.pyplot as plt

    panels = [w for w in PANELS if figures(result["runs"], w, "load")]
    if not panels:
        return
    chart, axes = plt.subplots(len(panels), 2, figsize=(10, 2.6 * len(panels)), squeeze=False)
    for line, workload in zip(axes, panels, strict=True):
        for axis, op in zip(line, ("save", "load"), strict=True):
            _panel(axis, figures(result["runs"], workload, op), f"{workload}: {op}, seconds")
    chart.tight_layout()
    chart.savefig(path, metadata={"Date": None}, facecolor="white")
    plt.close(chart)


def _panel(axis: Any, fastest_first: list[Figure], title: str) -> None:
    found = fastest_first[::-1]  # bars stand from the bottom up
    walls = [figure.wall for figure in found]
    spread = [[f.wall - f.fastest for f in found], [f.slowest - f.wall for f in found]]
    axis.barh(
        [figure.system for figure in found],
        walls,
        xerr=spread,
        color=[COLORS[kind(figure)] for figure in found],
        error_kw={"elinewidth": 0.7, "ecolor": "#333333"},
    )
    axis.set_xscale("log")
    axis.xaxis.set_minor_formatter("")  # on less than a decade its labels would overlap
    base = ours(found)
    for place, figure in enumerate(found):
        ratio = figure.wall / base.wall if base else 0
        text = f" {ratio:.0f}x" if ratio >= 10 else f" {ratio:.2g}x" if ratio else ""
        axis.annotate(
            text, (figure.slowest, place), va="center", xytext=(2, 0), textcoords="offset points"
        )
    axis.margins(x=0.15)
    axis.set_title(title, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
