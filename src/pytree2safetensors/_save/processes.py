"""Saving from several processes: JAX moves nothing, each process writes what it owns.

Each process is told what failed on another. `meeting` says how, and in which steps.

Specification: *Files*.
"""

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import partial, wraps
from typing import Any, Final, NamedTuple, ParamSpec, TypeVar

import jax

from pytree2safetensors._errors import FileFormatError, UnsupportedLeafError, shorten
from pytree2safetensors._format.header import Plan, plan
from pytree2safetensors._format.note import NOTE, read_note
from pytree2safetensors._format.tensor import BITS, SCALARS
from pytree2safetensors._leaves.extents import shape_of
from pytree2safetensors._leaves.jax_versions import CoordinationKeys, coordination_client
from pytree2safetensors._leaves.ownership import is_global, is_unreduced, ownership
from pytree2safetensors._leaves.spread import owned, owned_chunks, tensor_chunks
from pytree2safetensors._save import saver
from pytree2safetensors._save.contents import Contents
from pytree2safetensors._save.interrupt import Interrupt
from pytree2safetensors._save.meeting import JointSave, Processes
from pytree2safetensors._save.words import Terms
from pytree2safetensors._storage.atomic_file import is_special, joining, replacing
from pytree2safetensors._storage.byte_source import PathLike
from pytree2safetensors._storage.descriptor import flush, reserve, write_at
from pytree2safetensors._storage.naming import temporary_name
from pytree2safetensors._storage.progress import Progress, Report
from pytree2safetensors._storage.stream import Writable
from pytree2safetensors._tree.flatten import open_once
from pytree2safetensors._types import Chunk

Params = ParamSpec("Params")
T = TypeVar("T")

_SMALL: Final = 1 << 16  # bytes: smaller pieces are written together
_JOINED: Final = 4 << 20  # bytes that are written together
_LARGEST: Final = 32 << 20  # bytes of one write, so that progress is told often

_known: list[Processes] = []  # of the present client, once there was a save
_one_at_a_time = threading.RLock()  # the calls of a process are counted in one order


def announced(save: Callable[Params, T]) -> Callable[Params, T]:
    """Count the calls that several processes take part in, whatever their arguments are.

    An error before the processes have met is told to the others, which raise it, too.
    """

    @wraps(save)
    def call(*args: Params.args, **kwargs: Params.kwargs) -> T:
        tree = args[0] if args else kwargs.get("tree")
        if coordination_client() is None or not is_needed(_leaves_of(tree)):
            return save(*args, **kwargs)
        with _one_at_a_time:
            processes = _processes()
            processes.calls += 1
            try:
                return save(*args, **kwargs)
            except BaseException as error:
                if processes.told < processes.calls:
                    _refuse(processes, error)
                raise

    return call


def _refuse(processes: Processes, error: BaseException) -> None:
    interrupt = Interrupt()
    with suppress(Exception):  # this process raises its own error
        interrupt.run(partial(processes.refuse, error, interrupt))


def _processes() -> Processes:
    """The processes of `jax.distributed`, which counts anew when it is initialized again."""
    client = coordination_client()
    if client is None:
        raise FileFormatError(
            "an array of this tree is spread over several processes, which save it together through "
            "jax.distributed; call jax.distributed.initialize() first"
        )
    if not _known or _known[0].client is not client:
        store = CoordinationKeys(client)
        _known[:] = [Processes(store, jax.process_index(), jax.process_count(), client)]
    return _known[0]


def is_needed(leaves: Iterable[Any]) -> bool:
    """Whether some leaf is not wholly addressable by this process."""
    leaves = list(leaves)
    # To ask for the number of processes starts JAX's devices, which a tree of NumPy needs not.
    if not any(issubclass(kind, jax.Array) for kind in set(map(type, leaves))):
        return False
    return jax.process_count() > 1 and any(map(is_global, leaves))


def _leaves_of(tree: Any) -> list[Any]:
    try:
        return jax.tree_util.tree_leaves(tree)
    except Exception:  # noqa: BLE001 - the error of a tree that JAX cannot flatten comes later
        return list(_arrays_in(tree))


def _arrays_in(tree: Any) -> Iterator[jax.Array]:
    """The arrays of a tree that JAX is unable to flatten, as far as they can be found."""
    pending, seen = [tree], set[int]()
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, jax.Array):
            yield node
        elif isinstance(node, dict):
            pending.extend(node.values())
        elif isinstance(node, list | tuple):
            pending.extend(node)
        else:
            with suppress(Exception):  # the error of this node is the one that comes later
                pending.extend(child for _, child in open_once(node))


# --- a save -----------------------------------------------------------------------------------


class Options(NamedTuple):
    """The options of a save that all processes must give."""

    durable: bool
    checksum: bool
    max_shard_size: int | str | None


def save(
    contents: Contents, path: PathLike | Writable, options: Options, report: Progress | None
) -> None:
    """Save together with the other processes."""
    interrupt = Interrupt()
    write = interrupt.run(partial(begin, contents, path, options, report, interrupt))
    if saver.is_current():  # a callback of another save, for which nobody waits here
        write()
    else:
        interrupt.wait_for(saver.submit(write))
    interrupt.check()


