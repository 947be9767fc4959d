"""Items of Orbax's `CheckpointManager` as safetensors files.

Orbax decides when to save and which steps to keep. This library writes and reads the files.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, SupportsIndex

import jax

try:
    import orbax.checkpoint as ocp
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "pytree2safetensors.orbax needs Orbax; install orbax-checkpoint", name=error.name
    ) from error

from pytree2safetensors._load.api import Shardings, load_abstract, load_pytree
from pytree2safetensors._load.into_template import load_into_pytree
from pytree2safetensors._save.api import save_pytree, save_pytree_async
from pytree2safetensors._save.calls import spans_processes
from pytree2safetensors._tree.pytree import PyTree

__all__ = ["SafetensorsHandler", "SafetensorsRestore", "SafetensorsSave"]

_NAME: Final = "model.safetensors"  # the name that loaders look for in a folder


class SafetensorsHandler(ocp.AsyncCheckpointHandler):
    """A handler that saves and restores items with this library.

    The folder of an item has the file `model.safetensors`, or shards and their index. Each function
    that loads a file, except `load_file`, takes the path of this folder, too.

    Several processes save global arrays together. If a tree has none, only process 0 saves it.
    """

    async def async_save(
        self, directory: os.PathLike[str], args: "SafetensorsSave"
    ) -> list[ocp.Future]:
        """Copy the values of a tree, start to write them, and return what Orbax waits for.

        Raises:
            Pytree2SafetensorsError: As `save_pytree_async` raises it.
        """
        # Orbax creates the folder in another thread.
        created = ocp.future.CommitFutureAwaitingContractedSignals(_nothing())
        created.result()
        if _is_left_to_process_0(args.item):
            return []
        return [save_pytree_async(args.item, _file_in(directory), **args.options())]

    def save(self, directory: os.PathLike[str], args: "SafetensorsSave") -> None:
        """Save a tree.

        Raises:
            Pytree2SafetensorsError: As `save_pytree` raises it.
        """
        if not _is_left_to_process_0(args.item):
            save_pytree(args.item, _file_in(directory), **args.options())

    def restore(
        self, directory: os.PathLike[str], args: "SafetensorsRestore | None" = None
    ) -> PyTree:
        """Load a tree.

        Raises:
            Pytree2SafetensorsError: As `load_pytree` and `load_into_pytree` raise it.
            ValueError: There is a template and a sharding, or an option for a template that is not there.
        """
        path, asked = os.fspath(directory), args or SafetensorsRestore()
        template = asked.item
        if template is not None and asked.sharding is not None:
            raise ValueError(
                "SafetensorsRestore: the template says where its arrays go, so sharding= needs item=None"
            )
        if template is None:
            _check_unused(asked)
            if asked.sharding is None:
                return load_pytree(path, prefix=asked.prefix)
            template = load_abstract(path, prefix=asked.prefix, sharding=asked.sharding)
        return load_into_pytree(
            template,
            path,
            strict=asked.strict,
            unexpected=asked.unexpected,
            cast=asked.cast,
            prefix=asked.prefix,
        )

    def metadata(self, directory: os.PathLike[str]) -> PyTree:
        """Load the tree with a `jax.ShapeDtypeStruct` in place of each array."""
        return load_abstract(os.fspath(directory))


@dataclass
class SafetensorsSave(ocp.args.CheckpointArgs):
    """What to save.

    Attributes:
        item: The tree.
        metadata: Strings to store beside the tensors, for `load_metadata`.
        unsupported: "raise", or "skip" to leave out leaves that a file cannot hold.
        checksum: Store a digest of each tensor. Loading verifies the digests.
        max_shard_size: As for `save_pytree`.
    """

    item: PyTree
    metadata: Mapping[str, str] | None = None
    unsupported: Literal["raise", "skip"] = "raise"
    checksum: bool = False
    max_shard_size: SupportsIndex | str | None = None

    def options(self) -> dict[str, Any]:
        """Return the options of `save_pytree`."""
        return {name: value for name, value in vars(self).items() if name != "item"}


@dataclass
class SafetensorsRestore(ocp.args.CheckpointArgs):
    """What to restore.

    Attributes:
        item: A template for `load_into_pytree`. By default, load the tree in the file.
        sharding: Without a template: the shardings of the arrays, as for `load_abstract`.
        strict: With a template: as for `load_into_pytree`.
        unexpected: With a template: as for `load_into_pytree`.
        cast: With a template: as for `load_into_pytree`.
        prefix: A spelled key path. Load only the subtree there.
    """

    item: PyTree = None
    sharding: Shardings | None = None
    strict: bool = True
    unexpected: Literal["raise", "skip"] = "raise"
    cast: bool = False
    prefix: str = ""


# Not as decorators: the documentation is built without Orbax.
ocp.args.register_with_handler(SafetensorsHandler, for_save=True)(SafetensorsSave)
ocp.args.register_with_handler(SafetensorsHandler, for_restore=True)(SafetensorsRestore)


def _check_unused(asked: SafetensorsRestore) -> None:
    """Raise an error for options that need a template."""
    names = ("strict", "unexpected", "cast")
    given = [name for name in names if getattr(asked, name) != getattr(SafetensorsRestore, name)]
    if given:
        options = " and ".join(f"{name}=" for name in given)
        raise ValueError(f"SafetensorsRestore: to use {options}, pass a template in item=")


async def _nothing() -> None:
    pass


def _file_in(directory: os.PathLike[str]) -> str:
    return f"{os.fspath(directory)}/{_NAME}"


def _is_left_to_process_0(tree: PyTree) -> bool:
    """Return whether this is another process, and no array of the tree is shared."""
    return jax.process_index() > 0 and not spans_processes(jax.tree.leaves(tree))
