"""Flat dicts that rules make: how JAX computes them. The law is in test_rules."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from oracle import assert_same, assert_same_values
from placed import P
from pytree2safetensors import (
    FileFormatError,
    Rule,
    WeightsMismatchError,
    pytree2dict,
    save_pytree,
    set_weights,
)
from pytree2safetensors._leaves.jax_versions import enable_x64
from pytree2safetensors._leaves.spec import jax_holds

VALUES = np.arange(64, dtype=np.float32).reshape(8, 8)
VALUES[3, 4] = np.nan
IN_TWO = VALUES.reshape(2, 4, 8)
RULES: dict[str, tuple[Rule, dict[str, Any], dict[str, Any]]] = {
    "moved": (Rule("@w", "@w", "a b -> b a"), {"w": VALUES}, {"@w": VALUES.T}),
    "merged": (Rule("@w", "@w", "(p a) b -> b p a"), {"w": IN_TWO}, {
        "@w": IN_TWO.transpose(1, 2, 0).reshape(32, 2)
    }),
    "joined": (Rule("w", "@{p:a,b}", "(p a) b -> a b"), {"a": VALUES, "b": VALUES.T}, {
        "w": np.concatenate([VALUES, VALUES.T])
    }),
    "grid": (Rule("w", "@{p}#{q}", "p (q a) b -> b a"), {"0": [VALUES] * 3, "1": [VALUES.T] * 3}, {
        "w": np.stack([np.concatenate([part] * 3) for part in (VALUES.T, VALUES)])
    }),
    "numbered": (Rule("w", "@{p}#{q}", "(p q a) b -> b a"), {
        "0": [VALUES, VALUES.T], "1": [VALUES.T, VALUES]
    }, {"w": np.concatenate([VALUES.T, VALUES, VALUES, VALUES.T])}),
    "cut twice": (Rule("w.{p}.{q}", "@w", "b -> p q b"), {"w": IN_TWO}, {
        f"w.{p}.{q}": IN_TWO[p, q] for p in range(2) for q in range(4)
    }),
    "cut": (Rule("w.{p}", "@w", "b -> p b"), {"w": VALUES}, {
        f"w.{row}": VALUES[row] for row in range(8)
    }),
}  # fmt: skip


@pytest.fixture(params=RULES)
def case(request: pytest.FixtureRequest) -> Any:
    return RULES[request.param]


def check(case: Any, found: dict[str, Any]) -> None:
    assert found.keys() == case[2].keys()
    for name, values in case[2].items():
        assert isinstance(found[name], jax.Array)
        assert_same_values(np.asarray(found[name]), np.ascontiguousarray(values))


def test_no_setting_of_jax_stops_a_rule(case: Any) -> None:
    rule, tree, _ = case
    tree = jax.tree_util.tree_map(jnp.asarray, tree)
    with jax.debug_nans(True), jax.debug_infs(True), jax.transfer_guard("disallow"):
        found = pytree2dict(tree, rename=[rule])
    check(case, found)


def test_one_array_of_jax_makes_the_tensor_one() -> None:
    rule, tree, expected = RULES["joined"]
    found = pytree2dict({**tree, "a": jnp.asarray(tree["a"])}, rename=[rule])
    check((rule, tree, expected), found)


ODD_BYTES = np.array([0, 1, 2, 255], np.uint8).view(np.bool_)


@pytest.mark.parametrize(
    ("values", "stored"),
    [
        (np.array([1, 2], ">f4"), np.array([1, 2], np.float32)),
        (np.array([1, 2], ">i2")[::-1], np.array([2, 1], np.int16)),
        (np.array([1, np.nan], ">c8"), np.array([1, np.nan], np.complex64)),
        (ODD_BYTES, ODD_BYTES.view(np.uint8) != 0),
    ],
)
def test_arrays_of_numpy_in_another_form_join_arrays_of_jax(values: Any, stored: Any) -> None:
    rule, other = Rule("w", "#{p}", "p a -> a"), jnp.asarray(stored)
    expected = np.stack([stored, stored])
    for tree in ([values, other], [other, values]):
        check((rule, tree, {"w": expected}), pytree2dict(tree, rename=[rule]))
        traced = jax.jit(lambda leaf: pytree2dict([values, leaf], rename=[rule]))(other)
        check((rule, tree, {"w": expected}), traced)
        entries = {f"w.{n}": part for n, part in enumerate(tree)}
        template = {"w": jnp.zeros(expected.shape, expected.dtype)}
        stack = [Rule("w.{p}", "@w", "a -> p a")]
        check((rule, tree, {"w": expected}), set_weights(template, entries, rename=stack))


MASKED = np.ma.masked_array(np.ones(2, np.float32), [True, False])


@pytest.mark.parametrize("leaf", [MASKED, jax.eval_shape(lambda: jnp.ones(2)), "text"])
@pytest.mark.parametrize("other", [np.ones(2), jnp.ones(2), MASKED])
def test_a_rule_rearranges_only_arrays_with_values(leaf: Any, other: Any) -> None:
    with pytest.raises(WeightsMismatchError) as caught:
        pytree2dict([leaf, other], rename=[Rule("w", "#{p}", "p a -> a")])
    reason = "rearranges axes, and this leaf is not an array of numbers"
    assert any(line.startswith("'#0'") and reason in line for line in caught.value.mismatched)


@pytest.mark.parametrize("order", "<>")
def test_a_rule_rearranges_no_complex128(order: str) -> None:
    rule, leaf = Rule("t", "@w", "a b -> b a"), np.ones((2, 3), f"{order}c16")
    reason = "it is complex128, which no pattern can rearrange, because a file stores it as float64"
    with pytest.raises(WeightsMismatchError) as caught:
        pytree2dict({"w": leaf}, rename=[rule])
    assert caught.value.mismatched == (f"'@w': {reason}",)
    with enable_x64(True), pytest.raises(WeightsMismatchError) as caught:
        pytree2dict({"w": jnp.ones((2, 3), complex)}, rename=[rule])
    assert caught.value.mismatched == (f"'@w': {reason}",)
    assert pytree2dict({"w": leaf}, rename=[Rule("t", "@w")])["t"] is leaf


def test_no_setting_of_jax_stops_a_tensor_of_several_devices() -> None:
    first, second = (jax.device_put(VALUES, device) for device in jax.devices()[:2])
    rule, _, expected = RULES["joined"]
    with jax.transfer_guard("disallow"):
        found = pytree2dict({"a": first, "b": second}, rename=[rule])
    assert_same_values(np.asarray(found["w"])[:8], expected["w"][:8])


@pytest.mark.skipif(
    not hasattr(jax, "set_mesh") or not hasattr(jax.sharding, "AxisType"),
    reason="this JAX has no explicit axes",
)
@pytest.mark.parametrize("within", [False, True])
def test_arrays_may_be_spread_over_explicit_axes(case: Any, within: bool) -> None:
    rule, tree, _ = case
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh: Any = jax.make_mesh((4, 2), ("x", "y"), axis_types=kinds)

    def put(values: Any) -> Any:
        specs = {8: P("x", "y"), 2: P("y", "x")}
        return jax.device_put(values, NamedSharding(mesh, specs[len(values)]))

    tree = jax.tree_util.tree_map(put, tree)
    if within:
        with jax.set_mesh(mesh):
            found = pytree2dict(tree, rename=[rule])
            for leaf in found.values():
                leaf + 1  # the mesh of the array is the mesh that JAX expects
    else:
        found = pytree2dict(tree, rename=[rule])
    for leaf in found.values():
        assert getattr(leaf.sharding, "mesh", mesh) == mesh
    check(case, found)


@pytest.mark.parametrize("name", ["joined", "cut"])
def test_the_work_grows_with_the_size_of_the_tree(name: str) -> None:
    count = 64
    if name == "joined":
        rule, tree = Rule("w", "#{p}", "(p a) b -> a b"), [jnp.asarray(VALUES)] * count
    else:
        rule, tree = Rule("w.{p}", "#0", "b -> p b"), [jnp.zeros((count, 64))]
    traced = jax.make_jaxpr(lambda leaves: pytree2dict(leaves, rename=[rule]))(tree)
    made = [out.aval for step in traced.eqns for out in step.outvars]
    assert sum(math.prod(aval.shape) for aval in made) <= 8 * 64 * count


def test_rules_have_gradients(case: Any) -> None:
    rule, tree, _ = case
    leaves = jax.tree_util.tree_map(lambda leaf: jnp.ones(leaf.shape), tree)

    def total(leaves: Any) -> Any:
        return sum((leaf**2).sum() for leaf in pytree2dict(leaves, rename=[rule]).values())

    for function in (jax.grad(total), jax.jit(jax.grad(total))):
        for leaf in jax.tree_util.tree_leaves(function(leaves)):
            assert_same_values(np.asarray(leaf), np.full(leaf.shape, 2, np.float32))


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_leaves_without_elements_make_tensors_without_elements(kind: Any) -> None:
    tree = {"a": kind(np.zeros((0, 3), np.int8)), "b": kind(np.zeros((2, 0), np.int8))}
    rules = [Rule("b.{p}", "@b", "x -> p x"), Rule("a", "@a", "x y -> y x")]
    found = pytree2dict(tree, rename=rules)
    shapes = {name: (type(leaf), leaf.dtype, leaf.shape) for name, leaf in found.items()}
    expected = type(tree["a"]), np.dtype(np.int8)
    assert shapes == {"a": (*expected, (3, 0)), "b.0": (*expected, (0,)), "b.1": (*expected, (0,))}


@pytest.mark.parametrize("kind", [np.float32, jnp.float32])
def test_scalars_are_parts_of_a_tensor(kind: Any) -> None:
    found = pytree2dict([kind(1), kind(2)], rename=[Rule("w", "#{p}", "p ->")])
    assert_same_values(np.asarray(found["w"]), np.array([1, 2], np.float32))


@pytest.mark.parametrize("spec", [P("x"), P("y"), P(None, "y")])
@pytest.mark.parametrize("kind", [None, "pinned_host"])
def test_arrays_that_are_spread_and_copied(spec: Any, kind: str | None) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    if kind is not None and len(jax.devices()[0].addressable_memories()) == 1:
        pytest.skip("this JAX knows one kind of memory on the CPU")
    values = np.arange(8 * 8 * 4, dtype=np.float32).reshape(8, 8, 4)
    leaf = jax.device_put(values, NamedSharding(mesh, spec, memory_kind=kind))
    joined = np.concatenate([values, values], 1)
    cases: list[tuple[Rule, Any, dict[str, Any]]] = [
        (Rule("w.{p}", "@w", "... -> p ..."), {"w": leaf}, {
            f"w.{n}": values[n] for n in range(8)
        }),
        (Rule("w.{l}", "@{p:a,b}", "(p i) o -> l i o"), {"a": leaf, "b": leaf}, {
            f"w.{n}": joined[n] for n in range(8)
        }),
        (Rule("w", "@{p:a,b}", "p ... -> ..."), {"a": leaf, "b": leaf}, {
            "w": np.stack([values, values])
        }),
    ]  # fmt: skip
    for rule, tree, expected in cases:
        found = pytree2dict(tree, rename=[rule])
        check((rule, tree, expected), found)
        back = set_weights(tree, found, rename=[rule])
        for name, array in back.items():
            assert array.sharding == tree[name].sharding
            assert_same_values(np.asarray(array), values)


def placed(values: Any, order: list[int], spec: Any) -> jax.Array:
    mesh = Mesh(np.array(jax.devices())[order].reshape(4, 2), ("x", "y"))
    array: jax.Array = jax.device_put(values, NamedSharding(mesh, spec))
    return array


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("text", "text"),
        (2**70, 2**70),
        (-5, -5),
        (1 + 2j, 1 + 2j),
        (np.array([1, -2], ">i4"), np.array([1, -2], "<i4")),
        (np.array([np.nan], ">c8"), jnp.array([np.nan], np.complex64)),
        (np.array([0xF3], np.uint8).view(ml_dtypes.int4), np.array([3]).astype(ml_dtypes.int4)),
        (np.array([0, 7], np.uint8).view(np.bool_), np.array([False, True])),
        (np.zeros((0, 3), ">f4"), jnp.zeros((0, 3))),
        (np.arange(6, dtype=np.uint8).reshape(2, 3).T, np.array([[0, 3], [1, 4], [2, 5]], np.uint8)),
    ],
)  # fmt: skip
def test_leaves_that_a_file_stores_alike_may_have_one_name(one: Any, other: Any) -> None:
    for tree in ([one, other], [other, one]):
        found = pytree2dict(tree, rename=lambda _: "w")
        assert found.keys() == {"w"}
        assert found["w"] is tree[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("text", "texts"),
        (2**70, 2**70 + 1),
        ("0x400000000000000000", 2**70),
        (np.array([1], ">i4"), np.array([1 << 24], "<i4")),
        (np.array([0.0], ">f4"), np.array([-0.0], "<f4")),
        (np.zeros((0, 3), ">f4"), np.zeros((3, 0), ">f4")),
    ],
)
def test_leaves_that_a_file_stores_differently_need_two_names(one: Any, other: Any) -> None:
    for tree in ([one, other], [other, one]):
        with pytest.raises(FileFormatError, match="are both stored as 'w', but they differ"):
            pytree2dict(tree, rename=lambda _: "w")


FORWARDS, BACKWARDS = [*range(8)], [*range(7, -1, -1)]


@pytest.mark.parametrize("name", ["int2", "uint2", "int4", "uint4"])
def test_integers_of_a_few_bits_are_joined_and_placed(name: str) -> None:
    kind = getattr(ml_dtypes, name, None)  # an old one has only some of them
    if kind is None or not jax_holds(np.dtype(kind)):
        pytest.skip("this JAX has no such dtype")
    values = (np.arange(3 * 33 * 17).reshape(3, 33, 17) % 2).astype(np.int8).astype(kind)
    rule = Rule("w", "#{p}", "(p a) b -> a b")
    found = pytree2dict([*map(jax.device_put, values)], rename=[rule])
    assert isinstance(found["w"], jax.Array)
    assert_same(found, {"w": jax.device_put(values.reshape(99, 17))})
    square = values.reshape(99, 17)[:64, :16]
    template = placed(square, FORWARDS, P("y", "x"))
    moved = set_weights([template], {"#0": placed(square, BACKWARDS, P("x", "y"))})[0]
    assert moved.sharding == template.sharding
    assert_same(moved, jax.device_put(square))


@pytest.mark.parametrize("orders", [(FORWARDS, BACKWARDS), (FORWARDS, FORWARDS)])
def test_arrays_that_jax_cannot_join_are_joined_on_the_host(orders: Any) -> None:
    rule = Rule("w", "{p:a,b}", "(c a) p d -> (c a) () d", c=2)  # the rows of x are not whole in c
    values = np.arange(32, dtype=np.float32).reshape(8, 1, 4)
    parts = values, values + 32
    tree = {
        name: placed(part, order, P("x", None, "y"))
        for name, part, order in zip("ab", parts, orders, strict=True)
    }
    found = pytree2dict(tree, rename=[rule])
    check((rule, tree, {"w": np.concatenate(parts, 1)}), found)
    back = set_weights(tree, found, rename=[rule])
    for name, part in zip("ab", parts, strict=True):
        assert back[name].sharding == tree[name].sharding
        assert_same_values(np.asarray(back[name]), part)


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # of NumPy's matrix
@pytest.mark.parametrize(
    "rule", [Rule("w", "w", "a b c -> a (b c)", b=2), Rule("w.{b}", "w", "a c -> a (b c)", b=2)]
)
def test_subclasses_of_arrays_are_rearranged_as_arrays(rule: Rule, tmp_path: Path) -> None:
    values = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    tree, expected = {"w": np.matrix(values)}, pytree2dict({"w": values}, rename=[rule])
    found = pytree2dict(tree, rename=[rule])
    assert {name: leaf.tolist() for name, leaf in found.items()} == {
        name: leaf.tolist() for name, leaf in expected.items()
    }
    save_pytree(tree, tmp_path / "one", rename=[rule])
    save_pytree({"w": values}, tmp_path / "other", rename=[rule])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
