"""Strategies for keys and key paths."""

from functools import cache
from typing import Any, Final

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from pytree2safetensors._arguments import check_sizes, checked
from pytree2safetensors._tree.keys import (
    MAX_INDEX,
    DictKey,
    FlattenedIndexKey,
    GetAttrKey,
    Key,
    KeyPath,
    SequenceKey,
    item_key,
)
from pytree2safetensors._tree.literal import MAX_DIGITS


@cache
def texts() -> SearchStrategy[str]:
    """Generate names of attributes and keys of dicts: any text.

    Lone surrogates are left out, because files cannot hold them.
    """
    special = st.integers(0, len(_SPECIAL) - 1).map(lambda index: _SPECIAL[index])
    return _words("abcxyz01_", 1, 4) | _words("a.@#\\()0", 0, 6) | special | st.text()


def _words(alphabet: str, least: int, most: int) -> SearchStrategy[str]:
    """Generate short texts from one number each, because draws take Hypothesis time."""
    lengths, base = most - least + 1, len(alphabet)

    def spell(number: int) -> str:
        number, length = divmod(number, lengths)
        return "".join(alphabet[number // base**i % base] for i in range(least + length))

    return st.integers(0, lengths * base**most - 1).map(spell)


# Names that have a meaning elsewhere, and long names.
_SPECIAL: Final = (
    "", "__metadata__", "__class__", "__reduce_ex__", "tree_flatten", "items", "\0", "(3)", "\\(3)",
    "é" * 300, "." * 300, "x" * 5000,
)  # fmt: skip


@cache
def literals() -> SearchStrategy[Any]:
    """Generate dict keys that are not strs.

    Tuples in tuples in tuples are left out, because they behave like tuples in tuples.
    """
    atoms = st.none() | numbers() | st.binary(max_size=12)
    flat = st.lists(atoms | texts(), max_size=3).map(tuple)
    return atoms | flat | st.lists(atoms | texts() | flat, max_size=3).map(tuple)


@cache
def numbers() -> SearchStrategy[Any]:
    """Generate bools, ints and finite floats."""
    finite = st.floats(allow_nan=False, allow_infinity=False)
    return st.booleans() | st.integers() | finite | st.sampled_from((-0.0, 5e-324)) | limits()


# Around the limits of 64 bits, and of what Python prints.
_LIMITS: Final = (
    2**63 - 1, 2**63, 2**63 + 1, 1 - 2**63, -(2**63), -(2**63) - 1, 2**64, -(2**64), 2**127,
    10**100, 10**MAX_DIGITS - 1, 1 - 10**MAX_DIGITS,
)  # fmt: skip


def limits() -> SearchStrategy[int]:
    """Generate ints around the limits above."""
    # By index, because a strategy prints its samples, and these are long.
    return st.integers(0, len(_LIMITS) - 1).map(lambda index: _LIMITS[index])


@cache
def keys() -> SearchStrategy[Key]:
    """Generate single keys of every kind that has a spelling.

    The names are any text without lone surrogates; the keys of dicts are text, `None`, bools, ints
    of up to 4,300 digits, finite floats, bytes, and tuples of these.

    Specification: *Key paths*.

    >>> from hypothesis import given
    >>> @given(keys())
    ... def test_spelling(key):
    ...     assert string2keypath(keypath2string((key,))) == (key,)
    >>> test_spelling()
    """
    indices = st.integers(0, 9) | st.integers(0, MAX_INDEX)
    return st.one_of(
        st.builds(GetAttrKey, texts()),
        st.builds(DictKey, texts()),
        st.builds(SequenceKey, indices),
        st.builds(item_key, literals()),
        st.builds(FlattenedIndexKey, indices),
    )


@checked
def keypaths(
    keys: SearchStrategy[Key] = keys(),  # noqa: B008 - strategies have no state
    *,
    min_size: int = 0,
    max_size: int = 8,
) -> SearchStrategy[KeyPath]:
    """Generate key paths.

    Args:
        keys: The strategy for keys.
        min_size: The length of the shortest path.
        max_size: The length of the longest path. It is short by default, because every key except
            the first is spelled independently of the others.

    Raises:
        ValueError: A length is negative, or the longest path is shorter than the shortest.

    Specification: *Key paths*.

    >>> from hypothesis import given
    >>> @given(keypaths(max_size=2))
    ... def test_length(path):
    ...     assert len(path) <= 2
    >>> test_length()
    """
    check_sizes("keypaths", min_size=min_size, max_size=max_size)
    if max_size < min_size:
        raise ValueError(f"keypaths: max_size must be min_size={min_size} or more, not {max_size}")
    return st.lists(keys, min_size=min_size, max_size=max_size).map(tuple)
