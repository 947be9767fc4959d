"""What the runs of `accelerator.py` say: tables, and a chart."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import chart
import rst
from chart import Line, Panel
from report import OURS

MODEL, FOLDER, SMALL = "model", "folder", "small"
TITLES = {
    MODEL: "A transformer in bfloat16, one file",
    FOLDER: "The same, a folder of shards",
    SMALL: "Small leaves of float32",
}
LOADED = {  # in the titles of the chart
    MODEL: "one file onto the GPU",
    FOLDER: "a folder of shards onto the GPU",
    SMALL: "{leaves:,} small arrays onto the GPU",
}
NAMES = {"orbax": "Orbax"}
Table = tuple[str, tuple[str, ...], list[list[str]]]  # title, head, rows


def limits_of(result: dict[str, Any]) -> dict[str, float]:
    """Return the bytes per second of each limit, and what bounds a load and a save."""
    found = next((run for run in result["runs"] if run["op"] == "limits"), None)
    if not found or result["platform"] == "cpu":
        return {}
    rates = {name: found["bytes"] / median(seconds) for name, seconds in found["seconds"].items()}
    return rates | {
        "load": min(rates["to the device"], rates["reads"]),
        "save": min(rates["from the device"], rates["writes"]),
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """Return all tables: title, head, rows."""
    made = [_limits_table(result)]
    for workload, title in TITLES.items():
        for op, word in (("load", "loaded onto the device"), ("save", "saved from it")):
            found = figures(result, workload, op)
            if found:
                many = workload == SMALL
                rows = [_row(run, found, limits_of(result).get(op, 0), many) for run in found]
                head = [
                    "",
                    "first, s",
                    "again, s",
                    "spread",
                    "GB/s",
                    "of the limit",
                    "times ours",
                    "host memory, MB",
                ]
                if many:
                    del head[4:6]
                made.append((f"{title}, {word}", tuple(head), rows))
    made += [_background_table(run) for run in result["runs"] if run["op"] == "background"]
    return [table for table in made if table[2]]


def _limits_table(result: dict[str, Any]) -> Table:
    found = next((run for run in result["runs"] if run["op"] == "limits"), None)
    rows = []
    for name, seconds in found["seconds"].items() if found else ():
        rates = sorted(found["bytes"] / second / 1e9 for second in seconds)
        rows.append([name, f"{median(rates):.1f}", f"{rates[0]:.1f}–{rates[-1]:.1f}"])
    return "The limits of the machine", ("", "GB/s", "spread"), rows


def figures(result: dict[str, Any], workload: str, op: str) -> list[dict[str, Any]]:
    """Return the runs of a task, fastest first."""
    mine = [run for run in result["runs"] if (run["workload"], run["op"]) == (workload, op)]
    return sorted(mine, key=typical)


def typical(run: dict[str, Any]) -> float:
    """Return the seconds that a run usually takes: again, if it was done again."""
    return median(run["seconds"][1:] or run["seconds"])


def _row(run: dict[str, Any], found: list[dict[str, Any]], limit: float, many: bool) -> list[str]:
    first, *again = run["seconds"]
    rate = run["bytes"] / typical(run)
    base = next((other for other in found if other["system"] == OURS), None)
    ratio = typical(run) / typical(base) if base else 0
    return [
        run["system"],
        f"{first:.3f}",
        f"{median(again):.3f}" if again else "",
        f"{min(again):.3f}–{max(again):.3f}" if again else "",
        *([] if many else [f"{rate / 1e9:.1f}", f"{rate / limit:.0%}" if limit else ""]),
        f"{ratio:.2f}" if ratio else "",
        f"{run['host memory'] / 1e6:.0f}",
    ]


def _background_table(run: dict[str, Any]) -> Table:
    rows = [["no save", "", "", f"{run['step'] * 1e3:.2f}", f"{run['slowest'] * 1e3:.2f}"]]
    for name, save in zip(("first", "again"), run["saves"], strict=True):
        times = [save["call"] * 1e3, save["total"] * 1e3, save["step"] * 1e3, save["slowest"] * 1e3]
        rows.append(
            [name, f"{times[0]:.0f}", f"{times[1]:.0f}", f"{times[2]:.2f}", f"{times[3]:.2f}"]
        )
    memory = run["host memory"] / 1e6
    title = f"{run['bytes'] / 1e9:.1f} GB saved in the background while steps run ({memory:.0f} MB of host memory)"
    return (
        title,
        ("", "the call, ms", "until saved, ms", "a step, ms", "the slowest step, ms"),
        rows,
    )


def about(result: dict[str, Any]) -> str:
    """Say where and when the figures were taken."""
    text = (
        f"Measured on one {result['device']}, {', '.join(result['machine'].values())};"
        f" {', '.join(f'{name} {version}' for name, version in result['versions'].items())};"
        f" this library at {result['commit']}. Trees of {result['bytes'] / 1e9:.1f} GB"
        f" (half of that in the background) and of {result['leaves']:,} small leaves."
    )
    if result["platform"] == "cpu":
        text += " This is a CPU: the figures show that everything runs, and say nothing about accelerators."
    return text


def left_out(result: dict[str, Any]) -> str:
    """Name what gave no result."""
    found = [f"{failure['what']} ({failure['reason']})" for failure in result["failures"]]
    return f"Without a result: {'; '.join(found)}." if found else ""


def write(result: dict[str, Any], output: Path) -> None:
    """Write the files that the documentation includes."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "accelerator.json").write_text(json.dumps(result, indent=1) + "\n")
    parts = [
        about(result) + "\n",
        *(rst.table(*table) for table in tables(result)),
        left_out(result),
    ]
    (output / "accelerator.rst").write_text("\n".join(parts).strip() + "\n")
    (output / "accelerator.svg").write_text(draw(result), "utf-8")


def as_text(result: dict[str, Any]) -> str:
    """Write everything for the terminal."""
    shown = [f"{title}\n{rst.plain(head, rows)}" for title, head, rows in tables(result)]
    return "\n\n".join(["", *shown, left_out(result)])


def draw(result: dict[str, Any]) -> str:
    """Draw the seconds of the loads, and the limit of the machine."""
    runs = [
        {"workload": run["workload"], "op": run["op"], "system": run["system"], "watched": True}
        | {"wall": typical(run), "cpu": 0, "peak": run["host memory"], "anonymous": 0}
        | {"bytes": run["bytes"]}
        for run in result["runs"]
        if run["op"] in {"load", "save"}
    ]
    systems = {run["system"]: NAMES.get(run["system"], run["system"]) for run in runs}
    panels = []
    for workload in TITLES:
        mine = [run for run in runs if (run["workload"], run["op"]) == (workload, "load")]
        limit = limits_of(result).get("load", 0) if workload != SMALL else 0
        if mine:
            line = (
                Line("dashed: the limit of the machine", mine[0]["bytes"] / limit)
                if limit
                else None
            )
            title = f"Load {LOADED[workload].format(**result)}: seconds"
            panels.append(Panel(title, workload, "load", line, "wall", systems))
    return chart.draw(panels, runs)
