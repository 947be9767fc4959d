"""What a note says about nodes, compared with a slow check of every pair of names."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pytree2safetensors import FileFormatError, KeyPathError
from pytree2safetensors._tree.claims import check_nodes
from pytree2safetensors._tree.keypath import split, string2keypath

SEGMENTS = st.sampled_from([".a", ".", ".ab", "@a", "@", "@ab", "@\\(1)", "#0", "#1", "#\\(0)"])
PATHS = st.lists(SEGMENTS, max_size=4).map(
    lambda found: (
        "".join(found)[1:] if found and found[0][0] == "." and found[0] != "." else "".join(found)
    )
)
# Names in a file may be any strings; those that are not key paths do not count.
ODD_SEGMENTS = SEGMENTS | st.sampled_from(["#01", "#\\(00)", "\\", "\\x", "@\\(x)", "@a\\"])
NAMES = PATHS | st.lists(ODD_SEGMENTS, max_size=4).map("".join)
KINDS = st.sampled_from(["tuple", "None", "dict", "list", "PyTreeContainer"]) | st.builds(
    lambda keys: ["OrderedDict", keys], st.lists(SEGMENTS, max_size=2)
)


def is_true(kinds: dict[str, Any], leaves: dict[str, Any]) -> bool:
    """Whether the claims hold, from the segments of every name."""
    names = {name: split(name) for name in {*leaves, *kinds}}
    for path, kind in kinds.items():
        own = names[path]
        if any(own[: len(names[leaf])] == names[leaf] for leaf in leaves):
            return False
        below = [found for found in names.values() if found[: len(own)] == own and found != own]
        children = {found[len(own)] for found in below}
        word = kind if isinstance(kind, str) else kind[0]
        if word == "tuple":
            fits = all(child[0] == "#" and child[1] != "\\" for child in children)
        elif word == "OrderedDict":
            fits = sorted(children) == sorted(kind[1]) and all(c[0] == "@" for c in children)
        else:
            fits = not children
        if not fits:
            return False
    return True


def is_key_path(name: str) -> bool:
    try:
        string2keypath(name)
    except KeyPathError:
        return False
    return True


@given(st.dictionaries(PATHS, KINDS, max_size=4), st.dictionaries(NAMES, st.just(0), max_size=6))
@example(kinds={"@a": "list"}, leaves={"@a#01": 0})
@example(kinds={"@a": ["OrderedDict", ["@b"]]}, leaves={"@a@b#01": 0})
@example(kinds={r"@a\.b": "list"}, leaves={"@a\\": 0})
@example(kinds={"": ["OrderedDict", ["@a", "@b"]]}, leaves={"@a": 0, "@b@a": 0})
@example(kinds={"a": "tuple", "ab": "tuple"}, leaves={"a#0": 0, "ab#0": 0, "ab": 0})
@example(kinds={"#1": "tuple", "": "tuple"}, leaves={"#1#0": 0, "#12": 0})
@example(kinds={"a": "None"}, leaves={"ab": 0, "a.b": 0})
def test_exactly_the_untrue_claims_are_refused(
    kinds: dict[str, Any], leaves: dict[str, Any]
) -> None:
    if is_true(kinds, {name: 0 for name in leaves if is_key_path(name)}):
        check_nodes(kinds, leaves, "the file")
    else:
        with pytest.raises(FileFormatError, match="the note of the file contradicts its tensors"):
            check_nodes(kinds, leaves, "the file")
