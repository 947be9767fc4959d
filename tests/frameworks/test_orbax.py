"""Orbax's `CheckpointManager` with this library's handler: keeping, restoring, and failures."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import pytree2safetensors as p2s
from oracle import assert_same
from pytree2safetensors.orbax import SafetensorsHandler, SafetensorsRestore, SafetensorsSave
from trees import TREES

P: Any = PartitionSpec  # JAX gives its constructor no types
Struct: Any = jax.ShapeDtypeStruct
in_both_ways = pytest.mark.parametrize("background", [True, False], ids=["async", "sync"])


@contextmanager
def manager_of(folder: Path, background: bool = True, **options: Any) -> Iterator[Any]:
    chosen = ocp.CheckpointManagerOptions(enable_async_checkpointing=background, **options)
    made = ocp.CheckpointManager(folder, options=chosen, item_handlers=SafetensorsHandler())
    with closing(made):
        yield made


def state(step: int) -> dict[str, Any]:
    weights = jnp.full((3, 4), step, jnp.bfloat16)
    return {"layers": [(weights, None)], "key": jax.random.key(step), "name": "net", "step": step}


# --- saving and restoring ---------------------------------------------------------------------


@in_both_ways
def test_a_step_holds_a_file_of_this_library(background: bool, tmp_path: Path) -> None:
    with manager_of(tmp_path, background) as manager:
        assert manager.save(3, args=SafetensorsSave(state(3), metadata={"run": "1"}, checksum=True))
        manager.wait_until_finished()
    item = tmp_path / "3" / "default"
    p2s.save_pytree(state(3), tmp_path / "expected", metadata={"run": "1"}, checksum=True)
    written = (item / "model.safetensors").read_bytes()
    assert written == (tmp_path / "expected").read_bytes()
    assert_same(p2s.load_pytree(item), state(3))


@in_both_ways
def test_a_tree_comes_back_without_a_template(background: bool, tmp_path: Path) -> None:
    with manager_of(tmp_path, background) as manager:
        manager.save(0, args=SafetensorsSave(state(0)))
        manager.wait_until_finished()
        assert_same(manager.restore(0), state(0))
        assert_same(manager.restore(0, args=SafetensorsRestore()), state(0))
    with manager_of(tmp_path) as another:
        assert_same(another.restore(0), state(0))
        assert another.restore(0, args=SafetensorsRestore(prefix="@layers#0"))[1] is None


@pytest.mark.parametrize("name", ["linen_frozen_params", "nnx_state", "equinox_filtered_mlp"])
def test_trees_of_frameworks_come_back_into_templates(name: str, tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        manager.save(0, args=SafetensorsSave(TREES[name](1), unsupported="skip"))
        found = manager.restore(0, args=SafetensorsRestore(TREES[name](2)))
    assert_same(found, TREES[name](1))


def test_shards_and_other_items_are_side_by_side(tmp_path: Path) -> None:
    with closing(ocp.CheckpointManager(tmp_path)) as manager:
        tree = {"a": jnp.arange(100.0), "b": jnp.arange(100.0)}
        manager.save(
            1,
            args=ocp.args.Composite(
                model=SafetensorsSave(tree, max_shard_size="500B"),
                config=ocp.args.JsonSave({"width": 4}),
            ),
        )
        restored = manager.restore(
            1,
            args=ocp.args.Composite(model=SafetensorsRestore(tree), config=ocp.args.JsonRestore()),
        )
    assert_same(restored.model, tree)
    assert restored.config == {"width": 4}
    assert len(list((tmp_path / "1" / "model").glob("model-*-of-00002.safetensors"))) == 2


def test_what_does_not_fit_is_an_error_or_left_out_on_request(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        manager.save(0, args=SafetensorsSave({"a": jnp.ones(2), "b": jnp.ones(2)}))
        template = {"a": jnp.zeros(2, jnp.bfloat16)}
        with pytest.raises(p2s.WeightsMismatchError):
            manager.restore(0, args=SafetensorsRestore(template))
        found = manager.restore(0, args=SafetensorsRestore(template, unexpected="skip", cast=True))
        assert_same(found, {"a": jnp.ones(2, jnp.bfloat16)})
        kept = {"a": jnp.ones(2), "c": jnp.zeros(3)}
        found = manager.restore(0, args=SafetensorsRestore(kept, strict=False))
        assert_same(found, kept)


def test_arrays_get_the_shardings_that_are_asked_for(tmp_path: Path) -> None:
    mesh = Mesh(np.array(jax.devices()), ("x",))
    rows, everywhere = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    weights = jnp.arange(64.0).reshape(8, 8)
    tree = {"w": weights, "b": jnp.ones(3), "step": 7}
    with manager_of(tmp_path) as manager:
        manager.save(0, args=SafetensorsSave(tree))
        template = dict(tree, w=Struct((8, 8), jnp.float32, sharding=rows))
        from_template = manager.restore(0, args=SafetensorsRestore(template))

        def sharding(path: str, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
            return rows if leaf.shape == (8, 8) else everywhere

        from_file = manager.restore(0, args=SafetensorsRestore(sharding=sharding))
    assert from_template["w"].sharding == from_file["w"].sharding == rows
    assert from_file["b"].sharding == everywhere
    for found in from_template, from_file:
        assert found["step"] == 7
        assert np.array_equal(found["w"], weights)


def test_metadata_are_shapes_from_the_header(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        manager.save(0, args=SafetensorsSave(state(0)))
        manager.wait_until_finished()
        item = tmp_path / "0" / "default"
        expected = p2s.load_abstract(item)
        path = item / "model.safetensors"
        content = path.read_bytes()
        nbytes = state(0)["layers"][0][0].nbytes
        path.write_bytes(content[:-nbytes] + b"\xff" * nbytes)  # the arrays do not count
        assert manager.item_metadata(0) == manager.metadata(0).item_metadata == expected
        assert expected["layers"][0][0] == Struct((3, 4), jnp.bfloat16)


def test_a_run_that_orbax_began_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    tree = {"w": jnp.arange(3.0), "step": 0}
    with closing(ocp.CheckpointManager(tmp_path)) as manager:
        manager.save(0, args=ocp.args.StandardSave(tree))
    with manager_of(tmp_path, max_to_keep=2) as manager:
        with pytest.raises(p2s.FileFormatError) as caught:
            manager.restore(manager.latest_step(), args=SafetensorsRestore(tree))
        assert str(caught.value) == (
            f"the folder {str(tmp_path / '0' / 'default')!r} has no safetensors file and no index; "
            "Orbax wrote it: restore it with Orbax, and save the result"
        )
    with closing(ocp.CheckpointManager(tmp_path)) as manager:
        restored = manager.restore(0, args=ocp.args.StandardRestore(tree))
    with manager_of(tmp_path, max_to_keep=2) as manager:
        for step in 1, 2:
            manager.save(step, args=SafetensorsSave(restored | {"step": step}))
        manager.wait_until_finished()
        assert manager.all_steps() == [1, 2]
        assert_same(manager.restore(2, args=SafetensorsRestore(tree)), tree | {"step": 2})


def test_a_template_and_shardings_exclude_each_other(tmp_path: Path) -> None:
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), P())
    with manager_of(tmp_path) as manager:
        manager.save(0, args=SafetensorsSave(state(0)))
        message = "^SafetensorsRestore: the template says where its arrays go, so sharding= needs "
        with pytest.raises(ValueError, match=message + "item=None$"):
            manager.restore(0, args=SafetensorsRestore(state(0), sharding=everywhere))


@pytest.mark.parametrize(
    "options", [{"strict": False}, {"unexpected": "skip"}, {"cast": True, "strict": False}]
)
@pytest.mark.parametrize("sharded", [False, True])
def test_options_of_templates_need_one(options: Any, sharded: bool, tmp_path: Path) -> None:
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), P())
    with manager_of(tmp_path) as manager:
        manager.save(0, args=SafetensorsSave(state(0)))
        named = " and ".join(f"{name}=" for name in sorted(options, reverse=True))
        message = f"^SafetensorsRestore: to use {named}, pass a template in item=$"
        with pytest.raises(ValueError, match=message):
            manager.restore(
                0, args=SafetensorsRestore(sharding=everywhere if sharded else None, **options)
            )


def test_checkpointers_of_orbax_take_the_handler(tmp_path: Path) -> None:
    for number, kind in enumerate((ocp.Checkpointer, ocp.AsyncCheckpointer)):
        with kind(SafetensorsHandler()) as checkpointer:
            checkpointer.save(tmp_path / str(number), args=SafetensorsSave(state(1)))
        with kind(SafetensorsHandler()) as checkpointer:
            assert_same(checkpointer.restore(tmp_path / str(number)), state(1))


# --- what the manager decides -----------------------------------------------------------------


@in_both_ways
def test_the_manager_keeps_the_newest_steps(background: bool, tmp_path: Path) -> None:
    with manager_of(tmp_path, background, max_to_keep=2) as manager:
        for step in range(5):
            manager.save(step, args=SafetensorsSave(state(step)))
        manager.wait_until_finished()
        assert manager.all_steps() == [3, 4]
        assert manager.restore(manager.latest_step())["step"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


@in_both_ways
def test_the_manager_keeps_the_best_steps(background: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_to_keep": 2, "best_fn": lambda metrics: metrics["score"]}
    with manager_of(tmp_path, background, **options) as manager:
        for step, score in enumerate([0.1, 0.9, 0.2, 0.8, 0.3]):
            manager.save(step, args=SafetensorsSave(state(step)), metrics={"score": score})
        manager.wait_until_finished()
    with manager_of(tmp_path, background, **options) as another:
        assert (another.best_step(), sorted(another.all_steps())) == (1, [1, 3])
        assert another.restore(another.best_step())["step"] == 1


# --- background saves, failures and kills -----------------------------------------------------


def test_what_changes_after_the_call_is_not_saved(tmp_path: Path) -> None:
    array, donated = np.zeros(1_000_000, np.float32), jnp.zeros(1_000_000)
    with manager_of(tmp_path) as manager:
        manager.save(0, args=SafetensorsSave({"array": array, "donated": donated}))
        array[:] = 1
        jax.jit(lambda values: values + 1, donate_argnums=0)(donated).block_until_ready()
        found = manager.restore(0)
    assert not np.asarray(found["array"]).any()
    assert not np.asarray(found["donated"]).any()


@in_both_ways
def test_a_leaf_that_cannot_be_stored_is_an_error_of_the_call(
    background: bool, tmp_path: Path
) -> None:
    with (
        manager_of(tmp_path, background) as manager,
        pytest.raises(p2s.UnsupportedLeafError, match="@f"),
    ):
        manager.save(0, args=SafetensorsSave({"f": len}))
    with manager_of(tmp_path) as another:
        assert another.latest_step() is None


def test_a_failure_in_the_background_reaches_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with manager_of(tmp_path) as manager:
        manager.save(0, args=SafetensorsSave(state(0)))
        manager.wait_until_finished()
        monkeypatch.setattr("pytree2safetensors._save.api.write", fail)
        manager.save(1, args=SafetensorsSave(state(1)))
        with pytest.raises(OSError, match="No space left"):
            manager.wait_until_finished()
        monkeypatch.undo()
    with manager_of(tmp_path) as another:
        assert another.all_steps() == [0]


KILLED = """
import os, signal, sys, warnings
from itertools import count
from pathlib import Path
sys.path[:0] = {path!r}
warnings.simplefilter("ignore", RuntimeWarning)  # JAX's, of forks
import numpy as np
import orbax.checkpoint as ocp
from pytree2safetensors.orbax import SafetensorsHandler, SafetensorsSave

