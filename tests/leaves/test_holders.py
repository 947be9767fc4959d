"""Objects that hold arrays but are not pytree nodes. Leaving them out would lose the arrays."""

import io
import logging
import types
from collections import Counter, UserDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pytree2safetensors import (
    Rule,
    UnsupportedLeafError,
    load_into_pytree,
    load_pytree,
    save_pytree,
)
from pytree2safetensors._leaves.holders import _Kind, holders_in

ARRAY = np.ones(3, np.float32)
STRUCT: Any = jax.ShapeDtypeStruct  # JAX gives these constructors no types
SPEC: Any = PartitionSpec
FINFO: Any = jnp.finfo


@dataclass
class State:
    params: Any
    step: int = 5


@dataclass(slots=True)
class Slotted:
    params: Any = field(init=False)


class Below(Slotted):
    """A class with slots, and attributes of its own."""


class Model:
    """A model that is called, as in other libraries."""

    def __init__(self, weights: Any) -> None:
        self.weights = weights

    def __call__(self, x: Any) -> Any:
        return x

    def loss(self, x: Any) -> Any:
        return x


class Hashed(State):
    __hash__ = object.__hash__


class Dict(dict[str, Any]):
    pass


class List(list[Any]):
    pass


class Tuple(tuple[Any, ...]):
    __slots__ = ()


