"""Calls that several processes make together: they are counted, and all processes raise their errors.

Specification: *Saving*.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import jax

from pytree2safetensors._errors import FileFormatError, UnsupportedLeafError
from pytree2safetensors._leaves.assembled import whole_leaves
from pytree2safetensors._leaves.ownership import is_global, processes_of
from pytree2safetensors._leaves.placement import is_array_type
from pytree2safetensors._messages import shorten
from pytree2safetensors._save import saver
from pytree2safetensors._save.coordination import CoordinationKeys, coordination_client
from pytree2safetensors._save.interrupt import Interrupt
from pytree2safetensors._save.meeting import Processes
from pytree2safetensors._tree.flatten import open_once

Params = ParamSpec("Params")
T = TypeVar("T")

_known: list[Processes] = []  # of the current client, after the first save
_one_at_a_time = threading.RLock()  # the calls of a process are counted in one order


def counted(save: Callable[Params, T]) -> Callable[Params, T]:
    """Count the calls that several processes make together, even calls with wrong arguments.

    An error that occurs before the processes have met is sent to the others, which also raise it.
    """

    @wraps(save)
    def call(*args: Any, **kwargs: Any) -> T:  # beartype 0.17 knows no Params.args
        tree = args[0] if args else kwargs.get("tree")
        if coordination_client() is None or not spans_processes(_leaves_of(tree)):
            return save(*args, **kwargs)
        if saver.is_current():
            raise RuntimeError(
                "a callback of a save cannot save an array of several processes, because that save "
                "would wait for the current one; save it after the current save"
            )
        with _one_at_a_time:
            processes = current_processes()
            processes.calls += 1
            try:
                return save(*args, **kwargs)
            except BaseException as error:
                if processes.announced < processes.calls:
                    _refuse(processes, error)
                raise

    return call


def _refuse(processes: Processes, error: BaseException) -> None:
    interrupt = Interrupt()
    with suppress(Exception):  # this process raises its own error
        interrupt.run(partial(processes.refuse, error, interrupt))


def current_processes() -> Processes:
    """Return the processes of `jax.distributed`. If it is initialized again, they count from zero."""
    client = coordination_client()
    if client is None:
        raise FileFormatError(
            "an array of this tree is spread over several processes, which need jax.distributed to "
            "save it together; call jax.distributed.initialize() first"
        )
    if not _known or _known[0].client is not client:
        store = CoordinationKeys(client)
        _known[:] = [Processes(store, jax.process_index(), jax.process_count(), client)]
    return _known[0]


def is_joint(tensors: Mapping[str, Any]) -> bool:
    """Return whether several processes save a tree together. This process must hold something of each leaf.

    Raises:
        UnsupportedLeafError: An array is only on devices of another process, so it is global here.
            For that process, it is like a local array.
    """
    if not _are_several(tensors.values()):
        return False
    is_shared = False
    for name, tensor in tensors.items():
        for leaf in filter(is_global, whole_leaves([tensor])):
            places = processes_of(leaf.sharding)
            if len(places) == 1:
                raise UnsupportedLeafError(
                    f"the array at {shorten(name)} is only on devices of process {places[0]}, so this "
                    "process cannot save it; spread or replicate it over several processes, or save it "
                    "on its own process, in a tree without arrays of several processes"
                )
            is_shared = True
    return is_shared


def spans_processes(leaves: Collection[Any]) -> bool:
    """Return whether any leaf is an array of several processes, which all processes see alike."""
    return _are_several(leaves) and any(
        len(processes_of(leaf.sharding)) > 1 for leaf in filter(is_global, whole_leaves(leaves))
    )


def _are_several(leaves: Collection[Any]) -> bool:
    """Return whether there are several processes, which may have arrays in common."""
    # Asking for the number of processes starts the devices, which a tree of NumPy arrays does not need.
    has_arrays = any(map(is_array_type, map(type, whole_leaves(leaves))))
    return has_arrays and jax.process_count() > 1


def _leaves_of(tree: Any) -> list[Any]:
    try:
        return jax.tree_util.tree_leaves(tree)
    except Exception:  # noqa: BLE001 - JAX raises the error of this tree later
        return list(_arrays_in(tree))


def _arrays_in(tree: Any) -> Iterator[jax.Array]:
    """Yield the arrays that can be found in a tree that JAX cannot flatten."""
    pending, seen = [tree], dict[int, Any]()  # by identity, which stays unique while nodes are kept
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen[id(node)] = node
        if isinstance(node, jax.Array):
            yield node
        elif isinstance(node, dict):
            pending.extend(node.values())
        elif isinstance(node, list | tuple):
            pending.extend(node)
        else:
            with suppress(Exception):  # flattening raises the error of this node later
                pending.extend(child for _, child in open_once(node))
