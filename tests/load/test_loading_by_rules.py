"""Loading by rules: errors, their messages, and what is read. The law is in laws/test_rules."""

import os
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from oracle import assert_same, assert_same_values
from pytree2safetensors import (
    FileFormatError,
    Rule,
    WeightsMismatchError,
    explain,
    load_into_pytree,
    save_pytree,
    set_weights,
)
from pytree2safetensors._leaves import regions
from pytree2safetensors._load import plan, reading
from pytree2safetensors._storage.byte_source import ByteSource

P: Any = PartitionSpec  # JAX gives its constructor no types
STRUCT: Any = jax.ShapeDtypeStruct


def zeros(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def numbers(*shape: int) -> Any:
    return np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def refusal(
    template: Any, file: dict[str, Any], rules: list[Rule], **options: Any
) -> WeightsMismatchError:
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights(template, file, rename=rules, **options)
    return caught.value


@pytest.mark.parametrize(("pattern", "times"), [("o i -> i o", 2), ("o i -> o i", 1)])
def test_a_leaf_that_is_reordered_takes_twice_its_size(
    path: Path, pattern: str, times: int
) -> None:
    stored = numbers(2048, 1024)
    save_pytree({"w": stored}, path)
    template = {"w": zeros(*stored.shape[:: -1 if times == 2 else 1])}
    rules = [Rule("@w", "w", pattern)]
    load_into_pytree(template, path, rename=rules)  # what the first load keeps does not count
    tracemalloc.start()
    try:
        load_into_pytree(template, path, rename=rules)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Windows has no positioned reads: what is read there is copied.
    copied = 0 if hasattr(os, "preadv") else 1
    assert times <= peak / stored.nbytes < times + copied + 0.5


NO_LAYERS = np.zeros((0, 3, 2), np.float32)


@pytest.mark.parametrize(
    "leaf", [NO_LAYERS, jax.numpy.asarray(NO_LAYERS), STRUCT((0, 3, 2), np.float32)]
)
@pytest.mark.parametrize("cast", [False, True])
def test_a_stack_may_have_no_tensors(path: Path, leaf: Any, cast: bool) -> None:
    rules = [Rule("h.{l}.w", "w", "o i -> l i o"), Rule("b", "b")]
    file = {"b": numbers(2)}
    tree = {"w": NO_LAYERS, "b": file["b"]}
    template = {"w": leaf, "b": file["b"]}
    save_pytree(tree, path, rename=rules)
    assert safetensors.numpy.load_file(path).keys() == {"b"}
    for found in (
        load_into_pytree(template, path, rename=rules, cast=cast),
        set_weights(template, file, rename=rules, cast=cast),
    ):
        assert isinstance(found["w"], np.ndarray if leaf is NO_LAYERS else jax.Array)
        assert_same({**found, "w": np.asarray(found["w"])}, tree)
    lines = explain(template, path, rename=rules).splitlines()
    assert lines[0] == f"{str(path)!r}: 2 of 2 leaves fit"
    assert "  fits  '@w' = 'w'  float32[0,3,2]  no tensors  'o i -> l i o'" in lines


def test_a_stack_of_no_tensors_that_does_not_fit_has_no_origin() -> None:
    template = {"w": STRUCT((0, 3, 2), np.dtype("M8[s]")), "b": numbers(2)}
    rules = [Rule("h.{l}.w", "w", "o i -> l i o"), Rule("b", "b")]
    with pytest.raises(WeightsMismatchError, match="but the stored leaf is datetime64"):
        set_weights(template, {"b": numbers(2)}, rename=rules)


# --- what does not fit ------------------------------------------------------------------------


def test_all_that_does_not_fit_is_listed() -> None:
    rules = [
        Rule("h.{l}.q.weight", "layers.{l}.q", "(h d) e -> e h d"),
        Rule("h.{l}.o.weight", "layers.{l}.o"),
        Rule("gone.{l}", "layers.{l}.gone"),
        Rule("idle.{p}", "idle.{p}"),
        Rule("vision.{*}", None),
    ]
    template = {
        "layers": [
            {"q": zeros(6, 2, 8), "o": zeros(6, 16), "gone": zeros(1)},
            {"q": zeros(6, 2, 8), "new": zeros(1)},
        ]
    }
    file = {
        "h.0.q.weight": zeros(16, 5),
        "h.0.o.weight": zeros(16, 6),
        "h.1.qq.weight": zeros(16, 6),
        "vision.0": zeros(1),
        "rest": zeros(1),
    }
    error = refusal(template, file, rules)
    assert str(error).splitlines() == [
        "the dictionary does not fit the template: 3 missing, 2 unexpected, 2 mismatched",
        "  missing (the template has them):",
        "    '@layers#0@gone': there is no 'gone.0'",
        "    '@layers#1@new', dotted 'layers.1.new': no rule has this path",
        "    '@layers#1@q': there is no 'h.1.q.weight' (nearest: 'h.1.qq.weight')",
        "  unexpected (the template does not have them):",
        "    'h.1.qq.weight'",
        "    'rest'",
        "  mismatched:",
        "    '@layers#0@o': the template has float32[6,16], but the stored leaf 'h.0.o.weight' is "
        f"float32[16,6]; this is the transpose, so give {rules[1]!r} the pattern 'o i -> i o'",
        f"    '@layers#0@q': the template has float32[6,2,8]; under {rules[0]!r}, the tensor 'h.0.q.weight' "
        "would be [16,6], but it is float32[16,5]",
        "  rules that no leaf of the template uses:",
        "    Rule('idle.{p}', 'idle.{p}')",
        "No leaf fits, so strict=False does not help: Rule(None, path) keeps a leaf of the template; "
        "change the rules or the template.",
    ]
    assert error.missing == ("@layers#0@gone", "@layers#1@new", "@layers#1@q")
    assert error.unexpected == ("h.1.qq.weight", "rest")
    assert [line.split(":")[0] for line in error.mismatched] == ["'@layers#0@o'", "'@layers#0@q'"]


def test_without_a_pattern_leaves_of_any_kind_get_other_names(path: Path) -> None:
    tree = {"s": "text", "n": 2**70, "z": 2j, "k": jax.random.key(3), "c": np.ones(2, complex)}
    save_pytree(tree, path)
    template = {"a": {"s": "", "n": 0, "z": 0j, "k": jax.random.key(0), "c": np.zeros(2, complex)}}
    rules = [Rule("@{*}", "a.{*}")]
    assert_same(load_into_pytree(template, path, rename=rules), {"a": tree})


def test_a_leaf_that_no_file_has_keeps_its_value_and_needs_one() -> None:
    rules = [Rule(None, "freqs"), Rule("{=}", "{=}")]
    template = {"freqs": numbers(3), "w": zeros(2)}
    assert_same(
        set_weights(template, {"@w": numbers(2)}, rename=rules),
        {"freqs": numbers(3), "w": numbers(2)},
    )
    template["freqs"] = STRUCT((3,), np.float32)
    for strict in (True, False):
        error = refusal(template, {"@w": numbers(2)}, rules, strict=strict)
        assert error.mismatched == (
            "'@freqs': Rule(None, 'freqs') says that it is not in the file, but the leaf of "
            "the template has no value to keep; give it one, or leave it out of the template, as "
            "nnx.split(model, nnx.Param, ...) and "
            "eqx.filter(model, eqx.is_array) do",
        )


@pytest.mark.parametrize(
    ("leaf", "pattern", "fault"),
    [
        (
            zeros(8, 16),
            "o e -> e (p o)",
            "it has shape [8, 16], and under {rule!r}, an axis of 16 is made of p=3; the tensor "
            "'q.weight' is float32[8,8]",
        ),
        (
            zeros(8, 12),
            "o e -> e (p o)",
            "under {rule!r}, the tensor 'q.weight' would be [4,8], but it is float32[8,8]",
        ),
        (
            zeros(3, 8, 8),
            "o e -> p e o",
            "under {rule!r}, the tensor 'k.weight' would be float32[8,8], but it is float32[4,8]",
        ),
    ],
)
def test_tensors_of_different_shapes_are_not_joined(leaf: Any, pattern: str, fault: str) -> None:
    rule = Rule("{p:q,k,v}.weight", "qkv", pattern)
    file = {"q.weight": zeros(8, 8), "k.weight": zeros(4, 8), "v.weight": zeros(4, 8)}
    error = refusal({"qkv": leaf}, file, [rule])
    wanted = str(list(leaf.shape)).replace(" ", "")
    assert error.mismatched == (
        f"'@qkv': the template has float32{wanted}; {fault.format(rule=rule)}; the tensors 'q.weight' "
        "float32[8,8] and 'k.weight' float32[4,8] have different shapes, and no rule joins such tensors "
        "into one leaf: load them as separate leaves, and concatenate these",
    )
    file |= dict.fromkeys(file, zeros(5, 8))
    assert "different shapes" not in str(refusal({"qkv": leaf}, file, [rule]))


def test_a_tensor_with_reversed_axes_gets_a_pattern() -> None:
    rule = Rule("w", "w")
    error = refusal({"w": zeros(2, 3, 4)}, {"w": zeros(4, 3, 2)}, [rule])
    assert f"; this is the transpose, so give {rule!r} the pattern 'a b c -> c b a'" in str(error)


def test_unexpected_names_are_in_order(path: Path) -> None:
    file = {"w": numbers(1), "b": numbers(2).astype(np.float64), "a": numbers(1)}
    safetensors.numpy.save_file(file, path)
    with pytest.raises(WeightsMismatchError) as caught:
        load_into_pytree({"w": zeros(1)}, path, rename=[Rule("w", "w")])
    assert caught.value.unexpected == ("a", "b")


STACK = Rule("w.{l}", "w", "o i -> l i o")


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ({"w.0": zeros(4, 3)}, "'@w': there is no 'w.1'"),
        (
            {"w.0": zeros(4, 3), "w.1": zeros(4, 3).astype(np.float16)},
            f"'@w': the template has float32[2,3,4]; under {STACK!r}, the tensor 'w.1' would be "
            "float32[4,3], but it is float16[4,3]",
        ),
        (
            {"w.0": zeros(4, 3), "w.1": 1.0},
            f"'@w': the template has float32[2,3,4]; under {STACK!r}, the tensor 'w.1' would be "
            "float32[4,3], but it is a Python float",
        ),
        (
            {"w.0": zeros(4, 3), "w.1": object()},
            f"'@w': the template has float32[2,3,4]; under {STACK!r}, the tensor 'w.1' would be "
            "float32[4,3], but it is not an array, or an array without values",
        ),
        (
            {"w.0": zeros(4, 3).astype(np.float64), "w.1": zeros(4, 3).astype(np.float64)},
            "'@w': the template has float32[2,3,4], but the stored leaf from 'w.0', 'w.1' is "
            "float64[2,3,4]",
        ),
        (
            {"w.0": zeros(4, 3).astype(complex), "w.1": zeros(4, 3).astype(complex)},
            f"'@w': the template has float32[2,3,4]; under {STACK!r}, the tensor 'w.0' would be "
            "[4,3], but it is complex128[4,3], which no pattern can rearrange, because a file stores "
            "it as float64",
        ),
    ],
)
def test_every_tensor_of_a_leaf_must_fit(file: dict[str, Any], line: str) -> None:
    error = refusal({"w": zeros(2, 3, 4)}, file, [STACK])
    assert f"    {line}" in str(error).splitlines()


