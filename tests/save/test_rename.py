"""Saving under other names: ties, errors and their messages. The law is in test_rules."""

import io
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from oracle import assert_same, assert_same_values
from pytree2safetensors import (
    FileFormatError,
    Rule,
    UnsupportedLeafError,
    WeightsMismatchError,
    load_file,
    load_into_pytree,
    load_metadata,
    load_pytree,
    pytree2dict,
    save_pytree,
    save_pytree_async,
)
from pytree2safetensors._leaves.renaming import rules_in
from pytree2safetensors._save import renamed

TRANSPOSED = Rule("{*}.weight", "{*}.kernel", "o i -> i o")
STRUCT: Any = jax.eval_shape(lambda: np.float32(0))
CHARACTERS = st.characters(categories=["L", "P", "Z", "Cc", "Cs"])  # with lone surrogates
FUSED = Rule("kv", "{p:k,v}", "(p o) i -> i o")
KERNEL = np.arange(6, dtype=np.float32).reshape(2, 3)


def saved(tree: Any, rename: Any, path: Path, **options: Any) -> dict[str, Any]:
    save_pytree(tree, path, rename=rename, **options)
    with safetensors.safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in load_file(path)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_a_renamed_file_has_no_note(path: Path) -> None:
    tree = {
        "a": {"kernel": jnp.asarray(KERNEL)},
        "steps": 3,
        "rate": 0.5,
        "on": True,
        "w": jnp.ones(()),
        "weak": jnp.asarray(2.0),
    }
    rename = [TRANSPOSED, Rule("{*}", "{*}")]
    found = saved(tree, rename, path, metadata={"format": "pt"})
    assert load_metadata(path) == {"format": "pt"}
    assert_same(
        found,
        {
            "a.weight": np.ascontiguousarray(KERNEL.T),
            "on": np.array(True),
            "rate": np.array(0.5),
            "steps": np.array(3),
            "w": np.ones((), np.float32),
            "weak": np.array(2.0, np.float32),
        },
    )


@pytest.mark.parametrize(
    "rename", [{"@w": "weight"}, lambda path: {"@w": "weight"}.get(path, path)]
)
def test_names_may_come_from_a_mapping_or_a_function(rename: Any, path: Path) -> None:
    tree = {"w": KERNEL, "b": KERNEL[0]}
    assert_same(saved(tree, rename, path), {"@b": KERNEL[0], "weight": KERNEL})
    assert_same(pytree2dict(tree, rename=rename), {"@b": KERNEL[0], "weight": KERNEL})


def test_a_function_that_gives_no_name_is_refused(path: Path) -> None:
    with pytest.raises(
        TypeError, match="rename= gives '@w' a name of type int, but a name must be a str"
    ):
        save_pytree({"w": 1.0}, path, rename=lambda _: 3)  # type: ignore[arg-type] # what is tested


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("__metadata__", "a name that the header uses for the metadata"),
        ("a\ud800", "a name that holds a lone surrogate and has no UTF-8 form"),
    ],
)
@pytest.mark.parametrize("kind", [Rule, dict])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": 4}])
def test_names_that_no_header_can_hold_are_refused(
    name: str, reason: str, kind: Any, options: Any, path: Path
) -> None:
    save_pytree({"old": 1}, path)
    rename: Any = [Rule("b", "b"), Rule(name, "a")] if kind is Rule else {"@a": name}
    message = f"'@a' would be stored as {name!r}, {reason}; give it another name"
    with pytest.raises(FileFormatError, match=f"^{re.escape(message)}$"):
        save_pytree({"a": KERNEL, "b": KERNEL}, path, rename=rename, **options)
    assert load_pytree(path) == {"old": 1}
    assert [*path.parent.iterdir()] == [path]


@given(st.lists(st.text(CHARACTERS) | st.just("__metadata__"), min_size=2, max_size=2))
def test_what_a_save_under_any_names_accepts_loads(names: list[str]) -> None:
    rename = dict(zip(("@a", "@b"), names, strict=True))
    tree = {"a": KERNEL, "b": KERNEL + 1}
    file = io.BytesIO()
    try:
        save_pytree(tree, file, rename=rename, checksum=True)
    except FileFormatError:
        assert not file.getvalue()
        return
    file.seek(0)
    assert_same(load_into_pytree(tree, file, rename=rename), tree)


