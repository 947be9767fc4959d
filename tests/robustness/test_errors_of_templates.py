"""The messages of errors about templates."""

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pytree2safetensors import (
    Rule,
    WeightsMismatchError,
    dict2pytree,
    load_into_pytree,
    pytree2dict,
    save_pytree,
    set_weights,
)

STORED = {"layer": {"w": np.ones((2, 3), np.float32), "b": np.zeros(3, np.float32)}, "step": 3}
KEEP = "strict=False loads what fits."
CHANGE = f"change the template; {KEEP}"


def changed(**leaves: Any) -> Any:
    """A template that differs from what is stored."""
    return {"layer": {**STORED["layer"], **leaves}, "step": 3}  # type: ignore[dict-item] # a dict


STRUCT = jax.eval_shape(lambda: jnp.zeros(2))
SKIP = 'unexpected="skip" ignores leaves that the template does not have; '
MISMATCHES: list[tuple[Any, dict[str, Any], tuple[int, int, int], str]] = [
    (
        {**STORED, "rate": 0.1},
        {},
        (1, 0, 0),
        "  missing (the template has them):\n    '@rate'\n"
        f"rename= maps names; prefix= selects a subtree; {KEEP}",
    ),
    (
        {"step": 3},
        {},
        (0, 2, 0),
        "  unexpected (the template does not have them):\n    '@layer@b'\n    '@layer@w'\n"
        f"{SKIP}{KEEP}",
    ),
    (
        changed(w=np.ones((3, 2), np.float32)),
        {},
        (0, 0, 1),
        "  mismatched:\n    '@layer@w': the template has float32[3,2], but the stored leaf is float32[2,3]\n"
        f"{CHANGE}",
    ),
    (
        changed(w=np.ones((2, 3), np.float16)),
        {},
        (0, 0, 1),
        "  mismatched:\n    '@layer@w': the template has float16[2,3], but the stored leaf is float32[2,3]\n"
        f"cast=True converts dtypes; {KEEP}",
    ),
    (
        changed(w=np.ones((2, 3), np.int32)),
        {},
        (0, 0, 1),
        "  mismatched:\n    '@layer@w': the template has int32[2,3], but the stored leaf is float32[2,3]\n"
        f"{CHANGE}",
    ),
    (
        changed(w="text"),
        {},
        (0, 0, 1),
        "  mismatched:\n"
        f"    '@layer@w': the template has a Python str, but the stored leaf is float32[2,3]\n{CHANGE}",
    ),
    (
        changed(w=print),
        {},
        (0, 1, 0),
        "  unexpected (the template does not have them):\n"
        f"    '@layer@w' (the template has no array and no number there)\n{SKIP}{KEEP}",
    ),
    (
        {"layer": print, "step": 3},
        {},
        (0, 2, 0),
        "  unexpected (the template does not have them):\n"
        "    '@layer@b' (the template's leaf at '@layer' is not a pytree node)\n"
        f"    '@layer@w' (the template's leaf at '@layer' is not a pytree node)\n{SKIP}{KEEP}",
    ),
    (
        {**STORED, "step": True},
        {},
        (0, 0, 1),
        "  mismatched:\n    '@step': the template has a Python bool, but the stored leaf is a Python int\n"
        f"{CHANGE}",
    ),
    (
        {**STORED, "step": jax.random.key(0)},
        {},
        (0, 0, 1),
        "  mismatched:\n"
        f"    '@step': the template has key<threefry2x32>[], but the stored leaf is a Python int\n{CHANGE}",
    ),
    # All kinds in one report.
    (
        {
            "layer": {"w": np.ones(6, np.float32), "bias": np.zeros(3, np.float32)},
            "stepp": 3,
            "f": abs,
        },
        {},
        (2, 2, 1),
        "  missing (the template has them):\n"
        "    '@layer@bias' (nearest: '@layer@b')\n"
        "    '@stepp' (nearest: '@step')\n"
        "  unexpected (the template does not have them):\n"
        "    '@layer@b'\n"
        "    '@step'\n"
        "  mismatched:\n"
        "    '@layer@w': the template has float32[6], but the stored leaf is float32[2,3]\n"
        "No leaf fits, so strict=False does not help: rename= maps names; prefix= selects "
        "a subtree; change the template.",
    ),
    # No leaf fits.
    (
        {"x": 1},
        {"strict": False},
        (1, 3, 0),
        "  missing (the template has them):\n    '@x'\n"
        "  unexpected (the template does not have them):\n"
        "    '@layer@b'\n    '@layer@w'\n    '@step'\n"
        "No leaf fits, so strict=False does not help: rename= maps names; prefix= selects "
        "a subtree.",
    ),
    *(
        (
            template,
            options,
            (0, 3, 0),
            "  unexpected (the template does not have them):\n"
            "    '@layer@b'\n    '@layer@w'\n    '@step'\n"
            "The template has no array, number or string: pass a model or its shapes, as from "
            "jax.eval_shape, not a class, a function, shardings, or an object whose class is not "
            "registered as a pytree node.",
        )
        for template, options in (({}, {"strict": False}), ({}, {}), (dict, {}), (object(), {}))
    ),
    # What is abstract cannot be kept.
    (
        {**STORED, "new": STRUCT},
        {"strict": False},
        (1, 0, 0),
        "  missing (the template has them):\n    '@new'\n"
        "strict=False keeps the leaves of the template, but an abstract or deleted leaf has no value to keep: "
        "give it one, from an initialized model, or load it.",
    ),
    (
        {**STORED, "new": STRUCT},
        {},
        (1, 0, 0),
        "  missing (the template has them):\n    '@new'\n"
        "rename= maps names; prefix= selects a subtree; strict=False does not help, because an "
        "abstract or deleted leaf has no value to keep: give it one, from an initialized model, or load it.",
    ),
]


