"""No call keeps the caller's arrays until the garbage collector runs, even if it fails."""

import gc
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from placed import P
from pytree2safetensors import (
    PyTreeContainer,
    Rule,
    TreeStructureError,
    UnkeyedContainer,
    UnsupportedLeafError,
    WeightsMismatchError,
    dict2pytree,
    explain,
    load_into_pytree,
    load_pytree,
    pytree2dict,
    save_pytree,
    save_pytree_async,
    set_weights,
)

_RULES: Final = [Rule("a.w", "@w"), Rule("a.b", "@b")]


@pytest.fixture(autouse=True)
def _collector() -> Iterator[None]:
    yield
    gc.enable()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_pytree(fresh(), tmp_path / "fresh")
    save_pytree(flat(), tmp_path / "ruled", rename=_RULES)
    return tmp_path


def ones(*shape: int) -> jax.Array:
    return jnp.asarray(np.ones(shape, np.float32))


def fresh() -> Any:
    nodes = PyTreeContainer({"a": ones(2)}), UnkeyedContainer([ones(3)]), None
    return {"w": ones(4), "b": [ones(5), 3], "n": nodes}


def flat() -> dict[str, jax.Array]:
    return {"w": ones(4), "b": ones(8)}


def abstract() -> Any:
    return jax.eval_shape(fresh)


def sharded() -> Any:
    place = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), P("x"))
    return jax.tree.map(lambda leaf: jax.device_put(leaf, place), {"w": ones(8), "b": ones(8, 2)})


def nested(depth: int) -> Any:
    tree: Any = ones(1)
    for _ in range(depth):
        tree = [tree]
    return tree


def in_the_background(tree: Any, path: Path, fails: type = NoneType) -> None:
    # Not result(), because the runtime checks of the tests keep its future.
    assert type(save_pytree_async(tree, path).exception()) is fails
    save_pytree_async(1, io.BytesIO()).result()  # the thread has left the first one


def live_arrays() -> int:
    return len(jax.live_arrays())  # type: ignore[no-untyped-call] # JAX gives it no types


def assert_releases(call: Callable[[], object], fails: type[Exception] | None) -> None:
    def run() -> type[Exception] | None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - its type is compared
            return type(error)
        return None

    assert run() is fails  # before counting, because JAX caches arrays in its first call
    gc.collect()
    gc.disable()
    before = live_arrays()
    assert run() is fails
    assert live_arrays() == before


_CALLS: Final[Mapping[str, Callable[[Path], object]]] = {
    "a file": lambda path: save_pytree(fresh(), path / "a"),
    "a file by rules": lambda path: save_pytree(flat(), path / "a", rename=_RULES),
    "shards": lambda path: save_pytree(fresh(), path / "folder", max_shard_size=16),
    "a stream": lambda _: save_pytree(fresh(), io.BytesIO()),
    "in the background": lambda path: in_the_background(fresh(), path / "a"),
    "a failure in the background": lambda path: in_the_background(
        fresh(), path / "none" / "a", FileNotFoundError
    ),
    "pytree2dict": lambda _: pytree2dict(fresh()),
    "dict2pytree": lambda _: dict2pytree(pytree2dict(fresh())),
    "without a template": lambda path: load_pytree(path / "fresh"),
    "a concrete template": lambda path: load_into_pytree(fresh(), path / "fresh"),
    "an abstract template": lambda path: load_into_pytree(abstract(), path / "fresh"),
    "a template by rules": lambda path: load_into_pytree(flat(), path / "ruled", rename=_RULES),
    "a sharded template": lambda path: (
        save_pytree(sharded(), path / "a"),
        load_into_pytree(sharded(), path / "a"),
    ),
    "set_weights": lambda _: set_weights(fresh(), pytree2dict(fresh())),
    "set_weights by rules": lambda _: set_weights(
        flat(), {"a.w": ones(4), "a.b": ones(8)}, rename=_RULES
    ),
    "explain": lambda path: explain(fresh(), path / "fresh"),
}


@pytest.mark.parametrize("call", _CALLS.values(), ids=_CALLS)
def test_a_call_keeps_no_array(call: Callable[[Path], object], path: Path) -> None:
    assert_releases(lambda: call(path), None)


_FAILURES: Final[Mapping[str, tuple[Callable[[Path], object], type[Exception]]]] = {
    "an unsupported leaf": (
        lambda path: save_pytree([fresh(), object()], path / "a"),
        UnsupportedLeafError,
    ),
    "a tree that is too deep": (
        lambda path: save_pytree({"a": nested(20_000)}, path / "a"),
        TreeStructureError,
    ),
    "two kinds of node": (
        lambda _: dict2pytree({"@c@d": ones(1), "@a#0": ones(2), "@a@b": ones(3)}),
        TreeStructureError,
    ),
    "a gap": (
        lambda _: dict2pytree({"@a#0": ones(1), r"@b#\(1)": ones(2), "@c#0": ones(3)}),
        TreeStructureError,
    ),
    "a gap at the root": (lambda _: dict2pytree({r"#\(1)": ones(2)}), TreeStructureError),
    "a template that does not fit": (
        lambda path: load_into_pytree([fresh()], path / "fresh"),
        WeightsMismatchError,
    ),
    "values that do not fit": (
        lambda _: set_weights(fresh(), {"@w": ones(5)}),
        WeightsMismatchError,
    ),
    "an explanation of a tree that is too deep": (
        lambda path: explain(nested(20_000), path / "fresh"),
        TreeStructureError,
    ),
}


@pytest.mark.parametrize(("call", "fails"), _FAILURES.values(), ids=_FAILURES)
def test_a_failed_call_keeps_no_array(
    call: Callable[[Path], object], fails: type[Exception], path: Path
) -> None:
    assert_releases(lambda: call(path), fails)


@pytest.mark.skipif(
    sys.version_info >= (3, 12),
    reason="since Python 3.12, a context that replaces an error keeps it in a cycle",
)
@pytest.mark.parametrize("kind", ["a missing folder", "a failed commit"])
def test_an_error_of_the_system_keeps_no_array(
    kind: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "a missing folder":
        assert_releases(lambda: save_pytree(fresh(), path / "none" / "a"), FileNotFoundError)
        return
    monkeypatch.setattr(os, "replace", lambda *_, **__: os.fstat(-1))
    assert_releases(lambda: save_pytree(fresh(), path / "folder", max_shard_size=16), OSError)
