"""Names with placeholders, the two sides of a rule: reading, matching and filling in.

side  : { text | "{{" | "}}" | hole }
hole  : "{" sum [ ":" label { "," label } ] "}" | "{*}" | "{=}"
label : text without "," "{" "}", or none
sum   : term { "+" term }
term  : [ number "*" ] axis | number

A placeholder numbers axes from 0, or names them by labels; {*} and {=} stand for text.

Specification: *Rules*.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Final, NamedTuple, TypeAlias

ANY_TEXT: Final = "*"  # stands for any text
SPELLED: Final = "="  # stands for a whole spelled key path

_PIECES: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|([{}])")
_TERM: Final = re.compile(r"(?:([0-9]{1,18})\*)?([^\W\d]\w*)|([0-9]{1,18})")
_NUMBER: Final = "0|[1-9][0-9]{0,17}"  # at most what a 64-bit integer holds
_ALONE: Final = {
    "{": "a '{' that is not closed; write '{{' for the character",
    "}": "a '}' that closes nothing; write '}}' for the character",
}
_EXAMPLES: Final = "{l}, {l+3}, {6*b+i}, {p:q,k,v}, {*} or {=}"


class Term(NamedTuple):
    """A multiple of an axis or, if the axis is "", a number."""

    factor: int
    axis: str


class Hole(NamedTuple):
    """A placeholder, and the labels that stand for its numbers."""

    text: str  # as it is written
    terms: tuple[Term, ...]
    labels: tuple[str, ...] = ()

    @property
    def axis(self) -> str | None:
        """Return the axis that it numbers; None for a sum."""
        first = self.terms[0]
        return first.axis if len(self.terms) == 1 and first.factor == 1 and first.axis else None

    @property
    def is_text(self) -> bool:
        """Return whether it stands for text, not for a number."""
        return self.text in {ANY_TEXT, SPELLED}


Side: TypeAlias = tuple[str | Hole, ...]


class Binding(NamedTuple):
    """What the placeholders of a side stand for: the index on each axis, and a text."""

    indices: dict[str, int]
    text: str = ""


class Match(NamedTuple):
    """A side that matches, by number, and what its placeholders stand for."""

    number: int
    binding: Binding


def read_side(text: str) -> Side:
    """Read a name or a path. Raise a ValueError if it is invalid."""
    parts: list[str | Hole] = []
    literal, end = "", 0
    for piece in _PIECES.finditer(text):
        literal += text[end : piece.start()]
        end = piece.end()
        if piece[2] is not None:
            raise ValueError(f"{text!r} has {_ALONE[piece[2]]}")
        if piece[1] is None:
            literal += piece[0][0]
        else:
            parts += [literal, _read_hole(piece[1])]
            literal = ""
    parts.append(literal + text[end:])
    return tuple(part for part in parts if part != "")


def _read_hole(text: str) -> Hole:
    if text in {ANY_TEXT, SPELLED}:
        return Hole(text, (Term(1, text),))
    total, colon, listed = text.partition(":")
    terms = []
    for written in total.split("+"):
        found = _TERM.fullmatch(written.strip())
        factor, axis, number = found.groups() if found else (None, None, None)
        if not (number or (axis and axis.isidentifier())):
            raise ValueError(f"{{{text}}} is not a placeholder; write {_EXAMPLES}")
        terms.append(Term(int(factor or number or 1), axis or ""))
    hole = Hole(text, tuple(terms), tuple(listed.split(",")) if colon else ())
    if colon and hole.axis is None:
        raise ValueError(f"{{{text}}} labels a sum; only a single axis has labels")
    if len(set(hole.labels)) < len(hole.labels):
        raise ValueError(f"{{{text}}} has one label twice")
    return hole


def holes_of(side: Side) -> Iterator[Hole]:
    """Return the placeholders of a side."""
    return (part for part in side if isinstance(part, Hole))


def axes_of(side: Side) -> list[str]:
    """Return the axes of a side's placeholders, each once; text counts as one."""
    return list(dict.fromkeys(t.axis for hole in holes_of(side) for t in hole.terms if t.axis))


def with_labels(side: Side, labels: Mapping[str, tuple[str, ...]]) -> Side:
    """Add to placeholders without labels the labels of their axis."""
    return tuple(
        part._replace(labels=labels.get(part.axis or "", ()))
        if isinstance(part, Hole) and not part.labels
        else part
        for part in side
    )


def with_free_texts(side: Side) -> Side:
    """Let every {*} of a side stand for a text of its own."""
    return tuple(
        part._replace(terms=(Term(1, f"{ANY_TEXT}{number}"),))
        if isinstance(part, Hole) and part.text == ANY_TEXT
        else part
        for number, part in enumerate(side)
    )


def with_texts(side: Side, numbers: Collection[str]) -> Side:
    """Let the placeholders that are written so stand for texts."""
    return tuple(
        part._replace(text=ANY_TEXT) if isinstance(part, Hole) and part.text in numbers else part
        for part in side
    )


def fill(side: Side, binding: Binding) -> str:
    """Fill the placeholders of a side in."""
    indices, text = binding
    parts = []
    for part in side:
        if isinstance(part, str):
            parts.append(part)
        elif part.is_text:
            parts.append(text)
        else:
            number = sum(factor * (indices[axis] if axis else 1) for factor, axis in part.terms)
            parts.append(part.labels[number] if part.labels else str(number))
    return "".join(parts)


class Alternatives:
    """Sides of ascending numbers. One regular expression finds the first side that matches a text."""

    def __init__(self, sides: Mapping[int, Side]) -> None:
        self._plain: dict[str, int] = {}  # the numbers of sides without placeholders
        self._found: dict[int, tuple[int, list[Hole]]] = {}  # by the number of a group
        branches = []
        group = 1
        for number, side in sides.items():
            if not any(holes_of(side)):
                self._plain.setdefault("".join(map(str, side)), number)
                continue
            pattern, holes = _regex(side, group)
            branches.append(f"{pattern}()")
            group += len(holes) + 1
            self._found[group - 1] = number, holes
        self._regex = re.compile("|".join(branches), re.DOTALL) if branches else None

    def match(self, text: str) -> Match | None:
        """Return the first side that matches; None if none does."""
        plain = self._plain.get(text)
        found = self._regex.fullmatch(text) if self._regex else None
        if found is None or found.lastindex is None:
            return None if plain is None else Match(plain, Binding({}))
        group = found.lastindex  # the empty group at the end of the branch
        number, holes = self._found[group]
        if plain is not None and plain < number:
            return Match(plain, Binding({}))
        indices, rest = {}, ""
        for place, hole in enumerate(holes, group - len(holes)):
            value = found[place]
            if hole.is_text:
                rest = value
            else:
                axis = hole.terms[0].axis
                indices[axis] = hole.labels.index(value) if hole.labels else int(value)
        return Match(number, Binding(indices, rest))


def _regex(side: Side, group: int) -> tuple[str, list[Hole]]:
    """Return a regular expression for a side whose first group has a number, and the hole of each group."""
    parts: list[str] = []
    holes: list[Hole] = []
    groups: dict[str, str] = {}
    for part in side:
        if isinstance(part, str):
            parts.append(re.escape(part))
            continue
        axis = part.terms[0].axis
        if axis in groups:
            parts.append(f"(?P={groups[axis]})")  # a number above 99 would be a character
            continue
        name = groups[axis] = f"g{group + len(holes)}"
        holes.append(part)
        text = "|".join(map(re.escape, part.labels)) if part.labels else _NUMBER
        parts.append(f"(?P<{name}>{'.*' if part.is_text else text})")
    return "".join(parts), holes