@pytest.mark.parametrize("from_file", [True, False], ids=["file", "dictionary"])
@pytest.mark.parametrize(
    ("template", "options", "counts", "text"), MISMATCHES, ids=range(len(MISMATCHES))
)
def test_a_mismatch_is_shown_whole(
    template: Any,
    options: dict[str, Any],
    counts: tuple[int, int, int],
    text: str,
    from_file: bool,
    tmp_path: Path,
) -> None:
    before = jax.tree_util.tree_map(lambda leaf: leaf, template)
    path = tmp_path / "model"
    save_pytree(STORED, path)
    label = repr(str(path)) if from_file else "the dictionary"
    found = dict(sorted(pytree2dict(STORED).items()))
    with pytest.raises(WeightsMismatchError) as caught:
        _ = (
            load_into_pytree(template, path, **options)
            if from_file
            else set_weights(template, found, **options)
        )
    missing, unexpected, mismatched = counts
    head = f"{missing} missing, {unexpected} unexpected, {mismatched} mismatched"
    assert str(caught.value) == f"{label} does not fit the template: {head}\n{text}"
    error = caught.value
    assert (len(error.missing), len(error.unexpected), len(error.mismatched)) == counts
    # Nothing is half applied.
    for old, new in zip(*map(jax.tree_util.tree_leaves, (before, template)), strict=True):
        assert old is new


class Net(NamedTuple):
    w: Any
    layers: list[Any]


@pytest.mark.parametrize(
    ("template", "subtrees"),
    [
        (Net(1, [2]), ", such as '@params' or '@state#0'"),
        ([1], ", such as '@list' or '@params.layers' or '@state#0.layers'"),
        ({"w": 1}, ""),
        ({"x": {"y": 1}}, ", such as '@dict'"),
        ({"y": 1}, ", such as '@dict@x'"),
        (Net(1, [2, 3]), ""),
        (1, ""),
    ],
)
def test_subtrees_that_have_all_leaves_of_a_template_are_named(
    template: Any, subtrees: str, tmp_path: Path
) -> None:
    net = Net(1, [2])
    tree = {"params": net, "state": (net,), "list": [3], "dict": {"x": {"y": 4}}}
    save_pytree(tree, tmp_path / "file")
    with pytest.raises(WeightsMismatchError) as caught:
        load_into_pytree(template, tmp_path / "file")
    assert str(caught.value).splitlines()[-1] == (
        "No leaf fits, so strict=False does not help: rename= maps names; "
        f"prefix= selects a subtree{subtrees}."
    )
    with pytest.raises(WeightsMismatchError, match=r"prefix= selects a subtree\.$"):
        load_into_pytree(template, tmp_path / "file", rename=lambda path: "none" + path)


@pytest.mark.parametrize(
    ("template", "subtrees"),
    [
        ({"params": {"w": 1, "b": 2}}, "'@params'"),
        (Net({"w": 1, "b": 2}, []), "'w'"),
        ([{"w": 1, "b": 2}, {"w": 1, "b": 2}], "'#0' or '#1'"),
    ],
)
def test_subtrees_of_a_template_that_have_all_leaves_of_a_file_are_named(
    template: Any, subtrees: str
) -> None:
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights(template, {"@w": 3, "@b": 4})
    assert str(caught.value).splitlines()[-1] == (
        "No leaf fits, so strict=False does not help: rename= maps names; the names fit the subtree "
        f"of the template at {subtrees}: load into that."
    )