class Unreadable:
    """An object whose attributes must not be read by its own code."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __getattribute__(self, name: str) -> Any:
        if name in {"value", "dtype", "__class__"}:
            return object.__getattribute__(self, name)
        raise AssertionError(name)


class Wrong(RuntimeError):
    """An error of a class of the user."""


class Proxy:
    """An object that stands for another, which is not there."""

    @property  # type: ignore[misc] # as of a proxy
    def __class__(self) -> Any:
        raise Wrong


class Unhashable(type):
    __hash__ = None  # type: ignore[assignment] # as in a class that defines __eq__

    def __eq__(cls, other: object) -> bool:
        raise Wrong


class Finding(type):
    """A class of classes that looks for attributes itself."""

    def __getattr__(cls, name: str) -> Any:
        raise Wrong


class Answering(type):
    """A class of classes that have any attribute."""

    def __getattr__(cls, name: str) -> Any:
        return 1


class Hiding(type):
    @property
    def __mro__(cls) -> Any:
        raise Wrong

    @property  # type: ignore[misc] # Python allows it
    def __dict__(cls) -> Any:  # type: ignore[override] # as above
        raise Wrong


class Shy(np.ndarray):
    """An array that calculates its attributes."""

    @property
    def dtype(self) -> Any:
        raise Wrong

    shape = flat = dtype


class Lazy(partial[Any]):
    @property
    def func(self) -> Any:
        raise Wrong

    args = keywords = func


class Iterated(list[Any]):
    def __iter__(self) -> Any:
        raise Wrong


class Mapped(dict[str, Any]):
    def keys(self) -> Any:
        raise Wrong

    __iter__ = values = items = __getitem__ = keys  # type: ignore[assignment] # none is called


def made(meta: type, held: Any) -> Any:
    found = meta("Made", (), {})()
    object.__setattr__(found, "held", held)
    return found


def with_mapped_dict(held: Any) -> Any:
    found = State(None)
    found.__dict__ = Mapped(held=held)
    return found


class WithoutDict:
    __slots__ = ()

    @property
    def __dict__(self) -> Any:  # type: ignore[override] # as of an object with a broken proxy
        raise RuntimeError


def keep(held: Any) -> Any:
    return held


def slotted(params: Any) -> Slotted:
    found = Below()
    found.params = params
    return found


def cyclic(held: Any) -> State:
    found = State([held])
    found.params.insert(0, found)
    return found


def deep(held: Any) -> State:
    for _ in range(10_000):
        held = [held]
    return State(held)


def boxed(held: Any) -> Any:
    box = np.empty((1, 2), object)
    box[0, 1] = held
    return box


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "a dataclass": State,
    "a dataclass with slots": slotted,
    "a dict in a dataclass": lambda held: State({"w": {"w": held}}),
    "a dataclass in a dataclass": lambda held: State([State((held,))]),
    "a model that is called": Model,
    "an object that reads no attribute": Unreadable,
    "a dict of another class": lambda held: Dict(w=held),
    "a list of another class": lambda held: List([held]),
    "a tuple of another class": lambda held: Tuple([held]),
    "a deque": lambda held: deque([held]),
    "a set": lambda held: {Hashed(held)},
    "a UserDict": lambda held: UserDict(w=held),
    "a namespace": lambda held: types.SimpleNamespace(w=held),
    "a mapping proxy": lambda held: types.MappingProxyType({"w": held}),
    "an array of objects": boxed,
    "an argument of a partial function": lambda held: partial(keep, held),
    "a keyword of a partial function": lambda held: partial(keep, held=held),
    "the function of a partial function": lambda held: partial(Model(held), 1),
    "a cycle": cyclic,
    "a deep list": deep,
    # These run code of the user if they are looked at as usual.
    "a class that cannot be hashed": lambda held: State(made(Unhashable, held)),
    "a class that looks for attributes": lambda held: State(made(Finding, held)),
    "a class with any attribute": lambda held: State(made(Answering, held)),
    "a class that hides its bases": lambda held: State(made(Hiding, held)),
    "an object without a class": lambda held: State([Proxy(), held]),
    "an array that calculates": lambda held: State(boxed(held).view(Shy)),
    "a lazy partial function": lambda held: State(Lazy(keep, held)),
    "a list that iterates": lambda held: State(Iterated([held])),
    "a dict that looks itself": lambda held: State(Mapped(w=held)),
    "attributes in such a dict": lambda held: State(with_mapped_dict(held)),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_an_object_that_holds_arrays_is_not_left_out(holder: str, tmp_path: Path) -> None:
    leaf = HOLDERS[holder](ARRAY)
    for tree in (leaf, {"state": leaf, "w": ARRAY}, [print, leaf]):
        with pytest.raises(UnsupportedLeafError, match=r"which holds arrays(.|\n)*pytree node"):
            save_pytree(tree, tmp_path / "file", unsupported="skip")
    assert not (tmp_path / "file").exists()


OTHER_VALUES: list[Any] = [
    *(1, "text", None, np.array(["a"]), np.array("a").view(Shy), np.ma.masked_array([1.0])),
    *(np.float32(3), np.True_, np.datetime64(0, "s"), FINFO(np.float32), np.finfo(np.float32)),
    STRUCT((3,), jnp.float32),
]


@pytest.mark.parametrize("holder", HOLDERS)
def test_an_object_without_arrays_is_left_out(holder: str) -> None:
    for held in OTHER_VALUES:
        file = io.BytesIO()
        save_pytree({"state": HOLDERS[holder](held), "w": ARRAY}, file, unsupported="skip")
        file.seek(0)
        assert list(load_pytree(file)) == ["w"]


ARRAYS = [
    *(jnp.ones(2), jnp.float32(3), np.ones((), bool), np.ones(2).view(Shy)),
    jax.random.key(0),
]


@pytest.mark.parametrize("array", ARRAYS, ids=range(len(ARRAYS)))
def test_any_array_is_found(array: Any) -> None:
    with pytest.raises(UnsupportedLeafError, match="which holds arrays"):
        save_pytree([State({"w": array})], io.BytesIO(), unsupported="skip")


def test_a_traced_array_is_found() -> None:
    def save(x: Any) -> None:
        save_pytree([State([x])], io.BytesIO(), unsupported="skip")

    with pytest.raises(UnsupportedLeafError, match="which holds arrays"):
        jax.jit(save)(1.0)


def closure(array: Any) -> Callable[[Any], Any]:
    return lambda x: x + array


class Color(Enum):
    RED = 1


def wrapped(x: Any, array: Any = ARRAY) -> Any:
    return x + array


wrapped.array = ARRAY  # type: ignore[attr-defined]
MESH = Mesh(np.array(jax.devices()[:1]), ("x",))
_ = MESH.device_ids  # which the mesh then keeps
OTHERS: dict[str, Any] = {
    "a function": wrapped,
    "a method": Model(ARRAY).loss,
    "a closure": closure(ARRAY),
    "a jitted function": jax.jit(partial(wrapped, array=ARRAY)),
    "a compiled function": jax.jit(wrapped).lower(1.0).compile(),
    "a cached function": lru_cache(partial(wrapped, array=ARRAY)),
    "a custom derivative": jax.nn.relu,
    "a function of NumPy": np.add,
    "a vectorized function": np.vectorize(len),
    "a partial function": partial(jax.nn.leaky_relu, negative_slope=0.1),
    "a scalar of a partial function": partial(jax.nn.leaky_relu, negative_slope=np.float32(0.1)),
    "a module": np,
    "a class": Model,
    "a dtype": np.dtype(np.float32),
    "a dtype of JAX": jnp.bfloat16,
    "a member": Color.RED,
    "an object": object(),
    "an object with a broken dict": WithoutDict(),
    "slots without values": Slotted(),
    "a counter": Counter(a=1),
    "a set": {1, 2},
    "an iterator": iter([ARRAY]),
    "a logger": logging.getLogger("pytree2safetensors.test"),
    "a generator of random numbers": np.random.default_rng(0),
    "a mesh": MESH,
    "a sharding": State(NamedSharding(MESH, SPEC("x"))),
    "a device": jax.devices()[0],
    "a structure": jax.tree.structure([1]),
}


@pytest.mark.parametrize("other", OTHERS)
def test_functions_and_the_like_are_left_out(other: str) -> None:
    file = io.BytesIO()
    save_pytree({"other": OTHERS[other], "w": ARRAY}, file, unsupported="skip")
    file.seek(0)
    assert list(load_pytree(file)) == ["w"]


@pytest.mark.parametrize("held", [1, ARRAY], ids=["no array", "an array"])
def test_an_object_is_visited_once(held: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    visited: list[Any] = []

    def visit(kind: _Kind, holder: Any) -> Any:
        visited.append(holder)
        return visit_once(kind, holder)

    visit_once = _Kind.held_by
    monkeypatch.setattr(_Kind, "held_by", visit)
    registry: list[Any] = [State(n) for n in range(100)]
    leaves = [State([registry]) for _ in range(50)]
    leaves[7].params.append(held)
    assert holders_in([*leaves, print]) == [n == 7 and held is ARRAY for n in range(51)]
    registry[5].params = held
    assert holders_in(leaves) == [held is ARRAY] * 50
    assert len(visited) <= 2 * (1 + 100 + 2 * 50) + 1


@pytest.mark.parametrize("rename", [None, [Rule("{=}", "{=}")]], ids=["names", "rules"])
def test_a_save_visits_an_object_once(rename: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    visited: list[Any] = []

    def visit(kind: _Kind, holder: Any) -> Any:
        visited.append(holder)
        return visit_once(kind, holder)

    visit_once = _Kind.held_by
    monkeypatch.setattr(_Kind, "held_by", visit)
    registry: list[Any] = [State(n) for n in range(100)]
    tree = [ARRAY, *(State(registry) for _ in range(50))]
    save_pytree(tree, io.BytesIO(), unsupported="skip", rename=rename)
    assert visited.count(registry) == 1


def test_a_rule_may_leave_out_an_object_that_holds_arrays() -> None:
    tree = {"state": State(ARRAY), "f": print, "w": ARRAY}
    file = io.BytesIO()
    rules = [Rule("{=}", "{=}")]
    with pytest.raises(UnsupportedLeafError, match=r"'@state': .*, which holds arrays\n"):
        save_pytree(tree, file, unsupported="skip", rename=rules)
    save_pytree(tree, file, unsupported="skip", rename=[Rule(None, "@state"), *rules])
    file.seek(0)
    assert list(load_pytree(file)) == ["w"]


def test_a_registered_class_is_stored(tmp_path: Path) -> None:
    registered = type("Registered", (State,), {})
    jax.tree_util.register_dataclass(registered, ["params", "step"], [])
    save_pytree(registered({"w": ARRAY}), tmp_path / "file", unsupported="skip")
    found = load_into_pytree(registered({"w": 0 * ARRAY}, 0), tmp_path / "file")
    assert (found.params["w"].tolist(), found.step) == ([1, 1, 1], 5)