def save(folder, left):
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing={background})
    manager = ocp.CheckpointManager(folder, options=options, item_handlers=SafetensorsHandler())
    for step in 0, 1:
        tree = {{"a": np.full(1_000_000, step, np.float32), "step": step}}
        manager.save(step, args=SafetensorsSave(tree))
        manager.wait_until_finished()
        if step == 0:
            sys.addaudithook(killer(left, str(folder / "1")))

def killer(left, where):
    def watch(event, arguments):
        nonlocal left
        if event in ("open", "os.rename", "os.mkdir", "os.remove"):
            if where in str(arguments) or "model.safetensors" in str(arguments):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
    return watch

for number in count(1):
    child = os.fork()
    if child == 0:
        save(Path({folder!r}) / str(number), number)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
print(number)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@in_both_ways
def test_a_kill_during_a_save_leaves_the_steps_before(background: bool, tmp_path: Path) -> None:
    script = KILLED.format(path=sys.path, folder=str(tmp_path), background=background)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    saves = int(done.stdout)
    assert saves > 3, "no step of a save was reached"
    for number in range(1, saves + 1):
        with manager_of(tmp_path / str(number)) as manager:
            assert manager.all_steps() in ([0], [0, 1])
            step = manager.latest_step()
            found = manager.restore(step)
            assert found["step"] == step
            assert (found["a"] == step).all()
            manager.save(2, args=SafetensorsSave({"step": 2}))
            assert manager.restore(2) == {"step": 2}
    assert manager.all_steps() == [0, 1, 2]


def test_without_orbax_the_error_says_what_to_install() -> None:
    program = "import sys; sys.modules['orbax'] = None; import pytree2safetensors.orbax"
    failed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 1
    said = failed.stderr.splitlines()[-1]
    assert said == (
        "ModuleNotFoundError: pytree2safetensors.orbax needs Orbax; install orbax-checkpoint"
    )