def test_leaves_without_a_name_are_not_saved(path: Path) -> None:
    tree = {"act": jax.nn.relu, "w": KERNEL}
    rename = [Rule(None, "act"), Rule("{=}", "{=}")]
    assert_same(saved(tree, rename, path), {"@w": KERNEL})
    assert_same(pytree2dict(tree, rename=rename), {"@w": KERNEL})


def test_shards_have_the_names_of_the_rules(path: Path) -> None:
    tree = {"layers": {"kernel": np.zeros((4, 2, 3), np.float32)}}
    rename = [Rule("h.{l}.weight", "layers.kernel", "o i -> l i o")]
    save_pytree(tree, path.parent / "out", rename=rename, max_shard_size=60)
    files = sorted(file.name for file in (path.parent / "out").iterdir())
    assert len(files) == 3
    names = [name for file in files[:2] for name in load_file(path.parent / "out" / file)]
    assert sorted(names) == ["h.0.weight", "h.1.weight", "h.2.weight", "h.3.weight"]


def test_background_saves_copy_each_leaf_once(path: Path) -> None:
    stacked = np.zeros((4, 2, 3), np.float32)
    rename = [Rule("h.{l}.weight", "layers", "o i -> l i o")]
    future = save_pytree_async({"layers": stacked}, path, rename=rename)
    stacked[:] = 1
    future.result()
    assert not any(np.any(values) for values in load_file(path).values())


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_leaves_without_axes_are_parts_of_a_tensor(kind: Any, path: Path) -> None:
    tree = [kind(np.float32(number)) for number in range(3)]
    found = saved(tree, [Rule("w", "#{l}", "l -> ")], path)
    assert_same_values(found["w"], np.arange(3, dtype=np.float32))


# --- ties -------------------------------------------------------------------------------------

TIED = [Rule("embed", "embed"), Rule("embed", "head", "v e -> e v")]


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_equal_leaves_may_be_one_tensor(kind: Any, path: Path) -> None:
    tree = {"embed": kind(KERNEL), "head": kind(KERNEL.T)}
    assert_same(saved(tree, TIED, path), {"embed": KERNEL})
    np.testing.assert_array_equal(pytree2dict(tree, rename=TIED)["embed"], KERNEL)


def test_leaves_that_are_one_tensor_and_differ_are_refused(path: Path) -> None:
    other = KERNEL.T.copy()
    other[0, 1] = np.nan
    text = (
        "'@embed' and '@head' are both stored as 'embed', but they differ; give one of them another "
        "name, or leave it out with Rule(None, path)"
    )
    for function in (
        lambda tree: save_pytree(tree, path, rename=TIED),
        lambda tree: pytree2dict(tree, rename=TIED),
    ):
        for head in (other, KERNEL.T.astype(np.float64), KERNEL.T[:, :1]):
            with pytest.raises(FileFormatError) as caught:
                function({"embed": KERNEL, "head": head})
            assert str(caught.value) == text
    assert not path.exists()


@pytest.mark.parametrize("rename", [lambda _: "w", {"@a": "w", "@b": "w"}])
def test_other_names_than_those_of_rules_leave_no_leaf_out(rename: Any, path: Path) -> None:
    tree = {"a": KERNEL, "b": KERNEL + 1}
    for function in (
        lambda: save_pytree(tree, path, rename=rename),
        lambda: pytree2dict(tree, rename=rename),
    ):
        with pytest.raises(FileFormatError) as caught:
            function()
        assert str(caught.value) == (
            "'@a' and '@b' are both stored as 'w', but they differ; give one of them another name, or "
            "take it out of the tree"
        )
    with pytest.raises(UnsupportedLeafError) as refused:
        save_pytree({"a": "x"}, path, rename=rename)
    last = "Convert them, take them out of the tree, or save without rename=."
    assert str(refused.value).splitlines()[-1] == last
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pytree2safetensors._save.renamed.is_global", lambda _: True)
        with pytest.raises(FileFormatError, match=r"; take one of them out of the tree$"):
            save_pytree(tree | {"b": KERNEL.copy()}, path, rename=rename)


