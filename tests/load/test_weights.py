"""Templates: a test for each bug that was fixed."""

import enum
import io
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from oracle import assert_same
from pytree2safetensors import (
    Rule,
    TreeStructureError,
    WeightsMismatchError,
    load_abstract,
    load_into_pytree,
    load_pytree,
    pytree2dict,
    save_pytree,
    set_weights,
)
from pytree2safetensors._leaves import spec
from pytree2safetensors._leaves.jax_versions import enable_x64
from pytree2safetensors._load import complaints

COUNT = 1 << 18
struct: Any = jax.ShapeDtypeStruct


@pytest.mark.parametrize("mmap", [False, True])
def test_a_numpy_leaf_shares_no_memory_with_a_jax_leaf(mmap: bool, tmp_path: Path) -> None:
    save_pytree({"a": np.arange(COUNT, dtype=np.float32)}, tmp_path / "file")
    abstract = jax.ShapeDtypeStruct((COUNT,), np.float32)  # type: ignore[no-untyped-call] # JAX gives it no types
    zeros = np.zeros(COUNT, np.float32)
    template: list[Any] = [abstract, zeros, abstract, zeros]
    found = load_into_pytree(template, tmp_path / "file", rename=lambda _: "@a", mmap=mmap)
    found[1][:] = -1
    for position in (0, 2, 3):
        assert np.asarray(found[position]).tobytes() == np.arange(COUNT, dtype=np.float32).tobytes()


def test_a_deleted_leaf_cannot_be_kept(tmp_path: Path) -> None:
    save_pytree({"b": np.ones(2, np.float32)}, tmp_path / "file")
    gone = jnp.ones(3)
    gone.delete()
    with pytest.raises(WeightsMismatchError, match="1 missing"):
        load_into_pytree({"a": gone, "b": jnp.ones(2)}, tmp_path / "file", strict=False)


def test_an_array_of_another_library_is_no_data(tmp_path: Path) -> None:
    class Foreign:
        shape = (2,)
        dtype = "torch.float32"

    save_pytree({"b": np.ones(2)}, tmp_path / "file")
    foreign = Foreign()
    found = load_into_pytree({"a": foreign, "b": np.zeros(2)}, tmp_path / "file")
    assert found["a"] is foreign


def test_what_is_traced_and_no_array_is_no_data() -> None:
    def token(x: jax.Array) -> jax.Array:
        tree = set_weights({"w": x, "token": jax.lax.create_token()}, {"@w": x + 1})  # type: ignore[no-untyped-call] # JAX gives it no types
        found: jax.Array = tree["w"]
        return found

    assert_same(jax.jit(token)(jnp.ones(3)), jnp.full(3, 2.0))


@pytest.mark.parametrize("shape", [([2],), (np.ones(2),)])
def test_a_leaf_whose_shape_is_none_is_not_data(shape: Any) -> None:
    class Odd:
        dtype = np.dtype(np.float32)

    odd = Odd()
    odd.shape = shape  # type: ignore[attr-defined] # as another library's array may have
    found = set_weights({"a": 0.0, "odd": odd}, {"@a": 1.0}, strict=False)
    assert found == {"a": 1.0, "odd": odd}


@pytest.mark.parametrize("x64", [False, True])
def test_weak_types_of_every_kind_come_back(x64: bool, tmp_path: Path) -> None:
    with enable_x64(x64):
        tree = [jnp.asarray(1), jnp.asarray(1.5), jnp.asarray(1j), jnp.asarray(1) < 2]
        assert all(leaf.weak_type for leaf in tree)
        save_pytree(tree, tmp_path / "file")
        assert_same(load_pytree(tmp_path / "file"), tree)
        assert_same(load_into_pytree(tree, tmp_path / "file"), tree)
        abstract = load_abstract(tmp_path / "file")
        assert [leaf.dtype for leaf in abstract] == [leaf.dtype for leaf in tree]


@pytest.mark.parametrize("many", [1, 1100])
def test_values_load_while_jax_checks_for_nans_and_transfers(many: int, tmp_path: Path) -> None:
    weak = jax.lax.full_like(jnp.asarray(0.0), np.float32("nan"))
    tree = [*[np.full(2, np.nan, np.float32)] * many, weak, jax.random.key(0)]
    save_pytree(tree, tmp_path / "file")
    expected = load_pytree(tmp_path / "file")
    template = jax.tree_util.tree_map(lambda leaf: struct(leaf.shape, leaf.dtype), expected)
    with jax.debug_nans(True), jax.debug_infs(True), jax.transfer_guard("disallow"):
        found = load_pytree(tmp_path / "file")
        with jax.disable_jit():
            into = load_into_pytree(template, tmp_path / "file")
    assert_same(found, expected)
    assert_same(into, expected)