EXPERTS = Rule("h.{l}.{2*x+1}.{p:q,k}", "h.{p}", "o i -> l x i o")
CUT = Rule("qkv", "{p:q,k}", "(p h) e -> e h")


@pytest.mark.parametrize(
    ("rule", "template", "file", "reason"),
    [
        (STACK, {"w": zeros(3)}, {}, "it has 1 axis, and {} gives it 3"),
        (
            STACK,
            {"w": zeros(3)},
            {"w.0": zeros(3), "w.1": 2.0},
            "it has 1 axis, and {} gives it 3; the tensor 'w.0' is float32[3]",
        ),
        (
            EXPERTS,
            {"h": {"k": zeros(4)}},
            {f"h.{l}.{x}.k": zeros(2, 1) for l in range(2) for x in (1, 3, 5)},
            "it has 1 axis, and {} gives it 4; the tensor 'h.0.1.k' is float32[2,1]",
        ),
        (
            Rule("w", "w", "(a b) -> a b", a=2),
            {"w": zeros(3, 4)},
            {"w": 1.5},
            "it has shape [3, 4], and under {}, an axis of 3 is made of a=2; the tensor 'w' is a "
            "Python float",
        ),
        (
            Rule("w", "w", "a -> a"),
            {"w": 1.0},
            {"w": zeros(2)},
            "{} rearranges axes, and this leaf is not an array of numbers; the tensor 'w' is float32[2]",
        ),
        (
            CUT,
            {"q": zeros(6)},
            {"qkv": zeros(6, 6)},
            "it has 1 axis, and {} gives it 2; the tensor 'qkv' is float32[6,6]",
        ),
        (
            Rule("w.{0*l}", "w", "a -> l a"),
            {"w": zeros(6)},
            {"w.0": zeros(6)},
            "it has 1 axis, and {} gives it 2; the tensor 'w.0' is float32[6]",
        ),
    ],
)
def test_a_leaf_that_a_rule_cannot_rearrange_is_shown_with_its_tensor(
    rule: Rule, template: Any, file: dict[str, Any], reason: str
) -> None:
    error = refusal(template, file | {"other": zeros(1)}, [rule])
    (line,) = error.mismatched
    assert line.split("; ", 1)[1] == reason.format(repr(rule))
    assert error.unexpected == ("other",)
    assert not error.missing