@pytest.mark.parametrize("place", [0, -1])
def test_large_leaves_that_are_one_tensor_and_differ_in_one_place_are_refused(
    path: Path, place: int
) -> None:
    embed = np.zeros((1 << 12, 1 << 11), np.float32)
    other = embed.T.copy()
    other[place, place] = 1
    with pytest.raises(FileFormatError, match="both stored as 'embed', but they differ"):
        save_pytree({"embed": embed, "head": other}, path, rename=TIED)
    assert not path.exists()


def test_leaves_that_are_rearranged_alike_and_differ_are_refused(path: Path) -> None:
    rename = [Rule("w", name, "v e -> e v") for name in ("a", "b")]
    with pytest.raises(FileFormatError, match="'@a' and '@b' are both stored as 'w', but they"):
        save_pytree({"a": KERNEL, "b": KERNEL + 1}, path, rename=rename)
    square = KERNEL[:, :2].copy()
    rename[0] = Rule("w", "a")
    with pytest.raises(FileFormatError, match="'@a' and '@b' are both stored as 'w', but they"):
        save_pytree({"a": square, "b": square}, path, rename=rename)


def test_values_that_are_not_numbers_may_be_tied(path: Path) -> None:
    tree = {
        "embed": np.full((2, 3), np.nan, np.float32),
        "head": np.full((3, 2), np.nan, np.float32),
    }
    assert saved(tree, TIED, path)["embed"].shape == (2, 3)


# --- what is refused --------------------------------------------------------------------------


def test_leaves_without_a_place_are_refused(path: Path) -> None:
    tree = {"a": {"kernel": KERNEL[0]}, "b": {"bias": KERNEL[0]}, "c": {"kernel": 1.0}}
    idle = Rule("running.{p}", "mean.{p}")
    for function in (
        lambda: save_pytree(tree, path, rename=[TRANSPOSED, idle]),
        lambda: pytree2dict(tree, rename=[TRANSPOSED, idle]),
    ):
        with pytest.raises(WeightsMismatchError) as caught:
            function()
        assert str(caught.value).splitlines() == [
            "rename= does not fit the tree:",
            f"    '@a@kernel': it has 1 axis, and {TRANSPOSED!r} gives it 2",
            "    '@b@bias', dotted 'b.bias': no rule has this path",
            f"    '@c@kernel': {TRANSPOSED!r} rearranges axes, and this leaf is not an array of numbers",
            "  rules that no leaf of the tree uses:",
            f"    {idle!r}",
            'As the last rule, Rule("{=}", "{=}") stores leaves under their own names; '
            "Rule(None, path) leaves one out.",
        ]
        assert caught.value.missing == ("@b@bias",)
        assert [line.split(":")[0] for line in caught.value.mismatched] == [
            "'@a@kernel'",
            "'@c@kernel'",
        ]
    assert not path.exists()


def test_names_of_their_own_are_offered_only_to_leaves_without_a_rule() -> None:
    with pytest.raises(WeightsMismatchError) as caught:
        pytree2dict({"a": {"kernel": KERNEL[0]}}, rename=[TRANSPOSED])
    assert str(caught.value).splitlines() == [
        "rename= does not fit the tree:",
        f"    '@a@kernel': it has 1 axis, and {TRANSPOSED!r} gives it 2",
        "Change the rule, or put Rule(None, path) before it to leave the leaf out.",
    ]


def test_a_long_list_is_cut(path: Path) -> None:
    with pytest.raises(WeightsMismatchError) as caught:
        save_pytree([1.0] * 23, path, rename=[])
    assert str(caught.value).splitlines()[-3:-1] == [
        "    '#19', dotted '19': no rule has this path",
        "    ... and 3 more",
    ]
    assert len(caught.value.missing) == 23