def begin(
    contents: Contents,
    path: PathLike | Writable,
    options: Options,
    report: Progress | None,
    interrupt: Interrupt,
) -> Callable[[], None]:
    """Agree with the other processes on a save, and return what carries it out."""
    processes = _processes()
    _check(contents, options)
    target = _regular(path)
    planned = plan(contents.infos, contents.metadata)
    token, start = temporary_name(), len(planned.head)
    terms = _terms(contents, planned, os.path.basename(target), options)
    with ExitStack() as stack:
        descriptor = -1
        if processes.process == 0:
            descriptor = stack.enter_context(replacing(target, durable=options.durable, name=token))
            reserve(descriptor, start + planned.size)
        joint = processes.agree(terms, interrupt, token=token, start=start)
        kept = stack.pop_all()

    def write(descriptor: int) -> None:
        first = joint.process == 0
        total = 0 if report is None else _total(contents, planned, first)
        told = Report(report, total)
        for offset, piece in _arranged(_pieces(contents, planned, joint.start, first)):
            interrupt.check()
            write_at(descriptor, piece, offset)
            told.add(len(piece))
        if options.durable:
            flush(descriptor)
        told.finish()

    def join() -> None:
        with joining(target, joint.token) as descriptor:
            write(descriptor)

    if joint.process == 0:
        return partial(_lead, joint, kept, partial(write, descriptor))
    return partial(_follow, joint, join)


def _lead(joint: JointSave, commit: ExitStack, write: Callable[[], None]) -> None:
    """Carry out a save as process 0, which commits when all have written."""
    error: BaseException | None = None
    try:
        with commit:
            joint.vote(_error_of(write))
    except BaseException as failed:
        error = failed
        raise
    finally:
        joint.announce(error)


def _follow(joint: JointSave, write: Callable[[], None]) -> None:
    """Carry out a save as another process."""
    error = _error_of(write)
    joint.vote(error)
    joint.outcome(error)


def _error_of(work: Callable[[], None]) -> BaseException | None:
    try:
        work()
    except BaseException as error:  # noqa: BLE001 - it is raised when the others have heard of it
        return error
    return None


def _check(contents: Contents, options: Options) -> None:
    if options.checksum:
        raise FileFormatError(
            "checksum=True does not go with several processes, none of which sees whole arrays"
        )
    if options.max_shard_size is not None:
        raise FileFormatError(
            "max_shard_size= does not go with several processes, which write one file"
        )
    for name, leaf in contents.leaves.items():
        if is_global(leaf) and is_unreduced(leaf):
            raise UnsupportedLeafError(
                f"the array at {shorten(name)} is unreduced: its shards are summands of its values; "
                "reduce it first"
            )


def _regular(path: PathLike | Writable) -> str:
    if not isinstance(path, str | os.PathLike) or is_special(path):
        raise FileFormatError(
            "several processes save together into a regular file, which each of them opens by its "
            "path; a file object, a folder or a device does not do"
        )
    return os.fsdecode(path)


def _terms(contents: Contents, planned: Plan, file: str, options: Options) -> Terms:
    """What the processes must agree on: where, how, and what they save, and which device owns what.

    The values of arrays are not a part of it, as no process has all of them.
    """
    terms = {"the name of the file": repr(file)}
    terms |= {f"the option {name}=": repr(value) for name, value in options._asdict().items()}
    note = read_note(contents.metadata.get(NOTE), file)
    terms |= {f"the node {name!r}": str(kind) for name, kind in note.nodes.items()}
    terms |= {repr(name): str(kind) for name, kind in note.leaves.items()}
    for name in planned.order:
        info, leaf = contents.infos[name], contents.leaves[name]
        what = f"{info.dtype}{list(info.shape)}" + (f" {info.kind}" if info.kind else "")
        if is_global(leaf):
            what += f" with shards {ownership(leaf.sharding, leaf.shape).digest[:32]}"
        elif isinstance(info.kind, str) and info.kind in SCALARS:
            what = repr(leaf)
        terms[repr(name)] = what
    return terms


# --- what this process writes -----------------------------------------------------------------


def _pieces(contents: Contents, planned: Plan, start: int, first: bool) -> Iterator[Chunk]:
    """The bytes that this process owns: of global arrays its shards, the first one all others."""
    if first:
        yield 0, memoryview(planned.head)
    offset = start
    for name in planned.order:
        info, leaf = contents.infos[name], contents.leaves[name]
        pieces: Iterable[Chunk] = ()
        if is_global(leaf):
            pieces = owned_chunks(leaf, info)
        elif first:
            pieces = tensor_chunks(leaf, info)
        for position, piece in pieces:
            yield offset + position, piece
        offset += info.nbytes


def _total(contents: Contents, planned: Plan, first: bool) -> int:
    """How many bytes this process writes."""
    total = len(planned.head) if first else 0
    for name, info in contents.infos.items():
        leaf = contents.leaves[name]
        if is_global(leaf):
            items = sum(math.prod(shape_of(region)) for region, _ in owned(leaf, info))
            total += items * BITS[info.dtype] // 8
        elif first:
            total += info.nbytes
    return total


def _arranged(pieces: Iterable[Chunk]) -> Iterator[Chunk]:
    """The same bytes in pieces of a good size: small neighbours together, large ones cut."""
    waiting = bytearray()
    start = 0
    for offset, piece in pieces:
        follows = offset == start + len(waiting)
        if waiting and not (follows and len(piece) < _SMALL and len(waiting) < _JOINED):
            yield start, memoryview(waiting)
            waiting = bytearray()
        if len(piece) < _SMALL:
            start = start if waiting else offset
            waiting += piece
        else:
            for cut in range(0, len(piece), _LARGEST):
                yield offset + cut, piece[cut : cut + _LARGEST]
    if waiting:
        yield start, memoryview(waiting)