def test_strict_false_keeps_what_does_not_fit(path: Path) -> None:
    safetensors.numpy.save_file({"a.weight": numbers(2, 3), "more": zeros(1)}, path)
    template = {"a": zeros(3, 2), "b": numbers(1)}
    rules = [Rule("{*}.weight", "{*}", "o i -> i o")]
    found = load_into_pytree(template, path, rename=rules, strict=False)
    assert_same(found, {"a": np.ascontiguousarray(numbers(2, 3).T), "b": numbers(1)})


def test_a_prefix_limits_what_is_unexpected(path: Path) -> None:
    safetensors.numpy.save_file(
        {"model.a": numbers(1), "head": numbers(2), "other": numbers(3)}, path
    )
    rules = [Rule("model.a", "a"), Rule("head", "head")]
    template = {"a": zeros(1), "head": zeros(2)}
    found = load_into_pytree(template, path, rename=rules, prefix="model")
    assert_same(found, {"a": numbers(1), "head": numbers(2)})
    with pytest.raises(WeightsMismatchError, match="1 unexpected"):
        load_into_pytree(template, path, rename=rules)


def test_a_tensor_may_be_a_leaf_and_another_one_rearranged(path: Path) -> None:
    safetensors.numpy.save_file({"w": numbers(64, 32)}, path)
    rules = [Rule("w", "a", "o i -> i o"), Rule("w", "b"), Rule("w", "c", "o i -> i o")]
    template = {"a": STRUCT((32, 64), np.float32), "b": STRUCT((64, 32), np.float32)}
    found = load_into_pytree(template | {"c": template["a"]}, path, rename=rules)
    expected = jax.numpy.asarray(numbers(64, 32))
    assert_same(found, {"a": expected.T, "b": expected, "c": expected.T})


