"""What the runs say: medians with their spread, as tables."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import rst
from workloads import WORKLOADS

OURS = "pytree2safetensors"
HEAD = (
    "",
    "wall, s",
    "spread",
    "CPU, s",
    "µs CPU a leaf",
    "times ours",
    "extra memory, MB",
    "anonymous",
    "file, MB",
)
LEAVES = {"many": 100_000, "state": 20_000}
TITLES = {"save": "saved", "load": "loaded"}


@dataclass(frozen=True)
class Figure:
    """The runs of one system at one task, summed up."""

    system: str
    wall: float
    fastest: float
    slowest: float
    cpu: float
    peak: float
    anonymous: float
    bytes: int


def figures(runs: Iterable[dict[str, Any]], workload: str, op: str) -> list[Figure]:
    """Sum up the runs of a task by system, fastest first. The watched run counts for memory alone."""
    mine = [run for run in runs if (run["workload"], run["op"]) == (workload, op)]
    found = []
    for system in dict.fromkeys(run["system"] for run in mine):
        every = [run for run in mine if run["system"] == system]
        timed = [run for run in every if not run["watched"]] or every
        walls = [run["wall"] for run in timed]
        found.append(
            Figure(
                system,
                wall=median(walls),
                fastest=min(walls),
                slowest=max(walls),
                cpu=median(run["cpu"] for run in timed),
                peak=median(run["peak"] for run in every),
                anonymous=median(run["anonymous"] for run in every if run["watched"]),
                bytes=every[0]["bytes"],
            )
        )
    return sorted(found, key=lambda figure: figure.wall)


def ours(found: list[Figure]) -> Figure | None:
    """Return the figure that the others are compared with."""
    names = (OURS, f"{OURS}, shards")
    return next((figure for figure in found if figure.system in names), None)


def row(figure: Figure, base: Figure | None, workload: str, scale: float) -> list[str]:
    """Write a figure as a row of the table."""
    leaves = LEAVES.get(workload, 0) * scale
    ratio = _ratio(figure, base, workload)
    return [
        figure.system,
        f"{figure.wall:.3f}",
        f"{figure.fastest:.3f}–{figure.slowest:.3f}",
        f"{figure.cpu:.3f}",
        f"{figure.cpu / leaves * 1e6:.1f}" if leaves else "",
        f"{ratio:.2f}" if ratio else "",
        f"{figure.peak / 1e6:.0f}",
        f"{figure.anonymous / 1e6:.0f}",
        f"{figure.bytes / 1e6:.1f}",
    ]


def _ratio(figure: Figure, base: Figure | None, workload: str) -> float | None:
    """Compare by wall time; where a core does all the work, and others may share it, by CPU time."""
    if base is None:
        return None
    return figure.cpu / base.cpu if workload in LEAVES else figure.wall / base.wall


def tables(result: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """Return title, head and rows for each task that was measured."""
    made = []
    for workload, description in WORKLOADS.items():
        for op, word in TITLES.items():
            found = figures(result["runs"], workload, op)
            if not found or (op == "save" and description.devices > 1):
                continue
            rows = [row(figure, ours(found), workload, result["scale"]) for figure in found]
            keep = [i for i in range(len(HEAD)) if i == 0 or any(line[i] for line in rows)]
            title = f"{description.title}: {word}"
            made.append(
                (title, tuple(HEAD[i] for i in keep), [[line[i] for i in keep] for line in rows])
            )
    return made


def about(result: dict[str, Any]) -> str:
    """Say where and when the figures were taken."""
    machine = ", ".join(value for value in result["machine"].values())
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    share = "" if result["scale"] == 1 else f" Trees at {result['scale']:g} of their size."
    return (
        f"Measured on {machine}; {versions}; this library at {result['commit']}. Medians of"
        f" {result['rounds']} interleaved runs, each in a process of its own.{share}"
    )


def imports(result: dict[str, Any]) -> tuple[str, tuple[str, ...], list[list[str]]]:
    """Return the table of the time that imports take."""
    rows = [
        [what, f"{median(times) * 1e3:.0f}", f"{min(times) * 1e3:.0f}–{max(times) * 1e3:.0f}"]
        for what, times in result["imports"].items()
    ]
    title = "Time to import, after jax, safetensors.flax, jaxtyping and beartype"
    return title, ("", "CPU, ms", "spread"), rows


def as_rst(result: dict[str, Any]) -> str:
    """Write everything for the documentation."""
    parts = [about(result) + "\n"]
    parts += [rst.table(*made) for made in tables(result)]
    if result["imports"]:
        parts.append(rst.table(*imports(result)))
    if result["failures"]:
        head = ("", "what was done", "what happened")
        rows = [
            [f["system"], f"{f['workload']}, {f['op']}", f"``{f['reason']}``"]
            for f in result["failures"]
        ]
        parts.append(rst.table("What gave no result", head, rows))
    return "\n".join(parts)


def as_text(result: dict[str, Any]) -> str:
    """Write everything for the terminal."""
    made = [*tables(result), *([imports(result)] if result["imports"] else [])]
    return "\n\n".join(
        [about(result), *(f"{title}\n{rst.plain(head, rows)}" for title, head, rows in made)]
    )