@pytest.mark.parametrize("mmap", [False, True])
def test_loads_in_traced_functions_return_values(mmap: bool, tmp_path: Path) -> None:
    many = [jnp.full(3, number, jnp.float32) for number in range(1100)]
    large, weak, key = jnp.ones((64, 64)), jax.lax.full_like(jnp.asarray(0.0), 1), jax.random.key(0)
    tree = {"many": many, "large": large, "weak": weak, "key": key, "step": 3}
    save_pytree(tree, tmp_path / "file")
    found: list[Any] = []

    def load(template: Any) -> Any:
        found.append(load_pytree(tmp_path / "file", mmap=mmap))
        found.append(load_into_pytree(tree, tmp_path / "file", mmap=mmap))
        found.append(load_into_pytree(template, tmp_path / "file", mmap=mmap))
        rule = Rule("@large", "@turned", "a b -> b a")
        turned = {"turned": template["large"]}
        found.append(
            load_into_pytree(turned, tmp_path / "file", rename=[rule], unexpected="skip", mmap=mmap)
        )
        return template["large"] + found[0]["large"]

    assert_same(jax.jit(load)(tree), large + large)
    jax.eval_shape(load, tree)
    jax.lax.scan(lambda carry, _: (load(tree), None), large, None, length=2)
    for loaded in found:
        if "turned" in loaded:
            assert_same(loaded, {"turned": large})
        else:  # the traced template has an array for the step
            assert_same({**loaded, "step": int(loaded["step"])}, tree)


def test_a_guard_against_transfers_is_forgotten(tmp_path: Path) -> None:
    save_pytree({"w": np.zeros(3, ml_dtypes.bfloat16)}, tmp_path / "file")
    spec._jax_holds.cache_clear()
    with jax.transfer_guard("disallow_explicit"), suppress(Exception):
        load_pytree(tmp_path / "file")
    assert isinstance(load_pytree(tmp_path / "file")["w"], jax.Array)


def deleted() -> jax.Array:
    array = jnp.zeros(2)
    array.delete()
    return array


@pytest.mark.parametrize("value", [struct((2,), np.float32), deleted(), None, print])
@pytest.mark.parametrize("leaf", [struct((2,), np.float32), np.zeros(2, np.float32), 1.5])
def test_what_has_no_values_fits_nothing(leaf: Any, value: Any) -> None:
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights({"a": leaf, "b": 1}, {"@a": value, "@b": 2})
    assert caught.value.mismatched == (
        "'@a': the given value is not an array, or is an array without values",
    )


def moments(number: int) -> Any:
    return np.full(1, number, "M8[s]")


def boxed(number: int) -> Any:
    return SimpleNamespace(state=np.full(2, number))


def masked(number: int) -> Any:
    return np.ma.array([number, 1.0], mask=[False, True])


@pytest.mark.parametrize(
    ("leaf", "value", "was", "given"),
    [
        (moments(0), moments(1), *["a numpy.ndarray of dtype datetime64[s]"] * 2),
        (moments(0), moments(0).astype("M8[ms]"), *[f"a numpy.ndarray of dtype datetime64[{t}]" for t in ("s", "ms")]),
        (masked(0), masked(1), *[f"a {np.ma.MaskedArray.__module__}.MaskedArray of dtype float64"] * 2),
        (np.longdouble(0), np.longdouble(1), *[f"a numpy.{np.longdouble.__name__} of dtype {np.dtype('g')}"] * 2),
        (boxed(0), boxed(1), *["a types.SimpleNamespace, which is or holds arrays"] * 2),
        (print, boxed(1), "a builtins.builtin_function_or_method", "a types.SimpleNamespace, which is or holds arrays"),
        (boxed(0), print, "a types.SimpleNamespace, which is or holds arrays", "a builtins.builtin_function_or_method"),
        (print, deleted(), "a builtins.builtin_function_or_method", "a deleted array"),
        (print, struct((2,), np.float32), "a builtins.builtin_function_or_method", "an array without values"),
    ],
)  # fmt: skip
def test_data_that_no_file_holds_are_not_ignored(
    leaf: Any, value: Any, was: str, given: str
) -> None:
    reason = (
        f"'@a': the template has {was}, and the given value is {given}; neither can be loaded, so convert "
        "both to what a file can hold"
    )
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights({"a": leaf, "b": 1}, {"@a": value, "@b": 2})
    assert caught.value.mismatched == (reason,)
    found = set_weights({"a": leaf, "b": 1}, {"@a": value, "@b": 2}, strict=False)
    assert found["a"] is leaf
    assert found["b"] == 2
    assert set_weights({"a": leaf, "b": 1}, {"@a": leaf, "@b": 2})["a"] is leaf