def test_what_has_no_elements_is_rearranged(path: Path) -> None:
    safetensors.numpy.save_file({"w": zeros(0, 3), "v": numbers(2, 1)}, path)
    rules = [Rule("w", "w", "o i -> i o"), Rule("v", "v", "o i -> i o")]
    template = {"w": zeros(3, 0), "v": STRUCT((1, 2), np.float32)}
    expected = {"w": zeros(3, 0), "v": jax.numpy.asarray(numbers(1, 2))}
    for mmap in (False, True):
        assert_same(load_into_pytree(template, path, rename=rules, mmap=mmap), expected)


def test_the_warning_of_a_leaf_without_tensors_names_none(path: Path) -> None:
    save_pytree({}, path)
    template = {"w": STRUCT((0, 8), np.float64)}
    with pytest.warns(UserWarning, match=r"'a stack of no tensors' \(float64\)"):
        found = load_into_pytree(template, path, rename=[Rule("w.{l}", "w", "a -> l a")])
    assert_same(found, {"w": np.zeros((0, 8))})


def test_what_rules_make_of_weakly_typed_scalars_is_not_weak(path: Path) -> None:
    save_pytree({"w0": jax.numpy.asarray(1.5), "w1": jax.numpy.asarray(2.5)}, path)
    rules = [Rule("@w{l}", "w", " -> l")]
    found = load_into_pytree({"w": STRUCT((2,), np.float32)}, path, rename=rules)
    assert_same(found, {"w": jax.numpy.asarray([1.5, 2.5], np.float32)})


