"""Matching of many paths or names with many rules: a regular expression stands for many rules.

Specification: *Rules*.
"""

from collections.abc import Collection, Iterable, Sequence

from pytree2safetensors._messages import shorten
from pytree2safetensors._tree.paths import dotted, is_dotted
from pytree2safetensors._tree.placeholders import Alternatives, Match, Side, holes_of, with_texts
from pytree2safetensors._tree.rule import ParsedRule, Rule, parse_rule
from pytree2safetensors._tree.spelling import INDEX, ITEM


class RuleIndex:
    """Rules, ready to be matched."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = rules
        self.parsed: list[ParsedRule] = [parse_rule(rule) for rule in rules]
        sides = {n: parsed.path for n, parsed in enumerate(self.parsed) if parsed.path is not None}
        of_paths = {
            n: rule.path != "{=}" and is_dotted(rule.path or "") for n, rule in enumerate(rules)
        }
        self._dotted = Alternatives({n: side for n, side in sides.items() if of_paths[n]})
        self._spelled = Alternatives({n: side for n, side in sides.items() if not of_paths[n]})
        self._has_dotted = any(of_paths[number] for number in sides)
        unused = {n: p.name for n, p in enumerate(self.parsed) if p.path is None and p.name}
        self._unused = Alternatives(unused)

    def match_paths(self, paths: Iterable[str]) -> list[Match | None]:
        """Match the spelled paths of all leaves of a tree.

        Raises:
            ValueError: A rule with a dotted path matches two leaves of one dotted path.
        """
        found: list[Match | None] = []
        spelled: dict[str, str] = {}  # by dotted path, if a rule matches that
        for path in paths:
            first = self._spelled.match(path)
            short = dotted(path) if self._has_dotted else ""
            second = self._dotted.match(short) if self._has_dotted else None
            if second is not None and (first is None or second.number < first.number):
                if spelled.setdefault(short, path) != path:
                    raise ValueError(
                        f"{self.rules[second.number]!r}: its path is dotted, and both "
                        f"{shorten(spelled[short])} and {shorten(path)} are {shorten(short)} with "
                        "dots; write the path as one of them is spelled"
                    )
                first = second
            found.append(first)
        return found

    def match_names(self, names: Iterable[str]) -> dict[str, int]:
        """Return the names that rules without a path match, and the numbers of those rules."""
        matches = ((name, self._unused.match(name)) for name in names)
        return {name: found.number for name, found in matches if found is not None}


def with_dots(path: str, sign: str = ", dotted ") -> str:
    """Write a path for a message, with its dotted path if a rule can have that."""
    dots = dotted(path)
    return shorten(path) + (f"{sign}{shorten(dots)}" if dots != path and is_dotted(dots) else "")


def describe_idle(rule: Rule, paths: Collection[str]) -> str:
    """Describe a rule that matches none of these paths, and what may be wrong with its path."""
    path, side = rule.path or "", parse_rule(rule).path or ()
    # An attribute has no marker at the beginning.
    for marker in () if is_dotted(path) else (ITEM, INDEX):
        if any(map(Alternatives({0: (marker, *side)}).match, paths)):
            return f"{rule!r} (a marker is missing at the beginning of its path: write {marker + path!r})"
    if not is_dotted(path):
        whole = Alternatives({0: side})
        spelled = next((leaf for leaf in paths if whole.match(dotted(leaf))), None)
        if spelled is not None:
            return (
                f"{rule!r} (a path with '@', '#' or a backslash is not dotted: write it as "
                f"{shorten(spelled)} is spelled)"
            )
    numbers = _numbers_for_texts(side, map(dotted, paths) if is_dotted(path) else paths)
    if not numbers:
        return repr(rule)
    shown = ", ".join(f"{{{text}}}" for text in numbers)
    return f"{rule!r} (numbers match {shown}; texts need labels, as in {{{numbers[-1]}:a,b}})"


def _numbers_for_texts(side: Side, paths: Iterable[str]) -> list[str]:
    """Return which placeholders for numbers would have to stand for texts to match one of these paths."""
    holes = [hole for hole in holes_of(side) if hole.axis and not (hole.labels or hole.is_text)]
    numbers = [*dict.fromkeys(hole.text for hole in holes)]
    paths = [*paths] if numbers else []
    for texts in [*([number] for number in numbers), *([numbers] if len(numbers) > 1 else [])]:
        if any(map(Alternatives({0: with_texts(side, texts)}).match, paths)):
            return texts
    return []