@pytest.mark.parametrize("make", [moments, lambda number: np.longdouble(number)])
def test_arrays_that_no_file_holds_may_be_equal(make: Any) -> None:
    leaf = make(1)
    assert set_weights({"a": leaf, "b": 1}, {"@a": make(1), "@b": 2})["a"] is leaf


class Setting(enum.Enum):
    OFF, ON = 0, np.float32(1)


@pytest.mark.parametrize(
    ("leaf", "value"),
    [
        (print, len),
        (Setting.OFF, Setting.ON),
        (b"a", b"b"),
        (SimpleNamespace(rate=1), SimpleNamespace(rate=2)),
        (np.float32, np.float16),
        (print, None),
    ],
)
def test_settings_stay_those_of_the_template(leaf: Any, value: Any) -> None:
    assert set_weights({"a": leaf, "b": 1}, {"@a": value, "@b": 2}) == {"a": leaf, "b": 2}


class Foreign:
    """An array of another library."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("value", "kind"),
    [([1, 2], "builtins.list"), ((1, 2), "builtins.tuple"), (Foreign(), "test_weights.Foreign")],
)
def test_what_numpy_converts_is_reported(value: Any, kind: str) -> None:
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights({"a": np.zeros(2), "b": 1}, {"@a": value, "@b": 2})
    assert caught.value.mismatched == (
        f"'@a': the given value is of type {kind}; convert it with np.asarray",
    )


def test_a_traced_value_only_replaces_a_jax_array() -> None:
    template = {
        "array": np.zeros(4, np.float32),
        "scalar": np.float32(0),
        "python": 1.5,
        "foreign": struct((4,), np.float64),
        "jax": jnp.zeros(4),
    }
    values = {f"x.{name}": jnp.ones(np.shape(leaf)) for name, leaf in template.items()}

    def traced(values: Any, **options: Any) -> Any:
        rename = {f"@{name}": f"x.{name}" for name in template}
        return set_weights(template, values, rename=rename, cast=True, **options)

    with pytest.raises(WeightsMismatchError) as caught:
        jax.jit(traced)(values)
    assert caught.value.mismatched == tuple(
        f"'@{name}': the given value is traced, so it can only replace a JAX array"
        for name in ("array", "foreign", "python", "scalar")
    )
    del template["foreign"], values["x.foreign"]  # which is abstract, so it cannot be kept
    found: list[Any] = []
    jax.jit(lambda values: found.append(traced(values, strict=False)))(values)
    assert found[0]["array"] is template["array"]
    assert isinstance(found[0]["jax"], jax.core.Tracer)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "dtype", [np.longdouble, object, "U3", "M8[s]", [("a", np.float32)], jax.dtypes.float0]
)
def test_nothing_fits_a_dtype_that_no_file_holds(dtype: Any, strict: bool, tmp_path: Path) -> None:
    save_pytree({"a": np.zeros(2, np.float32), "b": 1}, tmp_path / "file")
    leaf = struct((2,), np.dtype(dtype))
    with pytest.raises(WeightsMismatchError) as caught:
        load_into_pytree({"a": leaf, "b": 0}, tmp_path / "file", cast=True, strict=strict)
    assert [line.split(":")[0] for line in caught.value.mismatched] == ["'@a'"]
    with pytest.raises(WeightsMismatchError) as caught:
        load_into_pytree({"a": 0.0, "b": 0, "c": leaf}, tmp_path / "file", strict=strict)
    assert caught.value.missing == ("@c",)


def test_a_tree_without_data_takes_its_own_leaves(tmp_path: Path) -> None:
    tree = {"f": print}
    assert set_weights(tree, pytree2dict(tree)) == tree
    assert set_weights(tree, pytree2dict({"p": tree}), prefix="@p") == tree
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights(tree, {"@f": np.zeros(1)})
    assert caught.value.unexpected == ("@f",)


def test_byte_order_is_no_part_of_a_template(tmp_path: Path) -> None:
    values = np.arange(3, dtype=">f4")
    save_pytree({"x": values}, tmp_path / "file")
    template = {"x": struct(values.shape, values.dtype)}
    for cast in (False, True):
        found = load_into_pytree(template, tmp_path / "file", cast=cast)
        assert_same(found, {"x": jnp.arange(3, dtype=np.float32)})
        assert_same(set_weights(template, {"@x": values}, cast=cast), found)


def test_nothing_at_a_prefix_is_all_missing(tmp_path: Path) -> None:
    save_pytree({"params": {"w": 1}}, tmp_path / "file")
    with pytest.raises(WeightsMismatchError) as caught:
        load_into_pytree({"w": 1, "b": 2, "f": print}, tmp_path / "file", prefix="@param")
    assert caught.value.missing == ("@b", "@w")


def test_an_error_below_a_prefix_says_where(tmp_path: Path) -> None:
    content = safetensors.numpy.save(
        {"fc": np.zeros(1, np.int8), "fc.weight": np.zeros(1, np.int8)}
    )
    with pytest.raises(
        TreeStructureError, match="the names in the BytesIO below 'fc' do not form a tree"
    ):
        load_pytree(io.BytesIO(content), prefix="fc")


@pytest.mark.parametrize("separator", ["", "."])
def test_nothing_is_read_if_the_names_form_no_tree(separator: str) -> None:
    names = ["w", "w.absmax"] if not separator else ["w", "w.", "w.absmax"]
    content = safetensors.numpy.save({name: np.zeros(1, np.int8) for name in names})
    calls: list[int] = []
    with pytest.raises(TreeStructureError, match="do not form a tree"):
        load_pytree(
            io.BytesIO(content),
            separator=separator,
            progress=lambda done, total: calls.append(done),
        )
    assert not calls


@pytest.mark.parametrize(
    ("rename", "kind"),
    [(lambda _: None, "NoneType"), (lambda _: ["@a"], "list"), ({"@a": "@a", "@b": 5}, "int")],
)
def test_rename_gives_strs(rename: Any, kind: str) -> None:
    with pytest.raises(TypeError) as caught:
        set_weights({"a": 1, "b": 2}, {"@a": 3, "@b": 4}, rename=rename)
    where = "@b" if kind == "int" else "@a"
    assert kind in str(caught.value)
    assert where in str(caught.value)


def test_a_mapping_that_renames_nothing_is_reported() -> None:
    template, found = {"a": 1, "b": 2}, {"x.a": 3, "x.b": 4}
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights(template, found, rename={"x.a": "@a", "@b": "x.c"})
    assert "    '@a'" in str(caught.value)
    assert "    '@b': there is no 'x.c' (nearest: 'x.b')" in str(caught.value)
    assert "  rename= maps from key paths that the template lacks: 'x.a'" in str(caught.value)
    assert caught.value.missing == ("@a", "@b")


def test_what_cast_does_not_convert_is_reported() -> None:
    template = {"a": np.zeros(3, np.int32)}
    for shape, expected in ((3, True), (4, False)):
        with pytest.raises(WeightsMismatchError) as caught:
            set_weights(template, {"@a": np.zeros(shape, np.float32)}, cast=True)
        assert ("which cast=True does not convert" in str(caught.value)) is expected


def test_a_prefix_that_is_not_there_gets_the_nearest(tmp_path: Path) -> None:
    save_pytree({"params": {"w": 1, "b": 2}, "opt": [3]}, tmp_path / "file")
    for prefix, found in (("params", "@params"), ("@param@w", "@params@w"), ("@op", "@opt")):
        with pytest.raises(WeightsMismatchError) as caught:
            load_pytree(tmp_path / "file", prefix=prefix)
        assert f"nothing at the prefix '{prefix}' (nearest: '{found}')" in str(caught.value)
    save_pytree({"params": (), "opt": None}, tmp_path / "file")
    with pytest.raises(WeightsMismatchError, match="at the prefix '@x'; it has no leaves"):
        load_pytree(tmp_path / "file", prefix="@x")


def test_the_nearest_names_are_looked_for_among_so_many_characters() -> None:
    names = ["a" * 30_000, "b" * 10_000, "c"]
    assert complaints._up_to(40_000, names) == names[:2]


def test_a_function_that_renames_gives_whole_names_also_below_a_prefix(tmp_path: Path) -> None:
    save_pytree({"m": {"a": 5}}, tmp_path / "file")
    found = load_into_pytree({"a": 0}, tmp_path / "file", prefix="@m", rename=lambda p: "@m" + p)
    assert found == {"a": 5}
    with pytest.raises(WeightsMismatchError, match="missing"):
        load_into_pytree({"a": 0}, tmp_path / "file", prefix="@m", rename=lambda p: p)


def test_a_function_of_the_template_is_no_array() -> None:
    template = {"w": np.ones(2), "f": len}
    with pytest.raises(WeightsMismatchError) as caught:
        set_weights(template, {"@w": len, "@f": len})
    assert caught.value.missing == ()
    [text] = caught.value.mismatched
    assert text.startswith("'@w': the given value is not an array")