def test_cast_converts_what_is_rearranged(path: Path) -> None:
    safetensors.numpy.save_file({"a.weight": numbers(2, 3).astype(np.float16)}, path)
    rules = [Rule("{*}.weight", "{*}", "o i -> i o")]
    for template in ({"a": zeros(3, 2)}, {"a": STRUCT((3, 2), np.float32)}):
        found = load_into_pytree(template, path, rename=rules, cast=True)
        assert_same_values(found["a"], numbers(2, 3).T)


MIXED = {
    "w.0": numbers(4, 6) / 3,
    "w.1": (numbers(4, 6) / 7).astype(np.float16),
    "w.2": np.arange(24, dtype=np.uint64).reshape(4, 6) + np.uint64(2**63),
    "w.3": (numbers(4, 6) / 7).astype(jax.numpy.bfloat16),
}
# A device may need several tensors of one dtype, which is not that of the first tensor.
PAIRS = {
    f"w.{n}": (numbers(4, 6) / (n + 3)).astype(dtype)
    for n, dtype in enumerate([np.float32, np.float32, jax.numpy.bfloat16, jax.numpy.bfloat16])
}
WIDER = dict(zip(PAIRS, reversed(PAIRS.values()), strict=True))
# Rules that stack the tensors, and what they are to the leaf.
JOINED: list[tuple[Rule, Any]] = [
    (Rule("w.{l}", "w", "o i -> l i o"), lambda found: np.stack(found).transpose(0, 2, 1)),
    (
        Rule("w.{l}", "w", "o i -> (i l) o", l=4),
        lambda found: np.stack(found).transpose(2, 0, 1).reshape(24, 4),
    ),
]


@pytest.mark.parametrize(("rule", "join"), JOINED)
@pytest.mark.parametrize("dtype", [np.float32, jax.numpy.bfloat16])
@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("file", [MIXED, PAIRS, WIDER])
def test_cast_converts_each_tensor_before_they_are_joined(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rule: Rule,
    join: Any,
    dtype: Any,
    checksum: bool,
    file: dict[str, Any],
) -> None:
    monkeypatch.setattr(plan, "_CUT_BY_JAX", 0)
    save_pytree(file, path, rename=[Rule("{*}", "{*}")], checksum=checksum)
    expected = join([values.astype(dtype) for values in file.values()])
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    struct = STRUCT(expected.shape, dtype)
    templates = [np.zeros_like(expected), struct]
    specs = [P("x"), P("y"), P(None, "y"), P(("x", "y")) if len(expected) == 24 else P("x", "y")]
    templates += [STRUCT(struct.shape, dtype, sharding=NamedSharding(mesh, spec)) for spec in specs]
    for template in templates:
        for mmap in (False, True):
            found = load_into_pytree({"w": template}, path, rename=[rule], cast=True, mmap=mmap)
            assert_same_values(found["w"], expected)
        assert_same_values(
            set_weights({"w": template}, file, rename=[rule], cast=True)["w"], expected
        )


def test_explain_lists_the_dtypes_that_cast_joins(path: Path) -> None:
    save_pytree(MIXED, path, rename=[Rule("{*}", "{*}")])
    rule, _ = JOINED[0]
    text = explain({"w": STRUCT((4, 6, 4), np.float32)}, path, rename=[rule], cast=True)
    assert "4 of float32[4,6] or float16[4,6] or uint64[4,6] or bfloat16[4,6]" in text


