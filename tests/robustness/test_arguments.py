"""Wrong arguments of public functions raise a short TypeError, even if type checks are off."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import pytree2safetensors as p2s
from pytree2safetensors import PyTreeContainer, dict2pytree, save_pytree, set_weights

BIG = {f"layer{number}": {"w": float(number)} for number in range(20_000)}
BYTES = b"x" * 20_000_000
PATH = "must be a path, as a str or an os.PathLike, or a binary file object, not"
OF_BYTES = (
    "; os.fsdecode converts a path to a str, and io.BytesIO converts contents to a file object"
)
ONE_PATH = "pass one path, such as that of a folder of shards or of its index"
SPEC: Any = jax.sharding.PartitionSpec
PLACED = jax.sharding.SingleDeviceSharding(jax.devices()[0])
OF_SHARDINGS = (
    "for a tree of shardings, load into a template: jax.tree.map(lambda leaf, sharding: "
    "jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings)"
)
p: Any = p2s  # the mistakes below are none of its types
used = p2s.save_pytree  # the first use of a name imports JAX, which takes its time

WRONG: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: p.save_pytree("model.safetensors", BIG),
        f"save_pytree: path {PATH} dict; the tree comes first, the path second",
    ),
    (
        lambda: p.save_pytree_async("model.safetensors", [BIG]),
        f"save_pytree_async: path {PATH} list; the tree comes first, the path second",
    ),
    (
        lambda: p.load_into_pytree("model.safetensors", BIG),
        f"load_into_pytree: path {PATH} dict; the template comes first, the path second",
    ),
    (
        lambda: p.explain("model.safetensors", BIG),
        f"explain: path {PATH} dict; the template comes first, the path second",
    ),
    (
        lambda: p.load_into_pytree(BIG, ["a.safetensors", Path("b.safetensors")]),
        f"load_into_pytree: path {PATH} list; {ONE_PATH}",
    ),
    (
        lambda: p.load_pytree(("a.safetensors", "b.safetensors")),
        f"load_pytree: path {PATH} tuple; {ONE_PATH}",
    ),
    (
        lambda: p.save_pytree(BIG, ["a.safetensors"]),
        f"save_pytree: path {PATH} list; {ONE_PATH}",
    ),
    (
        lambda: p.load_into_pytree("model.safetensors", []),
        f"load_into_pytree: path {PATH} list; the template comes first, the path second",
    ),
    (
        lambda: p.load_into_pytree("model.safetensors", ("a", 3)),
        f"load_into_pytree: path {PATH} tuple; the template comes first, the path second",
    ),
    (
        lambda: p.explain(BIG, "model", prefix=3),
        "explain: prefix must be a spelled key path, which is a str, not int",
    ),
    (
        lambda: p.set_weights(BIG, [BIG]),
        "set_weights: dictionary must be a mapping of names, which are strs, to leaves, not list; "
        "the template comes first, the dictionary second",
    ),
    (
        lambda: p.set_weights(BIG, {3: BYTES}),
        "set_weights: dictionary must be a mapping of names, which are strs, to leaves, not a dict "
        "with a key of type int; the template comes first, the dictionary second",
    ),
    (
        lambda: p.load_pytree(BYTES),
        f"load_pytree: path {PATH} bytes{OF_BYTES}",
    ),
    (
        lambda: p.load_abstract(path=BYTES),
        f"load_abstract: path {PATH} bytes{OF_BYTES}",
    ),
    (lambda: p.load_metadata(None), f"load_metadata: path {PATH} NoneType"),
    (
        lambda: p.save_pytree(BIG, "model", metadata={"step": BYTES}),
        "save_pytree: metadata must be a mapping of strs to strs, not a dict with a value of type "
        "bytes at 'step'; json.dumps converts a value to a str, and json.loads converts it back",
    ),
    (
        lambda: p.save_pytree_async(BIG, "model", metadata={"step": 3}),
        "save_pytree_async: metadata must be a mapping of strs to strs, not a dict with a value of "
        "type int at 'step'; json.dumps converts a value to a str, and json.loads converts it back",
    ),
    (
        lambda: p.save_pytree(BIG, "model", metadata=3),
        "save_pytree: metadata must be a mapping of strs to strs, not int",
    ),
    (
        lambda: p.save_pytree(BIG, "model", metadata={1: "a"}),
        "save_pytree: metadata must be a mapping of strs to strs, not a dict with a key of type int; "
        "json.dumps converts a value to a str, and json.loads converts it back",
    ),
    (
        lambda: p.save_pytree(BIG, "model", unsupported="x" * 10_000_000),
        f"save_pytree: unsupported must be 'raise' or 'skip', not '{'x' * 40}'...'{'x' * 40}' "
        "(10,000,000 characters)",
    ),
    (
        lambda: p.save_pytree(BIG, "model", max_shard_size=1.5),
        "save_pytree: max_shard_size must be a number of bytes, or a str such as '5GB', not float",
    ),
    (
        lambda: p.save_pytree(BIG, "model", progress=3),
        "save_pytree: progress must be a bool or a function, not int",
    ),
    (
        lambda: p.load_into_pytree(BIG, "model", unexpected="ignore"),
        "load_into_pytree: unexpected must be 'raise' or 'skip', not 'ignore'",
    ),
    (
        lambda: p.load_abstract("model", sharding="x"),
        "load_abstract: sharding must be a sharding, or a function of a spelled key path and a "
        "jax.ShapeDtypeStruct, not 'x'",
    ),
    (
        lambda: p.load_abstract("model", sharding={"w": PLACED, "b": [PLACED]}),
        "load_abstract: sharding must be a sharding, or a function of a spelled key path and a "
        f"jax.ShapeDtypeStruct, not dict; {OF_SHARDINGS}",
    ),
    (
        lambda: p.load_abstract("model", sharding=[PLACED]),
        "load_abstract: sharding must be a sharding, or a function of a spelled key path and a "
        f"jax.ShapeDtypeStruct, not list; {OF_SHARDINGS}",
    ),
    (
        lambda: p.load_abstract("model", sharding=SPEC("x")),
        "load_abstract: sharding must be a sharding, or a function of a spelled key path and a "
        f"jax.ShapeDtypeStruct, not {SPEC.__module__}.{SPEC.__name__}; "
        "a jax.sharding.NamedSharding has a mesh and a PartitionSpec",
    ),
    (
        lambda: p.load_abstract("model", sharding=jax.sharding.Mesh(jax.devices(), ("x",))),
        "load_abstract: sharding must be a sharding, or a function of a spelled key path and a "
        f"jax.ShapeDtypeStruct, not {jax.sharding.Mesh.__module__}.Mesh; a jax.sharding.NamedSharding has a "
        "mesh and a PartitionSpec",
    ),
    (
        lambda: p.load_pytree("model", prefix=("@a",)),
        "load_pytree: prefix must be a spelled key path, which is a str, not tuple",
    ),
    (
        lambda: p.load_pytree("model", separator=None),
        "load_pytree: separator must be a str such as '.', not NoneType",
    ),
    (
        lambda: p.load_into_pytree(BIG, "model", rename="layers"),
        "load_into_pytree: rename must be a function, a mapping of strs to strs, or a sequence of "
        "Rules, not 'layers'",
    ),
    (
        lambda: p.load_into_pytree(BIG, "model", rename={"@a": "b", "@b": 5}),
        "load_into_pytree: rename must be a function, a mapping of strs to strs, or a sequence of "
        "Rules, not a dict with a value of type int at '@b'",
    ),
    (
        lambda: p.load_into_pytree(BIG, "model", rename=[BYTES]),
        "load_into_pytree: rename must be a function, a mapping of strs to strs, or a sequence of "
        "Rules, not a list with an item of type bytes",
    ),
    (
        lambda: p.load_into_pytree(BIG, "model", rename=(p.Rule("a", "a"), ("a", "b"))),
        "load_into_pytree: rename must be a function, a mapping of strs to strs, or a sequence of "
        "Rules, not a tuple with an item of type tuple",
    ),
    (
        lambda: p.explain(BIG, "model", rename=p.Rule("a", "a")),
        "explain: rename must be a function, a mapping of strs to strs, or a sequence of Rules, not a "
        "Rule; put it in a list",
    ),
    (
        lambda: p.load_pytree("model", mmap=np.float32(1)),
        "load_pytree: mmap must be a bool, not numpy.float32",
    ),
    (
        lambda: p.load_pytree("model", mmap=np.bool_(True)),
        f"load_pytree: mmap must be a bool, not numpy.{np.bool_.__name__}",
    ),
    (
        lambda: p.dict2pytree([BIG]),
        "dict2pytree: dictionary must be a mapping of names, which are strs, to leaves, not list",
    ),
    (
        lambda: p.PyTreeContainer([BIG]),
        "PyTreeContainer: attrs must be a mapping of names, which are strs, to values, not list",
    ),
    (
        lambda: p.Rule(BYTES, "@a"),
        "Rule: name must be a str with placeholders, or None, not bytes",
    ),
    (lambda: p.Rule("a", "@a", "p -> p", p="3"), "Rule: a size must be an int, not '3'"),
    (
        lambda: p.Rule("a", "@a", pattern="o i -> i o"),
        "Rule: pattern is positional, as in Rule(name, path, pattern)",
    ),
    (
        lambda: p.Rule("a", path=None),
        "Rule: path is positional, as in Rule(name, path, pattern)",
    ),
    (
        lambda: p.Rule(name="a", path="@a"),
        "Rule: name is positional, as in Rule(name, path, pattern)",
    ),
    (lambda: p.UnkeyedContainer(3), "UnkeyedContainer: children must be an iterable, not int"),
    *(
        (
            lambda option=option: p.save_pytree(BIG, "model", **{option: BIG}),
            f"save_pytree: {option} must be a bool, not dict",
        )
        for option in ("durable", "checksum")
    ),
    *(
        (
            lambda option=option: p.load_into_pytree(BIG, "model", **{option: "yes"}),
            f"load_into_pytree: {option} must be a bool, not 'yes'",
        )
        for option in ("verbose", "strict", "cast", "mmap")
    ),
]


# The type checks of the test run come before these, which have no decorator for the sake of speed.
UNDECORATED: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: p.string2keypath(BYTES),
        "string2keypath: string must be a spelled key path, which is a str, not bytes",
    ),
    (lambda: p.keypath2string(3), "keypath2string: path must be a tuple of keys, not int"),
    (
        lambda: p.keypath2string((jax.tree_util.DictKey("a"), "b")),
        "cannot spell 'b' of type builtins.str: not one of JAX's own key classes (where the node "
        "type is registered, give a GetAttrKey instead of this str), in a key path that begins '@a'",
    ),
    (
        lambda: p.keypath2string((3,)),
        "cannot spell 3 of type builtins.int: not one of JAX's own key classes (where the node type is "
        "registered, give a SequenceKey instead of this int), in the first key of a key path",
    ),
    (
        lambda: p.keypath2string((("a", 1),)),
        "cannot spell ('a', 1) of type builtins.tuple: not one of JAX's own key classes (where the node "
        "type is registered, give a DictKey instead of this tuple), in the first key of a key path",
    ),
    (
        lambda: p.PyTreeContainer().__setitem__(3, 3),
        "an attribute name must be a str, not int",
    ),
    (lambda: p.save_pytree(BIG), "save_pytree() missing 1 required positional argument: 'path'"),
    (
        lambda: p.load_pytree("model", BIG),
        "load_pytree: only path is positional; load_into_pytree(template, path) loads into a template",
    ),
    (
        lambda: p.save_pytree(BIG, "model", "5GB"),
        "save_pytree() takes 2 positional arguments but 3 were given",
    ),
    (
        lambda: p.load_pytree("model", x=1),
        "load_pytree() got an unexpected keyword argument 'x'",
    ),
    *(
        (
            lambda key=key: p.keypath2string((key,)),
            f"cannot spell {shown}: not one of JAX's own key classes, in the first key of a key path",
        )
        for key, shown in (
            (
                BIG,
                "{'layer0': {'w': 0.0}, 'layer1': {'w': 1.0}, 'layer10': {'w': 10.0}, 'layer100': "
                "{'w': 100.0}, ...} of type builtins.dict",
            ),
            (BYTES, f"b'{'x' * 95}... of type builtins.bytes"),
        )
    ),
]


def message_of(work: Callable[[], Any]) -> str:
    """The message of a wrong call, which comes quickly and shows no other exception."""
    start = time.process_time()
    try:
        work()
    except (TypeError, p2s.KeyPathError) as error:
        assert type(error) in {TypeError, p2s.KeyPathError}
        assert error.__cause__ is None
        assert error.__context__ is None or error.__suppress_context__
        return f"{error}{' (slow)' if time.process_time() - start > 0.05 else ''}"
    return "nothing"


@pytest.mark.parametrize(("work", "text"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_argument_is_a_short_type_error(work: Callable[[], Any], text: str) -> None:
    assert message_of(work) == text
    assert len(text) < 1000


@pytest.mark.parametrize(
    ("options", "variables"),
    [([], {"JAXTYPING_DISABLE": "0"}), ([], {"JAXTYPING_DISABLE": "1"}), (["-O"], {})],
    ids=["on", "off", "-O"],
)
def test_wrong_arguments_are_found_with_and_without_type_checks(
    options: list[str], variables: dict[str, str]
) -> None:
    found = subprocess.run(
        [sys.executable, *options, __file__],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables},
        capture_output=True,
        check=True,
        text=True,
    )
    assert json.loads(found.stdout) == [text for _, text in [*WRONG, *UNDECORATED]]


if __name__ == "__main__":
    print(json.dumps([message_of(work) for work, _ in [*WRONG, *UNDECORATED]]))


def test_names_are_strs() -> None:
    with pytest.raises(TypeError):
        dict2pytree({"@a": 1, 2: 3})  # type: ignore[dict-item] # what is tested
    with pytest.raises(TypeError):
        set_weights({"a": 1}, {"@p@a": 1, 2: 3}, prefix="@p")  # type: ignore[dict-item] # what is tested
    with pytest.raises(TypeError):
        save_pytree({"a": 1}, io.BytesIO(), metadata={"a": "b", 3: "c"})  # type: ignore[dict-item] # what is tested
    with pytest.raises(TypeError):
        PyTreeContainer({"a": 1, 2: 3})  # type: ignore[dict-item] # what is tested
