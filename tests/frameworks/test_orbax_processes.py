"""Two processes that save with Orbax's `CheckpointManager` and this library's handler."""

from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec
from numpy.typing import NDArray

import pytree2safetensors as p2s
from pytree2safetensors.orbax import SafetensorsHandler, SafetensorsRestore, SafetensorsSave
from together import Group, assert_same_shards, group_of, spread

pytestmark = pytest.mark.multiprocess

P: Any = PartitionSpec  # JAX gives its constructor no types


@pytest.fixture
def pair() -> Group:
    """Two processes of two devices each."""
    return group_of(2, 2)


def values(step: int) -> NDArray[np.float32]:
    return np.arange(step, step + 128, dtype=np.float32).reshape(8, 16)


def tree_of(step: int) -> dict[str, Any]:
    return {"w": spread(values(step), P("x", "y")), "step": step}


def save_and_restore(folder: str, background: bool) -> list[int]:
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=background)
    made = ocp.CheckpointManager(folder, options=options, item_handlers=SafetensorsHandler())
    with closing(made) as manager:
        for step in range(3):
            assert manager.save(step, args=SafetensorsSave(tree_of(step), checksum=True))
        manager.wait_until_finished()
        found = manager.restore(2, args=SafetensorsRestore(tree_of(0)))
        assert_same_shards(found["w"], tree_of(2)["w"])
        assert found["step"] == 2
        kept: list[int] = manager.all_steps()
    return kept


def save_values_of_one_process(folder: str) -> None:
    with closing(ocp.CheckpointManager(folder, item_handlers=SafetensorsHandler())) as manager:
        manager.save(0, args=SafetensorsSave({"process": jax.process_index()}))
        manager.wait_until_finished()
        assert manager.restore(0) == {"process": 0}


@pytest.mark.parametrize("background", [True, False], ids=["async", "sync"])
def test_arrays_of_several_processes_become_one_file(
    background: bool, pair: Group, tmp_path: Path
) -> None:
    assert pair.run(save_and_restore, tmp_path, background) == [[1, 2]] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    found = p2s.load_pytree(tmp_path / "1" / "default")
    assert np.asarray(found["w"]).tobytes() == values(1).tobytes()


def test_process_0_saves_a_tree_without_shared_arrays(pair: Group, tmp_path: Path) -> None:
    pair.run(save_values_of_one_process, tmp_path)
    assert p2s.load_pytree(tmp_path / "0" / "default") == {"process": 0}