def test_parts_of_a_tensor_must_all_be_there(path: Path) -> None:
    rule = Rule("qkv", "{p:q,k,v}", "(p h) e -> h e")
    with pytest.raises(WeightsMismatchError, match="cuts a tensor, and its part 'v' is not there"):
        save_pytree({"q": KERNEL, "k": KERNEL}, path, rename=[rule])


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_parts_of_a_tensor_must_have_one_dtype(kind: Any, path: Path) -> None:
    rule = Rule("qkv", "{p:q,k,v}", "(p h) e -> h e")
    tree = {"q": kind(KERNEL), "k": kind(KERNEL).astype("bfloat16"), "v": kind(KERNEL)}
    tree["bias"] = kind(np.zeros(2, np.float16))  # no rule joins this leaf with another
    rules = [rule, Rule("{=}", "{=}")]
    for function in (
        lambda: save_pytree(tree, path, rename=rules),
        lambda: pytree2dict(tree, rename=rules),
    ):
        with pytest.raises(WeightsMismatchError) as caught:
            function()
        reason = f"{rule!r} joins it, a leaf of float32, with '@k' of bfloat16"
        assert caught.value.mismatched == (f"'@q': {reason}", f"'@v': {reason}")
    assert not path.exists()
    del tree["bias"]
    swapped = {name: KERNEL.astype(">f4" if name == "k" else "<f4") for name in tree}
    np.testing.assert_array_equal(saved(swapped, [rule], path)["qkv"], np.vstack([KERNEL] * 3))


def test_a_leaf_with_another_dtype_in_several_tensors_is_listed_once(path: Path) -> None:
    rule = Rule("w.{n}", "{p:a,b}", "(p x) -> n x")
    tree = {"a": np.zeros((2, 3), np.float32), "b": np.zeros((2, 3), np.float16)}
    with pytest.raises(WeightsMismatchError) as caught:
        save_pytree(tree, path, rename=[rule])
    reason = f"{rule!r} joins it, a leaf of float16, with '@a' of float32"
    assert caught.value.mismatched == (f"'@b': {reason}",)


def test_an_array_that_needs_a_note_is_refused_whatever_its_rule_is(path: Path) -> None:
    for dtype in ("complex128", "int4"):
        with pytest.raises(UnsupportedLeafError, match=f"'@w@kernel': {dtype}"):
            save_pytree({"w": {"kernel": np.ones((2, 3), dtype)}}, path, rename=[TRANSPOSED])


def test_leaves_that_a_tensor_does_not_tell_are_refused(path: Path) -> None:
    tree = {
        "big": 2**70,
        "complex": 1j,
        "int4": np.zeros(2, "int4"),
        "key": jax.random.key(0),
        "name": "x",
        "wide": np.zeros(2, np.complex128),
    }
    with pytest.raises(UnsupportedLeafError) as caught:
        save_pytree(tree, path, rename=[Rule("{=}", "{=}")])
    assert str(caught.value).splitlines() == [
        "6 leaves of the tree need a note, which a file saved with rename= does not have:",
        "    '@big': int",
        "    '@complex': complex",
        "    '@int4': int4",
        "    '@key': key",
        "    '@name': str",
        "    '@wide': complex128",
        "Convert them, leave them out with Rule(None, path), or save without rename=.",
    ]
    assert not path.exists()


def test_leaves_that_a_file_cannot_hold_are_refused_or_left_out(path: Path) -> None:
    tree = {"act": jax.nn.relu, "w": KERNEL}
    rename = [Rule("{*}", "{*}")]
    with pytest.raises(UnsupportedLeafError, match="'@act': "):
        save_pytree(tree, path, rename=rename)
    assert_same(saved(tree, rename, path, unsupported="skip"), {"w": KERNEL})
    with pytest.raises(UnsupportedLeafError, match="Only concrete arrays can be saved"):
        save_pytree({"w": STRUCT}, path, rename=rename, unsupported="skip")


@pytest.mark.parametrize("unsupported", ["raise", "skip"])
def test_arrays_without_values_are_refused_also_if_a_rule_rearranges_them(
    path: Path, unsupported: Any
) -> None:
    deleted = jnp.zeros((2, 3))
    deleted.delete()
    with pytest.raises(UnsupportedLeafError, match="'@v' was deleted or donated"):
        save_pytree({"k": KERNEL, "v": deleted}, path, rename=[FUSED], unsupported=unsupported)
    with pytest.raises(UnsupportedLeafError, match="Only concrete arrays can be saved"):
        save_pytree({"k": KERNEL, "v": STRUCT}, path, rename=[FUSED], unsupported=unsupported)


