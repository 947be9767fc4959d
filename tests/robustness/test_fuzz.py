"""Whatever a file contains, loading it returns a correct tree or raises a documented exception."""

import io
import json
import os
import random
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from hypothesis import settings

from hostile import (
    MUTATORS,
    VALUES,
    Mutation,
    attempt,
    bounded_memory,
    check_against_peer,
    check_file,
    mutated_bytes,
    mutated_header,
    mutated_json,
    mutated_names,
    no_hang,
    structure_of,
    tensors_of,
)
from pytree2safetensors import load_abstract, load_metadata, load_pytree, save_pytree
from pytree2safetensors._format import header as header_format

pytestmark = pytest.mark.fuzz

# Together; each takes some milliseconds, and shows less than an example of Hypothesis does.
MUTATIONS = int(os.environ.get("HOSTILE_MUTATIONS", 25 * settings().max_examples))
# A random seed where Hypothesis has one. A failure shows it, and so can be repeated.
SEED = os.environ.get(
    "HOSTILE_SEED", "0" if settings().derandomize else f"{random.SystemRandom().random()}"
)


@pytest.mark.parametrize("kind", MUTATORS)
def test_a_mutated_file_is_loaded_right_or_refused(kind: str) -> None:
    loaded = 0
    for number in range(MUTATIONS // len(MUTATORS)):
        mutation = Mutation(kind, SEED, number)
        content = mutation.make()
        try:
            # Watching memory takes ten times as long as all the rest.
            memory = bounded_memory(len(content)) if number % 25 == 0 else nullcontext()
            with no_hang(), memory:
                found = check_file(content)
            check_against_peer(content)
        except BaseException:
            print(f"{mutation!r} makes {content[:5000]!r}", file=sys.stderr)
            raise
        loaded += not isinstance(found, BaseException)
    # It tests little if everything loads, or nothing.
    assert 0 < loaded < MUTATIONS // len(MUTATORS)


def test_headers_of_the_usual_form_are_read_as_any_other() -> None:
    quick = 0
    chance = random.Random(f"header {SEED}")
    for _ in range(MUTATIONS):
        text = chance.choice(HEADERS)
        for _ in range(chance.randrange(3)):
            start = chance.randrange(len(text) + 1)
            piece = chance.choice(
                [*'{}[]:,"\\0123é\x01F ', "", "-1", text[: chance.randint(0, 60)]]
            )
            text = text[:start] + piece + text[start + chance.randrange(3) :]
        found = (
            header_format._read_compact(text) if text[:1] == "{" else None
        )  # `parse` asks that first
        if found is not None:
            assert found == header_format._read(text, "the file"), text
            quick += 1
    assert MUTATIONS / 10 < quick < MUTATIONS / 2  # it tests little otherwise


def header_of(tree: Any, **options: Any) -> str:
    file = io.BytesIO()
    save_pytree(tree, file, **options)
    content = file.getvalue()
    return content[8 : 8 + int.from_bytes(content[:8], "little")].decode()


HEADERS = [
    header_of({"a": jnp.ones((2, 3)), "b": [jnp.zeros(2), jnp.ones(2)], "é": jnp.int8(1)}),
    header_of((jnp.zeros((0, 2)), 1, "text"), metadata={"run": 'a "quoted", {braced} text'}),
    '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
    '{"__metadata__":{"format":"pt"}}',
    "{}",
]


def test_a_mutated_folder_is_loaded_right_or_refused(tmp_path: Path) -> None:
    tree = {"a": [jnp.ones((4, 4)), 1, (2.5, None)], "b": {"x": jnp.zeros(7), "y": "text"}}
    save_pytree(tree, tmp_path, max_shard_size=40, metadata={"run": "1"})
    sound = {path: path.read_bytes() for path in tmp_path.iterdir()}
    index = tmp_path / "model.safetensors.index.json"
    assert len(sound) == 4
    loaded = 0
    for number in range(MUTATIONS // 10):
        chance = random.Random(f"folder {SEED} {number}")
        path = chance.choice([index, index, *sorted(sound)])
        mutated = mutated_folder_file(chance, path, sound[path])
        path.write_bytes(mutated)
        try:
            with no_hang():
                found = check_folder(tmp_path)
            if not isinstance(found, BaseException):
                check_tensors(found, {**sound, path: mutated})
                loaded += 1
        except BaseException:
            print(f"{path.name} of {number}, seed {SEED}, is {mutated[:5000]!r}", file=sys.stderr)
            raise
        path.write_bytes(sound[path])
    assert 0 < loaded < MUTATIONS // 10


def mutated_folder_file(chance: random.Random, path: Path, content: bytes) -> bytes:
    if path.suffix == ".safetensors":
        return chance.choice([mutated_bytes, mutated_header, mutated_names])(chance, content)
    if chance.random() < 0.2:
        return mutated_bytes(chance, content)
    shards = ["model-00001-of-00003.safetensors", "model.safetensors", "../x", "/etc/passwd", ".."]
    values = [*VALUES, *shards, "x\0y", "sub/x.safetensors", "model.safetensors.index.json"]
    return json.dumps(mutated_json(chance, json.loads(content), values)).encode()


def check_folder(folder: Path) -> Any:
    """Load a folder in every way: the tree, or a documented exception."""
    found = attempt(load_pytree, folder)
    outline, metadata = attempt(load_abstract, folder), attempt(load_metadata, folder)
    if not isinstance(found, BaseException):
        assert structure_of(outline) == structure_of(found)
        assert isinstance(metadata, dict)
    return found


def check_tensors(tree: Any, files: dict[Path, bytes]) -> None:
    """The tree has the tensors of all shards."""
    shards = [content for path, content in files.items() if path.suffix == ".safetensors"]
    again = io.BytesIO()
    save_pytree(tree, again)
    stored = {name: entry for shard in shards for name, entry in tensors_of(shard).items()}
    for name, entry in tensors_of(again.getvalue()).items():
        assert stored[name] == entry