def test_cast_joins_arrays_of_numpy_and_jax() -> None:
    file = {"w.0": jax.numpy.asarray(numbers(2) + 2**24, np.int32) + 1, "w.1": numbers(2)}
    rules = [Rule("w.{l}", "w", "i -> l i")]
    found = set_weights({"w": np.zeros((2, 2))}, file, rename=rules, cast=True)
    expected = np.stack([np.asarray(values).astype(float) for values in file.values()])
    assert_same(found, {"w": expected})
    leaf = {"w": STRUCT((2, 2), np.float32)}
    traced = jax.jit(lambda given: set_weights(leaf, given, rename=rules, cast=True))(file)
    np.testing.assert_array_equal(traced["w"], expected.astype(np.float32))


def test_each_tensor_of_a_leaf_must_be_one_that_cast_converts() -> None:
    template = {"w": np.zeros((2, 3, 4), np.int32)}
    file = {"w.0": np.zeros((4, 3), np.int8), "w.1": zeros(4, 3)}
    error = refusal(template, file, [STACK])
    assert "cast=True" not in str(error)
    error = refusal(template, file, [STACK], cast=True)
    assert error.mismatched == (
        f"'@w': the template has int32[2,3,4]; under {STACK!r}, the tensor 'w.1' would be "
        "int8[4,3], but it is float32[4,3]",
    )
    error = refusal({"w": np.zeros((2, 3, 4), np.float16)}, file, [STACK])
    assert "cast=True converts dtypes" in str(error)


def test_damage_to_a_part_of_a_tensor_is_noticed(path: Path) -> None:
    tree = {"q": numbers(3, 4), "k": numbers(3, 2), "v": numbers(3, 2)}
    rules = [Rule("qkv", "{p:q,k,v}", "(p o) i -> i o")]
    save_pytree(tree, path, rename=rules, checksum=True)
    assert_same(load_into_pytree(tree, path, rename=rules), tree)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(FileFormatError, match="qkv"):
        load_into_pytree(tree, path, rename=rules)


def test_one_part_of_a_fused_tensor_loads_alone(path: Path) -> None:
    safetensors.numpy.save_file({"qkv": numbers(12, 5)}, path)
    rules = [Rule("qkv", "{p:q,k,v}", "(p o) i -> i o")]
    found = load_into_pytree({"k": zeros(5, 4)}, path, rename=rules)
    np.testing.assert_array_equal(found["k"], numbers(12, 5)[4:8].T)


def test_leaves_may_share_a_tensor(path: Path) -> None:
    safetensors.numpy.save_file({"embed": numbers(4, 3)}, path)
    rules = [Rule("embed", "embed"), Rule("embed", "head", "v e -> e v")]
    template = {"embed": zeros(4, 3), "head": zeros(3, 4)}
    found = load_into_pytree(template, path, rename=rules)
    assert_same(found, {"embed": numbers(4, 3), "head": np.ascontiguousarray(numbers(4, 3).T)})


def test_progress_counts_what_is_read(path: Path) -> None:
    safetensors.numpy.save_file({f"w.{n}": numbers(4, 3) for n in range(3)}, path)
    seen: list[tuple[int, int]] = []
    load_into_pytree(
        {"w": zeros(2, 3, 4)},
        path,
        rename=[STACK],
        strict=False,
        progress=lambda *c: seen.append(c),
    )
    assert seen[-1] == (96, 96)


def test_a_trace_sees_through_rules() -> None:
    @jax.jit
    def traced(file: dict[str, Any]) -> Any:
        return set_weights({"w": STRUCT((2, 3, 4), np.float32)}, file, rename=[STACK])

    found = traced({"w.0": numbers(4, 3), "w.1": numbers(4, 3)})
    np.testing.assert_array_equal(found["w"], np.stack([numbers(4, 3).T] * 2))


# --- what is read -----------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all reads of data."""
    sizes: list[int] = []
    fill = ByteSource.fill

    def counting(self: ByteSource, buffers: Any, offset: int) -> None:
        sizes.extend(len(buffer) for buffer in buffers)
        fill(self, buffers, offset)

    monkeypatch.setattr(ByteSource, "fill", counting)
    return sizes


LARGE = 1024  # rows of 4 kB: 4 MB