@pytest.mark.parametrize("unsupported", ["raise", "skip"])
def test_a_rule_leaves_out_arrays_without_values(path: Path, unsupported: Any) -> None:
    deleted = jnp.zeros(4)
    deleted.delete()
    tree = {"deleted": deleted, "struct": STRUCT, "w": KERNEL}
    rename = [Rule(None, "deleted"), Rule(None, "struct"), Rule("{=}", "{=}")]
    assert_same(saved(tree, rename, path, unsupported=unsupported), {"@w": KERNEL})
    with pytest.raises(UnsupportedLeafError, match="'@deleted' was deleted or donated"):
        save_pytree(tree, path, rename=rename[1:], unsupported=unsupported)
    with pytest.raises(UnsupportedLeafError, match="'@struct'"):
        save_pytree(tree, path, rename=[rename[0], rename[2]], unsupported=unsupported)


def test_a_flat_dict_may_be_made_under_a_trace() -> None:
    @jax.jit
    def traced(tree: Any) -> Any:
        return pytree2dict(tree, rename=TIED)

    found = traced({"embed": KERNEL, "head": KERNEL.T})
    assert_same(jax.device_get(found), {"embed": KERNEL})


@pytest.mark.parametrize("of", ["embed", "head"])
def test_tied_global_arrays_are_not_compared(of: str, path: Path) -> None:
    tree = {"embed": KERNEL, "head": KERNEL.T}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pytree2safetensors._save.renamed.is_global", lambda leaf: leaf is tree[of])
        with pytest.raises(FileFormatError) as caught:
            save_pytree(tree, path, rename=TIED)
    assert str(caught.value) == (
        "'@embed' and '@head' are both stored as 'embed', but they are spread over several "
        "processes, which cannot compare them; leave one of them out with Rule(None, path)"
    )


