"""What several processes compare before they save, and how an error says what differs."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from placed import P
from pytree2safetensors import Rule
from pytree2safetensors._leaves.renaming import Rename
from pytree2safetensors._save import terms as save_terms
from pytree2safetensors._save.contents import collect
from pytree2safetensors._save.target import local_target, plan_save
from pytree2safetensors._save.words import Terms, difference, digest_of

SQUARE = np.zeros((4, 4), np.float32)


@pytest.fixture(autouse=True)
def _global(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take arrays on several devices for arrays of several processes."""

    def is_spread(leaf: Any) -> bool:
        return isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1

    monkeypatch.setattr(save_terms, "is_global", is_spread)


def terms_of(
    tree: Any,
    path: Path,
    size: int | None = None,
    rename: Rename | None = None,
    metadata: dict[str, str] | None = None,
) -> Terms:
    contents = collect(tree, metadata or {}, "raise", rename)
    target = local_target(str(path), size)
    plan = plan_save(contents, target, checksum=False)
    return save_terms.terms_of(contents, plan, target, save_terms.SaveOptions(True, False, size))


def difference_of(first: Terms, other: Terms) -> str:
    assert digest_of(first) != digest_of(other)
    return difference(first, other, 1)


def on(devices: Sequence[int], *axes: str | None, values: Any = SQUARE) -> Any:
    mesh = Mesh(np.array([jax.devices()[number] for number in devices]), ("x",))
    return jax.device_put(values, NamedSharding(mesh, P(*axes)))


@pytest.mark.parametrize("swap", [False, True])
def test_a_leaf_is_named_before_the_files_that_it_changes(tmp_path: Path, swap: bool) -> None:
    tree = {name: np.zeros(30, np.float32) for name in "abc"}
    more = {**tree, "d": np.zeros(3, np.float32)}
    terms = [terms_of(leaves, tmp_path, 200) for leaves in (tree, more)]
    found = difference_of(*(reversed(terms) if swap else terms))
    told = ["missing", "F32[3]"]
    one, other = reversed(told) if swap else told
    assert found == f"'@d' is {one} on process 0 and {other} on process 1"


def test_files_that_differ_for_another_reason(tmp_path: Path) -> None:
    tree = {"a": SQUARE, "b": SQUARE}
    one, other = (
        terms_of(tree, tmp_path, 64, [Rule("{*}", "{*}")], {"format": name})
        for name in ("pt", "pt" * 500)
    )
    assert difference_of(one, other) == (
        "the layout of the files is model-00001-of-00002.safetensors (256 bytes of 320), "
        "model-00002-of-00002.safetensors (256 bytes of 320) on process 0 and "
        "model-00001-of-00002.safetensors (1280 bytes of 1344), "
        "model-00002-of-00002.safetensors (1280 bytes of 1344) on process 1"
    )


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        ("x", "y" * 3, "'@a' is 'x' on process 0 and 'yyy' on process 1"),
        (7, 2**64, "'@a' is 7 on process 0 and int 0x10000000000000000 on process 1"),
        (
            "x" * 300 + "y" + "x" * 300,
            "x" * 300 + "z" + "x" * 300,
            f"'@a' is '{'x' * 99}...{'x' * 99}' on process 0 and on process 1, but the part that is not shown differs",
        ),
        (
            OrderedDict(b=1, a=1),
            OrderedDict(a=1, b=1),
            "the node '@a' is OrderedDict ['@b', '@a'] on process 0 and OrderedDict ['@a', '@b'] on "
            "process 1",
        ),
    ],
)
def test_kinds_are_told_in_words(tmp_path: Path, one: Any, other: Any, found: str) -> None:
    assert difference_of(*(terms_of({"a": leaf}, tmp_path / "f") for leaf in (one, other))) == found


def test_kinds_of_keys(tmp_path: Path) -> None:
    one, other = (
        terms_of(
            on([0, 1], "x", values=jax.random.split(jax.random.key(0, impl=name))), tmp_path / "f"
        )
        for name in ("rbg", "unsafe_rbg")
    )
    assert difference_of(one, other) == (
        "'' is U32[2, 4] key rbg in shards of [1] (devices 0, 1) on process 0 and "
        "U32[2, 4] key unsafe_rbg in shards of [1] (devices 0, 1) on process 1"
    )


@pytest.mark.parametrize(
    ("one", "other", "found"),  # a mesh and a spec; None for an array of one process
    [
        (
            ([0, 1], "x"),
            ([0, 1], None, "x"),
            "F32[4, 4] in shards of [2, 4] (devices 0, 1) on process 0 and "
            "F32[4, 4] in shards of [4, 2] (devices 0, 1) on process 1",
        ),
        (
            ([0, 1], "x"),
            ([1, 0], "x"),
            "F32[4, 4] in shards of [2, 4] (devices 0, 1) on process 0 and "
            "F32[4, 4] in shards of [2, 4] (devices 1, 0) on process 1",
        ),
        (
            None,
            ([0, 1],),
            "F32[4, 4] on process 0 and F32[4, 4] in shards of [4, 4] (devices 0, 1) on process 1",
        ),
    ],
)
def test_shards_are_told_in_words(tmp_path: Path, one: Any, other: Any, found: str) -> None:
    leaves = [SQUARE if place is None else on(*place) for place in (one, other)]
    terms = [terms_of({"a": leaf}, tmp_path / "f") for leaf in leaves]
    assert difference_of(*terms) == f"'@a' is {found}"


def test_shards_on_many_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_terms, "_LISTED", 2)
    orders = [0, 1, 2, 3], [0, 1, 3, 2]
    terms = [terms_of({"a": on(order, "x")}, tmp_path / "f") for order in orders]
    assert difference_of(*terms) == (
        "'@a' is F32[4, 4] in shards of [1, 4] (devices 0, 1 and 2 more) on process 0 and on process "
        "1, but its placement on the devices differs"
    )


def test_who_holds_a_replica_is_the_same_for_every_order(tmp_path: Path) -> None:
    one, other = (terms_of({"a": on(order)}, tmp_path / "f") for order in ([0, 1], [1, 0]))
    assert one == other


def test_rules_are_told_in_words(tmp_path: Path) -> None:
    rules = [Rule("a", "a", "i o -> i o")], [Rule("a", "a", "i o -> o i")]
    tree = {"a": on([0, 1], "x")}
    assert difference_of(*(terms_of(tree, tmp_path / "f", rename=rule) for rule in rules)) == (
        "'a' is F32[4, 4] in shards of [2, 4] (devices 0, 1) on process 0 and on process 1, but its "
        "rule or the shape of its leaf differs"
    )


def test_a_tensor_of_several_leaves(tmp_path: Path) -> None:
    rules = [Rule("a", "{p:q,k,v}", "(p i) o -> i o")]
    leaves = on([0, 1], "x"), on([1, 0], "x"), SQUARE
    trees = [dict(zip("qkv", order, strict=True)) for order in (leaves, leaves[::-1])]
    one, other = (terms_of(tree, tmp_path / "f", rename=rules) for tree in trees)
    assert difference_of(one, other) == (
        "'a' is F32[12, 4] in shards of [2, 4] (devices 1, 0) and in shards of [2, 4] (devices 0, 1) "
        "on process 0 and on process 1, but its placement on the devices differs"
    )