def test_a_source_without_leaves_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_pytree({}, path)
    loads: dict[str, Any] = {
        "the dictionary": lambda: set_weights({"a": 1}, {}),
        repr(str(path)): lambda: load_into_pytree({"a": 1}, path),
    }
    for label, load in loads.items():
        with pytest.raises(WeightsMismatchError) as caught:
            load()
        last = f"No leaf fits, so strict=False does not help: {label} has no leaves."
        assert str(caught.value).splitlines()[-1] == last


def test_a_prefix_without_leaves_is_named() -> None:
    for rename in (None, lambda path: path):
        with pytest.raises(WeightsMismatchError) as caught:
            set_weights({"w": 1}, {"@params@w": 1}, prefix="@param", rename=rename)
        last = "No leaf fits, so strict=False does not help: the dictionary has no leaves below '@param'."
        assert str(caught.value).splitlines()[-1] == last


def test_a_leaf_below_a_prefix_that_is_not_data_is_named() -> None:
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights({"f": print, "w": 1}, {"@m@f": 2, "@m@w": 3}, prefix="@m")
    line = "    '@m@f' (the template has no array and no number there)"
    assert line in str(caught.value).splitlines()


def test_names_without_escapes_are_explained() -> None:
    """Version 0.1.4 escaped nothing."""
    template = {"a\\b": 1, "c.d": {"e#": 2}, "f": 3, "@": 4, "#": 5}
    stored = {"@a\\b": 6, "@c.d@e#": 7, "@f": 8, "@@": 9, "@#": 10}
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights(template, stored)
    assert str(caught.value).splitlines()[-2:] == [
        "rename= maps names; prefix= selects a subtree; strict=False loads what fits.",
        r"pytree2safetensors 0.1.4 escaped nothing: rename={'@\\#': '@#', '@\\@': '@@', "
        r"'@a\\\\b': '@a\\b', ...} loads its names.",
    ]
    names = {r"@\#": "@#", r"@\@": "@@", r"@a\\b": r"@a\b", r"@c\.d@e\#": "@c.d@e#"}
    found = set_weights(template, stored, rename=names)
    assert found == {"a\\b": 6, "c.d": {"e#": 7}, "f": 8, "@": 9, "#": 10}
    # It also helps below a prefix, and for what a mapping forgets, but not with functions and rules.
    below = {"x" + name: value for name, value in stored.items()}
    texts = []
    rename: Any
    for rename in (None, {r"@a\\b": r"@a\b"}, lambda path: path, [Rule("{*}", "{*}")]):
        with pytest.raises(WeightsMismatchError) as caught:
            set_weights(
                template, stored if rename else below, prefix="" if rename else "x", rename=rename
            )
        texts.append(str(caught.value).splitlines()[-1])
    assert [("0.1.4" in text) for text in texts] == [True, True, False, False]
    # And not with names that other leaves have.
    others: list[tuple[Any, Any]] = [
        ({r"a\b": 1, "f": 2}, {"@f": 1, "@g": 2}),
        ({"a@b": 1, "a": {"b": 2}}, {"@a@b": 5}),
    ]
    for template, stored in others:
        with pytest.raises(WeightsMismatchError) as caught:
            set_weights(template, stored)
        assert "0.1.4" not in str(caught.value)


def test_a_rule_is_offered_for_names_that_are_joined_with_dots() -> None:
    template = {"layers": [{"w": 1}, {"w": 2}]}
    stored = {"layers.0.w": 3, "layers.1.w": 4, "more": 5}
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights(template, stored)
    assert str(caught.value).splitlines()[-1] == (
        'No leaf fits, so strict=False does not help: rename=[Rule("{*}", "{*}")] maps names that are '
        "joined with dots."
    )
    rules = [Rule("{*}", "{*}")]
    loaded = set_weights(template, stored, rename=rules, unexpected="skip")
    assert loaded == {"layers": [{"w": 3}, {"w": 4}]}
    with pytest.raises(WeightsMismatchError, match="rename= maps names; prefix= selects"):
        set_weights({"x": {"w": 1}, "y": 2}, {"x.w": 3})


def test_the_lists_name_every_leaf() -> None:
    found = {f"@new{i:05}": 1 for i in range(10_000)} | {f"@{i:05}": 1 for i in range(10_000)}
    template = {f"{i:05}": "text" for i in range(10_000)} | {f"old{i:05}": 1 for i in range(10_000)}
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights(template, found)
    assert list(caught.value.missing) == [f"@old{i:05}" for i in range(10_000)]
    assert list(caught.value.unexpected) == [f"@new{i:05}" for i in range(10_000)]
    assert [line.split(":")[0] for line in caught.value.mismatched] == [
        f"'@{i:05}'" for i in range(10_000)
    ]
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("10000 missing, 10000 unexpected, 10000 mismatched")
    assert lines.count("    ... and 9,980 more") == 3
    assert len(lines) == 1 + 3 * 22 + 1
    assert len(str(caught.value)) < 6000
    assert lines[2] == "    '@old00000' (nearest: '@new00000')"
    assert lines[22] == "    ... and 9,980 more"


