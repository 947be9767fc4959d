"""Explaining what a load would do, from headers and scalars only.

Specification: *Rules*.
"""

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from pytree2safetensors._arguments import checked
from pytree2safetensors._leaves.renaming import Rename
from pytree2safetensors._leaves.routes import describe_unused
from pytree2safetensors._leaves.spec import LeafSpec
from pytree2safetensors._leaves.views import View
from pytree2safetensors._load.complaints import Misfits, misfits
from pytree2safetensors._load.flat_template import flat_template, stored_for
from pytree2safetensors._load.matching import Comparison, Options
from pytree2safetensors._load.misfits import show
from pytree2safetensors._load.opening import open_checkpoint
from pytree2safetensors._load.stored import scalar_reader
from pytree2safetensors._messages import shorten
from pytree2safetensors._storage.locations import PathLike, Readable
from pytree2safetensors._tree.pytree import PyTree
from pytree2safetensors._tree.rule_index import with_dots

_WIDEST: Final = 60  # characters of a column; longer cells are not aligned


class Explanation(NamedTuple):
    """The lines of `explain`, and what does not fit."""

    lines: list[str]
    misfits: Misfits


@checked
def explain(
    module: PyTree,
    path: PathLike | Readable,
    *,
    cast: bool = False,
    prefix: str = "",
    rename: Rename | None = None,
) -> str:
    """Explain what `load_into_pytree` would do. Only headers and scalars are read.

    Args:
        module: The template.
        path: As for `load_into_pytree`.
        cast: As for `load_into_pytree`.
        prefix: As for `load_into_pytree`.
        rename: As for `load_into_pytree`. An empty list (`[]`) shows all dotted paths and names.

    Returns:
        Text to print. A line for each leaf of the template, except functions and settings, says
        whether the leaf fits, and shows its path, its dotted path, its shape, its tensors with their
        shapes, and the pattern. Then come unused tensors and rules, and which earlier rules hide those.

    Raises:
        WeightsMismatchError: The file has nothing at `prefix`.
        FileFormatError: The file is damaged, or is not a safetensors file.
        KeyPathError: A key path of `module` cannot be spelled, or `prefix` is not a key path.
        TreeStructureError: JAX cannot flatten `module`; or, before JAX 0.4.36, gives the children of a
            node another order with their keys than without.
        ValueError: The path of a rule is ambiguous in `module`.
        OSError: The file cannot be read.

    Specification: *Rules*.

    >>> save_pytree({"w": np.ones((2, 3), np.float32)}, "model.safetensors")
    >>> rules = [Rule("@w", "w", "o i -> i o")]
    >>> print(explain({"w": np.zeros((3, 2), np.float32)}, "model.safetensors", rename=rules))
    'model.safetensors': 1 of 1 leaves fit
      fits  '@w' = 'w'  float32[3,2]  '@w' float32[2,3]  'o i -> i o'
    """
    return "\n".join(explanation(module, path, cast=cast, prefix=prefix, rename=rename).lines)


def explanation(
    module: PyTree,
    path: PathLike | Readable,
    *,
    cast: bool = False,
    prefix: str = "",
    rename: Rename | None = None,
) -> Explanation:
    """Return what `explain` says, and what a strict load would complain about."""
    with open_checkpoint(path) as checkpoint:
        template = flat_template(module)
        available = stored_for(template, checkpoint, prefix, rename)
        options = Options(
            label=checkpoint.label,
            strict=True,
            verbose=False,
            cast=cast,
            prefix=prefix,
            rename=rename,
            unexpected="raise",
        )
        read = scalar_reader(checkpoint)
        found = template.compared(available, read, options)
        rows = [*_rows(found)]
        wrong = misfits(found, options)
        unused = describe_unused(found.routes, found.paths)
        lines = [
            f"{checkpoint.label}: {len(found.found)} of {len(rows)} leaves fit",
            *_aligned(rows),
            *_listed("unused tensors", map(shorten, wrong.unexpected)),
            *_listed("rules that no leaf of the template uses", unused),
        ]
        return Explanation(lines, wrong)


def _rows(found: Comparison) -> Iterable[tuple[str, ...]]:
    fitting = {position: source for position, source, _ in found.found}
    missing: dict[str, list[str]] = {}
    for path, name in found.missing:
        missing.setdefault(path, []).append("" if name is None else shorten(name))
    mismatched = dict(found.mismatched)
    for position, (path, leaf) in enumerate(zip(found.paths, found.needs, strict=True)):
        if leaf is None and path not in mismatched:
            continue
        shown = "not data" if leaf is None else show(leaf.spec)
        row = [with_dots(path, " = "), shown]
        if position in fitting:
            rule = found.routes.rules[position]
            pattern = [repr(rule.pattern)] if rule is not None and rule.pattern else []
            yield "fits", *row, _tensors(fitting[position], found.available), *pattern
        elif path in mismatched:
            yield "differs", *row, mismatched[path]
        elif path in missing:
            lacks = ", ".join(missing[path])
            yield "missing", *row, f"there is no {lacks}" if lacks else "no rule has this path"
        else:
            yield "kept", *row, "not in the file"


def _tensors(source: str | View, available: Mapping[str, LeafSpec | None]) -> str:
    """Return the tensors of a leaf, and the shape of each."""
    names = source.names if isinstance(source, View) else (source,)
    if not names:
        return "no tensors"
    shown = " or ".join(dict.fromkeys(show(spec) for name in names if (spec := available[name])))
    if len(names) == 1:
        return f"{shorten(names[0])} {shown}"
    return f"{shorten(names[0])} ... {shorten(names[-1])}, {len(names)} of {shown}"


def _aligned(rows: list[tuple[str, ...]]) -> Iterable[str]:
    widths = [0] * max(map(len, rows), default=0)
    for row in rows:
        for column, text in enumerate(row[:-1]):
            widths[column] = max(widths[column], min(len(text), _WIDEST))
    for row in rows:
        texts = zip(row[:-1], widths, strict=False)
        yield "  ".join(["", *(text.ljust(width) for text, width in texts), row[-1]])


def _listed(title: str, lines: Iterable[str]) -> list[str]:
    found = [f"  {line}" for line in lines]
    return [f"{title}:", *found] if found else []