def test_a_flat_dict_does_not_compare_what_processes_hold_parts_of() -> None:
    tree = {"embed": KERNEL, "head": KERNEL.copy()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pytree2safetensors._save.flat_dict.is_global", lambda _: True)
        with pytest.raises(FileFormatError, match="they are spread over several processes, which"):
            pytree2dict(tree, rename=lambda _: "w")
        empty = {"a": KERNEL[:0], "b": KERNEL[:0].copy()}
        assert_same(pytree2dict(empty, rename=lambda _: "w"), {"w": KERNEL[:0]})


@pytest.mark.parametrize("pattern", ["(p o) i -> o i", "p o i -> o i"])
def test_parts_without_values_need_no_comparison(pattern: str, path: Path) -> None:
    tree = {"q": np.zeros((0, 3), np.float32), "k": np.zeros((0, 3), np.float32)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pytree2safetensors._save.renamed.is_global", lambda _: True)
        save_pytree(tree, path, rename=[Rule("qk", "{p:q,k}", pattern)])
    assert load_file(path)["qk"].size == 0


def test_one_array_at_two_paths_needs_no_comparison(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pytree2safetensors._save.renamed.is_global", lambda _: True)
        save_pytree({"a": KERNEL, "b": KERNEL}, path, rename=lambda _: "w")
    assert_same(load_file(path)["w"], jnp.asarray(KERNEL))


def test_a_sequence_of_something_else_than_rules_is_refused() -> None:
    wrong: Any = [TRANSPOSED, 3]
    with pytest.raises(TypeError, match="a function, a mapping of names or a sequence of Rules"):
        rules_in(wrong)


def test_leaves_on_two_devices_make_one_tensor() -> None:
    first, second = (jax.device_put(KERNEL + n, jax.devices()[n]) for n in range(2))
    for tree in ({"w.0": first, "w.1": second}, {"w.0": first, "w.1": jnp.asarray(KERNEL + 1)}):
        [found] = pytree2dict(tree, rename=[Rule("w", "@w\\.{p}", "(p a) b -> a b")]).values()
        assert_same_values(found, np.concatenate([KERNEL, KERNEL + 1]))


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_one_leaf_at_two_paths_is_compared_with_nothing(
    kind: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compared(_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(renamed, "assembled_chunks", compared)
    leaf = kind(np.array([np.nan, 1], np.float32))
    found = saved({"embed": leaf, "head": leaf}, [Rule("w", "embed"), Rule("w", "head")], path)
    assert_same_values(found["w"], np.asarray(leaf))


WHOLE = np.arange(12, dtype=np.float32).reshape(6, 2)
THIRDS = {name: WHOLE[start : start + 2] for start, name in ((0, "q"), (2, "k"), (4, "v"))}
JOINED = Rule("qkv", "{p:q,k,v}", "(p o) i -> o i")


@pytest.mark.parametrize(
    "rule",
    [
        Rule("h.{a}{b}", "w", "c -> a b c"),
        Rule("h.{a+b}", "w", "c -> a b c"),
        Rule("h{a}{p:,0}{b}", "w", "c -> a b (p c)"),
    ],
)
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_parts_of_a_leaf_that_get_one_name_must_be_equal(rule: Rule, kind: Any, path: Path) -> None:
    different = {"w": kind(np.arange(288, dtype=np.float32).reshape(12, 12, 2))}
    for function in (
        lambda: save_pytree(different, path, rename=[rule]),
        lambda: pytree2dict(different, rename=[rule]),
    ):
        with pytest.raises(FileFormatError, match="two parts of '@w' are both stored as 'h") as got:
            function()
        assert "but they differ" in str(got.value)
    equal = {"w": kind(np.ones((12, 12, 2), np.float32))}
    assert_same(saved(equal, [rule], path), jax.device_get(pytree2dict(equal, rename=[rule])))
    assert_same(load_into_pytree(equal, path, rename=[rule]), equal)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_a_tensor_may_be_a_leaf_and_parts_of_others(kind: Any, path: Path) -> None:
    tree = {name: kind(leaf) for name, leaf in {**THIRDS, "qkv": WHOLE}.items()}
    rules = [Rule("qkv", "qkv"), JOINED]
    assert_same(saved(tree, rules, path), {"qkv": WHOLE})
    assert_same(load_into_pytree(tree, path, rename=rules), tree)
    with pytest.raises(FileFormatError, match="'@k' and '@qkv' are both stored as 'qkv', but they"):
        save_pytree({**tree, "k": tree["q"]}, path, rename=rules)


def test_two_rules_may_cut_one_tensor(path: Path) -> None:
    tree = {name: {"x": leaf, "y": leaf.copy()} for name, leaf in THIRDS.items()}
    rules = [Rule("qkv", f"{{p:q,k,v}}.{end}", "(p o) i -> o i") for end in "xy"]
    assert_same(saved(tree, rules, path), {"qkv": WHOLE})
    tree["v"]["y"] = tree["q"]["x"]
    with pytest.raises(FileFormatError, match="are both stored as 'qkv', but they differ"):
        save_pytree(tree, path, rename=rules)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("empty", "qkv")
def test_a_part_of_a_tensor_may_be_empty(kind: Any, empty: str, path: Path) -> None:
    tree = {name: kind(leaf[:0] if name == empty else leaf) for name, leaf in THIRDS.items()}
    whole = np.concatenate([np.asarray(tree[name]) for name in "qkv"])
    assert_same(saved(tree, [JOINED], path), {"qkv": whole})
    assert_same(jax.device_get(pytree2dict(tree, rename=[JOINED])), {"qkv": whole})


def test_large_tied_leaves_are_compared_however_they_are_read(path: Path) -> None:
    whole = np.arange(3_000_000, dtype=np.float32).reshape(3000, 1000)
    tree = {"a": whole, "b": whole.reshape(30, 100, 1000).copy()}
    rules = [Rule("w", "a"), Rule("w", "b", "(h d) e -> h d e")]
    assert_same(saved(tree, rules, path), {"w": whole})
    tree["b"][-1, -1, -1] = 0
    with pytest.raises(
        FileFormatError, match="'@a' and '@b' are both stored as 'w', but they diff"
    ):
        save_pytree(tree, path, rename=rules)


def test_numbers_may_be_far_apart(path: Path) -> None:
    tree = {0: KERNEL[0], 10**15: KERNEL[0]}
    with pytest.raises(WeightsMismatchError, match="its part '1' is not there"):
        save_pytree(tree, path, rename=[Rule("w", "{l}", "l a -> a")])


@pytest.mark.parametrize("kind", [float, np.float32, np.array])
def test_equal_scalars_may_have_one_name(kind: Any, path: Path) -> None:
    assert saved({"a": kind(1.5), "b": kind(3 / 2)}, lambda _: "w", path)["w"] == 1.5
    with pytest.raises(
        FileFormatError, match="'@a' and '@b' are both stored as 'w', but they differ"
    ):
        save_pytree({"a": kind(1.5), "b": kind(2.5)}, path, rename=lambda _: "w")