def test_only_one_layer_is_read(path: Path, counted: list[int]) -> None:
    file = {f"h.{n}.w": numbers(256, 512) for n in range(8)}
    safetensors.numpy.save_file(file, path)
    rules = [Rule("h.{l+3}.w", "layer", "o i -> l i o", l=1)]
    found = load_into_pytree({"layer": zeros(1, 512, 256)}, path, rename=rules, strict=False)
    np.testing.assert_array_equal(found["layer"][0], file["h.3.w"].T)
    assert sum(counted[1:]) <= 1.01 * found["layer"].nbytes  # the first read is the header's


@pytest.mark.parametrize("part", [0, 1, 2])
def test_only_one_part_of_a_fused_tensor_is_read(path: Path, counted: list[int], part: int) -> None:
    stored = numbers(3 * LARGE, LARGE)
    safetensors.numpy.save_file({"qkv": stored}, path)
    rules = [Rule("qkv", "{p:q,k,v}", "(p o) i -> i o")]
    name = "qkv"[part]
    template = {name: STRUCT((LARGE, LARGE), np.float32)}
    found = load_into_pytree(template, path, rename=rules)
    np.testing.assert_array_equal(found[name], stored[part * LARGE : (part + 1) * LARGE].T)
    assert sum(counted[1:]) <= 1.01 * found[name].nbytes  # the first read is the header's


@pytest.mark.parametrize("count", [4, 8])  # runs of 1 to 8 kB
@pytest.mark.parametrize("width", [2048, 8192])
def test_what_lies_between_parts_is_not_read(
    path: Path, counted: list[int], count: int, width: int
) -> None:
    stored = numbers(LARGE, width)
    safetensors.numpy.save_file({"w": stored}, path)
    rules = [Rule("w", f"{{p:{','.join('abcdefgh'[:count])}}}", "x (p f) -> f x")]
    part = width // count
    found = load_into_pytree({"b": STRUCT((part, LARGE), np.float32)}, path, rename=rules)
    np.testing.assert_array_equal(found["b"], stored[:, part : 2 * part].T)
    assert sum(counted[1:]) <= 1.01 * found["b"].nbytes


@pytest.mark.parametrize("axes", [("x", None), (None, "x"), ("x", "y")])
def test_devices_read_only_their_share(path: Path, counted: list[int], axes: Any) -> None:
    stored = numbers(LARGE, LARGE)
    safetensors.numpy.save_file({"w": stored}, path)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    template = {"w": STRUCT((LARGE, LARGE), np.float32, sharding=NamedSharding(mesh, P(*axes)))}
    found = load_into_pytree(template, path, rename=[Rule("w", "w", "o i -> i o")])
    np.testing.assert_array_equal(found["w"], stored.T)
    assert sum(counted[1:]) <= 1.01 * stored.nbytes  # the first read is the header's


@pytest.mark.parametrize("axes", [("x",), (None, "x"), (None, None, "x")])
def test_a_stacked_leaf_is_read_in_shards(path: Path, counted: list[int], axes: Any) -> None:
    file = {f"w.{n}": numbers(LARGE, LARGE) + n for n in range(4)}
    safetensors.numpy.save_file(file, path)
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    sharding = NamedSharding(mesh, P(*axes))
    template = {"w": STRUCT((4, LARGE, LARGE), np.float32, sharding=sharding)}
    found = load_into_pytree(template, path, rename=[STACK])
    np.testing.assert_array_equal(found["w"], np.stack([values.T for values in file.values()]))
    assert found["w"].sharding == sharding
    assert sum(counted[1:]) <= 1.01 * 4 * file["w.0"].nbytes  # the first read is the header's


def test_a_stacked_leaf_is_complete_before_the_next_is_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise all stacked leaves would be in memory until the last layer, and then once more.
    names = [f"h.{l}.{n}" for l in range(5) for n in ("a", "b", "c")]
    safetensors.numpy.save_file({name: numbers(LARGE, LARGE) for name in names}, path)
    read: list[str] = []
    plan_batches = plan.plan_batches

    def planning(*arguments: Any) -> Any:
        for batch in plan_batches(*arguments):
            read.extend(slot.name for slot in batch.slots)
            yield batch

    monkeypatch.setattr(reading, "plan_batches", planning)
    rules = [Rule("h.{l}.{n:a,b}", "{n}", "o i -> l i o"), Rule("h.{l}.c", "c.{l}", "o i -> i o")]
    leaf = STRUCT((5, LARGE, LARGE), np.float32)
    flat = [STRUCT((LARGE, LARGE), np.float32)] * 5
    load_into_pytree({"a": leaf, "b": leaf, "c": flat}, path, rename=rules)
    assert read == sorted(names, key=lambda name: (name[-1], name))


