"""Text from any part of a file is escaped before it is printed on a terminal."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from pytree2safetensors import (
    PyTreeContainer,
    load_abstract,
    load_into_pytree,
    load_metadata,
    load_pytree,
)
from pytree2safetensors._cli.main import main

pytestmark = pytest.mark.usefixtures("own_folder")

EVIL = "\x1b[2J\u202e\x9b31m\r\n\x07"
TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def note(**parts: object) -> dict[str, Any]:
    return {"pytree2safetensors": json.dumps({"version": 1, **parts})}


def single(name: str = "@k", metadata: object = None, tensor: Mapping[str, object] = {}) -> bytes:
    """A file of one tensor of 8 bytes."""
    header: dict[str, Any] = {name: TENSOR | dict(tensor)}
    if metadata is not None:
        header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


FILES = {
    "name": single(EVIL),
    "name in a key path": single(f"a.b@{EVIL}"),
    "name that is not a key path": single(f"#{EVIL}"),
    "dtype": single(tensor={"dtype": EVIL}),
    "member": single(tensor={EVIL: 1}),
    "metadata": single(metadata={EVIL: EVIL}),
    "metadata that are no strings": single(metadata={EVIL: [EVIL]}),
    "note": single(metadata={"pytree2safetensors": EVIL}),
    "entry of the note": single(metadata=note(**{EVIL: {}})),
    "implementation": single("@k", note(leaves={"@k": ["key", EVIL]}), {"dtype": "U32"}),
    "str": single(metadata=note(leaves={"@s": ["str", EVIL], f"@{EVIL}": ["str", ""]})),
    "kind of a leaf": single(metadata=note(leaves={"@k": EVIL})),
    "kind of a node": single(metadata=note(nodes={"@k": EVIL})),
    "name of a node": single(metadata=note(nodes={f"@{EVIL}": "tuple"})),
    "keys of a node": single(
        f"@k@{EVIL}", note(nodes={"@k": ["OrderedDict", [f"@{EVIL}"]]})
    ),
    "keys that a node lacks": single(metadata=note(nodes={"@o": ["OrderedDict", [f"@{EVIL}"]]})),
    "digests": single(metadata={"pytree2safetensors.sha256": EVIL}),
}  # fmt: skip
INDEXES = {
    "shard": {"metadata": {}, "weight_map": {"@k": EVIL}},
    "shard elsewhere": {"metadata": {}, "weight_map": {"@k": f"/{EVIL}"}},
    "tensor": {"metadata": {}, "weight_map": {EVIL: "one.safetensors"}},
    "metadata": {"metadata": {EVIL: EVIL}, "weight_map": {"@k": "one.safetensors"}},
    "entry": {EVIL: 1, "weight_map": {"@k": "one.safetensors"}},
}


@pytest.fixture(params=[*FILES, *(f"index: {name}" for name in INDEXES)])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A file, or a folder with an index, that holds control characters."""
    if request.param in FILES:
        # Windows has no such names.
        found = tmp_path / f"{'plain' if os.name == 'nt' else EVIL}.safetensors"
        found.write_bytes(FILES[request.param])
        return str(found)
    (tmp_path / "one.safetensors").write_bytes(single())
    index = INDEXES[request.param.removeprefix("index: ")]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(tmp_path)


def is_safe(text: str) -> bool:
    return all(character.isprintable() or character == "\n" for character in text)


@pytest.mark.parametrize("command", ["show", "show --all", "show --json", "diff", "verify"])
def test_the_command_prints_no_control_character(
    path: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"@k": np.ones(2, np.float32)}, tmp_path / "plain.safetensors")
    arguments = [*command.split(), path]
    if command == "diff":
        arguments.append(str(tmp_path / "plain.safetensors"))
    main(arguments)
    captured = capsys.readouterr()
    assert captured.out + captured.err
    assert is_safe(captured.out + captured.err)
    assert captured.err.count("\n") <= 1  # no line is forged


def attempts(path: str) -> Iterator[str]:
    """What a user who loads the file prints."""
    for load in (
        load_pytree,
        load_abstract,
        load_metadata,
        lambda path: load_into_pytree({"other": jnp.zeros(2)}, path),
        lambda path: load_into_pytree({"k": 1}, path),
        lambda path: load_pytree(path, prefix="@nowhere"),
    ):
        try:
            yield repr(load(path))
        except (ValueError, TypeError, OSError) as error:
            yield str(error)


def test_messages_and_reprs_hold_no_control_character(path: str) -> None:
    assert all(map(is_safe, attempts(path)))


@pytest.mark.parametrize("name", [EVIL, f"a{EVIL}", "__metadata__", "a b", "x" * 10_000])
def test_the_repr_of_a_container_escapes_names_and_values(name: str) -> None:
    container = PyTreeContainer({name: EVIL, "nested": PyTreeContainer({name: {EVIL: [EVIL]}})})
    assert is_safe(repr(container))
    with pytest.raises(AttributeError) as caught:
        getattr(container, f"{name}?")
    assert is_safe(str(caught.value))
