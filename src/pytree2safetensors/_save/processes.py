"""Saving from several processes: they agree on a save, and then each does its share of it.

Specification: *Saving*.
"""

import os
from concurrent.futures import Future
from functools import partial
from typing import Any, Final, NamedTuple, SupportsIndex

from pytree2safetensors._errors import FileFormatError
from pytree2safetensors._format.note import NOTE, read_note
from pytree2safetensors._leaves.assembled import Assembled, Member
from pytree2safetensors._leaves.describe import PYTHON_SCALARS
from pytree2safetensors._leaves.ownership import is_global, ownership
from pytree2safetensors._save.calls import current_processes
from pytree2safetensors._save.contents import Contents
from pytree2safetensors._save.interrupt import Interrupt
from pytree2safetensors._save.joint import Work
from pytree2safetensors._save.plan import SavePlan
from pytree2safetensors._save.share import share_of
from pytree2safetensors._save.words import Terms
from pytree2safetensors._save.writing import SaveTarget, plan_save, settled, target_of
from pytree2safetensors._storage.atomic_file import is_special
from pytree2safetensors._storage.byte_source import PathLike
from pytree2safetensors._storage.progress import Progress
from pytree2safetensors._storage.remote_path import RemotePath, resolve
from pytree2safetensors._storage.stream import Writable

_PLACE: Final = (
    "several processes can only save together to a regular file, or with max_shard_size= to a folder, "
    "because each of them opens it by its path; pass a path, not a file object or a device"
)

_SCALARS: Final = PYTHON_SCALARS.keys() - {str}  # whose values must agree


class SaveOptions(NamedTuple):
    """The options that all processes must give."""

    durable: bool
    checksum: bool
    max_shard_size: SupportsIndex | str | None


def save(
    contents: Contents,
    path: PathLike | RemotePath | Writable,
    options: SaveOptions,
    progress: Progress | None,
    *,
    background: bool,
) -> Future[None]:
    """Agree with the other processes on a save of the current values, and write them now or later."""
    interrupt = Interrupt()
    with interrupt.also_outside():
        future = _begin(contents, path, options, progress, interrupt, background)
        if not background:
            interrupt.wait_for(future)
        interrupt.check()
        return future


def _begin(
    contents: Contents,
    path: PathLike | RemotePath | Writable,
    options: SaveOptions,
    progress: Progress | None,
    interrupt: Interrupt,
    background: bool,
) -> Future[None]:
    """Prepare a save and agree on it with the other processes; the saver does the rest."""
    processes = current_processes()
    where = resolve(path)
    if isinstance(where, RemotePath):
        raise FileFormatError(
            f"several processes cannot save together to {where.label}, because they cannot write "
            "parts of the same object; save to a folder that all of them share, and copy it"
        )
    if not isinstance(where, str):
        raise FileFormatError(_PLACE)
    target = settled(target_of(where, options.max_shard_size))
    if target.folder is None and is_special(target.path):
        raise FileFormatError(_PLACE)
    plan = plan_save(contents, target, checksum=options.checksum)
    terms = {"the function": "save_pytree_async" if background else "save_pytree"}
    terms |= _terms(contents, plan, target, options)
    share = share_of(contents, processes.process, copied=background)
    work = Work(plan, target, share, options.durable, progress, interrupt)
    return interrupt.run(partial(work.begin, processes, terms))


def _terms(contents: Contents, plan: SavePlan, target: SaveTarget, options: SaveOptions) -> Terms:
    """Return what the processes must agree on: the target, the options, the contents, and the owners.

    The values of arrays are not included, because no process has all of them.
    """
    # The folders above may be mounted elsewhere.
    name = os.path.basename(target.path.rstrip(os.sep))
    terms = {"the name of the file": repr(name)}
    size = None if target.folder is None else target.limit  # not as it is spelled
    values = options._replace(max_shard_size=size)._asdict()
    terms |= {f"the option {name}=": repr(value) for name, value in values.items()}
    if plan.index_name:  # in a single file, process 0 decides where the data start
        terms |= {
            f"the file {file.name}": f"{len(file.head)} bytes of {file.size}" for file in plan.files
        }
    note = read_note(contents.metadata.get(NOTE), "this tree")
    terms |= {f"the node {name!r}": str(kind) for name, kind in note.nodes.items()}
    terms |= {repr(name): str(kind) for name, kind in note.leaves.items()}
    for name, leaf in contents.leaves.items():
        info = contents.infos[name]
        what = f"{info.dtype}{list(info.shape)}" + (f" {info.kind}" if info.kind else "")
        members = leaf.members if isinstance(leaf, Assembled) else []
        made_of = [_made_of(name, member) for member in members] or [_origin(leaf)]
        terms[repr(name)] = what + "".join(made_of) if type(leaf) not in _SCALARS else repr(leaf)
    return terms


def _made_of(name: str, member: Member) -> str:
    """Return which part of a tensor a leaf becomes, and which part of the leaf it is."""
    names, *rest = member.view
    return f" {names.index(name)} {rest}{_origin(member.leaf)}"


def _origin(leaf: Any) -> str:
    """Return what the processes must agree on about the values of a leaf."""
    if type(leaf) in _SCALARS:
        return f" {leaf!r}"
    if not is_global(leaf):
        return ""
    return f" with shards {ownership(leaf.sharding, leaf.shape).digest[:32]}"