@pytest.mark.parametrize("spec", [P("x"), P(("x", "y"))])
@pytest.mark.parametrize("checksum", [False, True])
def test_regions_that_several_boxes_of_tensors_make(
    path: Path, monkeypatch: pytest.MonkeyPatch, spec: Any, checksum: bool
) -> None:
    monkeypatch.setattr(plan, "_CUT_BY_JAX", 0)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    values = numbers(3 * 8, 40)
    layers = {f"w.{n}": values.reshape(3, 8, 40)[:, n] for n in range(8)}
    save_pytree(layers, path, checksum=checksum)
    struct = STRUCT((24, 40), np.float32, sharding=NamedSharding(mesh, spec))
    rule = Rule("@w\\.{l}", "@w", "a b -> (a l) b", l=8)
    found = load_into_pytree({"w": struct}, path, rename=[rule])["w"]
    assert found.sharding == struct.sharding
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("part", range(4))
def test_a_part_of_a_tensor_with_digests_is_not_checked(
    path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    """Its digest is of all its bytes. What is read whole is checked, and bands without it are not read."""
    monkeypatch.setattr(regions, "BAND", 64)
    stored = numbers(16, 12)
    save_pytree({"w": stored, "z": numbers(3)}, path, checksum=True)
    name = ("ac", "ad", "bc", "bd")[part]
    rules = [Rule("@w", "{p:a,b}.{q:c,d}", "(p f) (q g) -> f g"), Rule("@z", "z")]
    template = {name[0]: {name[1]: STRUCT((8, 6), np.float32)}, "z": STRUCT((3,), np.float32)}
    found = load_into_pytree(template, path, rename=rules)
    expected = stored.reshape(2, 8, 2, 6)[part // 2, :, part % 2]
    np.testing.assert_array_equal(found[name[0]][name[1]], expected)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(FileFormatError, match="'@z'"):
        load_into_pytree(template, path, rename=rules)


@pytest.mark.parametrize("strict", [False, True])
def test_a_template_fits_if_rules_leave_out_all_of_it(path: Path, strict: bool) -> None:
    save_pytree({"w": numbers(3)}, path)
    template = {"freqs": numbers(2)}
    rules = [Rule(None, "freqs"), Rule("@w", None)]
    assert load_into_pytree(template, path, rename=rules, strict=strict) == template
    with pytest.raises(WeightsMismatchError, match="1 unexpected"):
        load_into_pytree(template, path, rename=rules[:1], strict=strict)


def test_shards_that_cut_the_merged_axes_of_one_tensor(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_CUT_BY_JAX", 0)
    values = numbers(6, 40)
    save_pytree({"w": values.reshape(3, 2, 40)}, path)
    place = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("x",)), P("x"))
    template = {"w": STRUCT(values.shape, values.dtype, sharding=place)}
    rules = [Rule("@w", "w", "a b c -> (a b) c", b=2)]
    found = load_into_pytree(template, path, rename=rules)["w"]
    assert found.sharding == place
    assert_same_values(found, values)


def test_leaves_of_which_one_is_a_part_of_the_other(path: Path) -> None:
    values = numbers(3, 8, 1 << 14)
    save_pytree({"w": values}, path)
    rules = [
        Rule("@w", "a.{p}", "p r c -> r c", p=3),
        Rule("@w", "b.{p}.{h}", "p r (h c) -> r c", p=3, h=2),
    ]
    template = {"a": [zeros(8, 1 << 14)], "b": [[zeros(8, 1 << 13)]]}
    found = load_into_pytree(template, path, rename=rules)
    assert_same_values(found["a"][0], values[0])
    assert_same_values(found["b"][0][0], values[0, :, : 1 << 13])