def test_long_names_are_shortened() -> None:
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights({"x" * 100_000: 1}, {"@" + "y" * 100_000: 1})
    assert len(str(caught.value)) < 1500
    assert "(100,001 characters)" in str(caught.value)


def test_names_are_escaped_in_messages() -> None:
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights({"\x1b[31m": 1}, {"@\u202e\n": 1})
    assert r"'@\x1b[31m'" in str(caught.value)
    assert r"'@\u202e\n'" in str(caught.value)
    assert str(caught.value).replace("\n", "").isprintable()


NEAREST = [
    ("layers#10@query", ["layers#2@key", "layers#10@qvery", "head"], "layers#10@qvery"),
    ("decoder.w", ["encoder.w", "x"], "encoder.w"),
    ("w", ["completely.different"], None),
]


@pytest.mark.parametrize(("wanted", "there", "nearest"), NEAREST)
def test_the_nearest_name_is_shown(wanted: str, there: list[str], nearest: str | None) -> None:
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights(dict2pytree({wanted: 1}), dict.fromkeys(there, 1))
    line = str(caught.value).splitlines()[2].strip()
    assert line == f"{wanted!r}" + (f" (nearest: {nearest!r})" if nearest else "")


def test_a_key_is_shown_without_its_values(tmp_path: Path) -> None:
    save_pytree({"a": jax.random.key(0)}, tmp_path / "file")
    with pytest.raises(WeightsMismatchError) as caught:
        load_into_pytree({"a": np.zeros(2, np.float32)}, tmp_path / "file")
    assert caught.value.mismatched == (
        "'@a': the template has float32[2], but the stored leaf is key<threefry2x32>[]",
    )


def test_errors_below_a_prefix_name_the_leaves_of_the_template(tmp_path: Path) -> None:
    save_pytree({"model": {"weight": 1.0, "new": 1}}, tmp_path / "model")
    with pytest.raises(WeightsMismatchError) as caught:
        load_into_pytree({"weight": "", "b": 1.0}, tmp_path / "model", prefix="@model")
    assert str(caught.value).splitlines()[1:] == [
        "  missing (the template has them):",
        "    '@b': there is no '@model@b' (nearest: '@model@new')",
        "  unexpected (the template does not have them):",
        "    '@model@new'",
        "  mismatched:",
        "    '@weight': the template has a Python str, but the stored leaf '@model@weight' is a Python "
        "float",
        "No leaf fits, so strict=False does not help: rename= maps names; change the template.",
    ]
    assert (caught.value.missing, caught.value.unexpected) == (("@b",), ("@model@new",))


KEEPING = """
import sys
import pytree2safetensors
try:
    pytree2safetensors.load_into_pytree({"w": 1.5}, sys.argv[1])
except ValueError as error:
    kept = error  # with the open file in its traceback
"""


@pytest.mark.parametrize(
    "rename", [{"@w": "@weight"}.__getitem__, {"@w": "@weight"}, [Rule("@weight", "@w")]]
)
def test_names_that_lack_the_prefix_get_a_hint(rename: Any, tmp_path: Path) -> None:
    save_pytree({"params": {"weight": 1.0}}, tmp_path / "model")
    hint = "names from rename= are whole names; begin them with '@params'"
    with pytest.raises(WeightsMismatchError, match="1 missing") as caught:
        load_into_pytree({"w": 0.0}, tmp_path / "model", prefix="@params", rename=rename)
    assert f"\nNo leaf fits, so strict=False does not help: {hint}" in str(caught.value)
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights({"w": 0.0}, {"@params@other": 1.0}, prefix="@params", rename=rename)
    assert hint not in str(caught.value)


def test_an_error_that_a_program_keeps_until_it_exits_prints_nothing(tmp_path: Path) -> None:
    save_pytree({"v": 1.5}, tmp_path / "model")
    command = [sys.executable, "-c", KEEPING, str(tmp_path / "model")]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert (found.stdout, found.stderr) == ("", "")


def test_a_stored_key_says_what_template_it_needs(tmp_path: Path) -> None:
    save_pytree({"k": jax.random.key(0)}, tmp_path / "m")
    with pytest.raises(
        WeightsMismatchError,
        match=r"put a key in the template, such as jax\.random\.key\(0, impl='threefry2x32'\)",
    ):
        load_into_pytree({"k": np.zeros(2, np.uint32)}, tmp_path / "m")
