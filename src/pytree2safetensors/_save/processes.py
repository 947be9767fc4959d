"""Saving from several processes: they agree on a save, and then each does its share of it.

Specification: *Saving*.
"""

from concurrent.futures import Future
from functools import partial
from typing import Final

from pytree2safetensors._errors import FileFormatError
from pytree2safetensors._save import saver
from pytree2safetensors._save.calls import current_processes
from pytree2safetensors._save.contents import Contents
from pytree2safetensors._save.interrupt import Interrupt
from pytree2safetensors._save.share import share_of
from pytree2safetensors._save.target import local_target, plan_save, settled
from pytree2safetensors._save.terms import SaveOptions, terms_of
from pytree2safetensors._save.work import Work
from pytree2safetensors._storage.atomic_file import is_special
from pytree2safetensors._storage.locations import PathLike, Writable, resolve
from pytree2safetensors._storage.progress import Progress
from pytree2safetensors._storage.remote_path import RemotePath

_PLACE: Final = (
    "several processes can only save together to a regular file, or with max_shard_size= to a folder, "
    "because each of them opens it by its path; pass a path, not a file object or a device"
)


def save_jointly(
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
            interrupt.wait_for(future.end)
            future.result()
        if interrupt.received:  # even if it has also reached the saver
            raise interrupt.received[-1]
        return future


def _begin(
    contents: Contents,
    path: PathLike | RemotePath | Writable,
    options: SaveOptions,
    progress: Progress | None,
    interrupt: Interrupt,
    background: bool,
) -> saver.Save:
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
    target = settled(local_target(where, options.max_shard_size))
    if target.folder is None and is_special(target.path):
        raise FileFormatError(_PLACE)
    plan = plan_save(contents, target, checksum=options.checksum)
    terms = {"the function": "save_pytree_async" if background else "save_pytree"}
    terms |= terms_of(contents, plan, target, options)
    share = share_of(contents, processes.process, copied=background)
    work = Work(plan, target, share, options.durable, progress, interrupt)
    return interrupt.run(partial(work.begin, processes, terms))
