"""The work of one process in a save of several: each writes its share, and process 0 commits.

The steps are prepare, agree, write, written, hash, vote, commit and outcome. Written and hash are
only for checksums. A checksum describes the bytes in the file system, because they are read back.

Specification: *Saving*, *Sharded folders*, *Digests*.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import chain, groupby
from typing import Final

from pytree2safetensors._format.digests import hash_block
from pytree2safetensors._save import saver
from pytree2safetensors._save.interrupt import Interrupt
from pytree2safetensors._save.meeting import JointSave, Processes
from pytree2safetensors._save.plan import SavePlan
from pytree2safetensors._save.share import (
    Block,
    Share,
    blocks_of,
    digests_of,
    own_chunks,
    size_of,
    split_blocks,
)
from pytree2safetensors._save.target import LocalTarget, label_of, older_files, replacing_shards
from pytree2safetensors._save.words import Terms
from pytree2safetensors._storage.atomic_file import followed, joining, replacing
from pytree2safetensors._storage.atomic_folder import replacing_together
from pytree2safetensors._storage.descriptor import flush, read_at, set_size, write_at
from pytree2safetensors._storage.naming import naming, not_naming, temporary_name
from pytree2safetensors._storage.progress import Progress, Report, closing_bar
from pytree2safetensors._storage.threads import start, workers
from pytree2safetensors._types import Chunk

_HASH: Final = 32  # bytes of the hash of a block
# Threads that read and hash; without positioned reads they would disturb each other.
_READERS: Final = workers(4) if hasattr(os, "preadv") else 1


class Work:
    """What one process does in a save."""

    joint: JointSave
    commit: ExitStack  # of process 0: leaving it commits, or discards what was written
    create: Callable[[str, bool], AbstractContextManager[int]]  # of process 0: the index

    def __init__(
        self,
        plan: SavePlan,
        target: LocalTarget,
        share: Share,
        durable: bool,
        progress: Progress | None,
        interrupt: Interrupt,
    ) -> None:
        self.plan, self.target, self.share, self.durable = plan, target, share, durable
        self.progress, self.interrupt = progress, interrupt
        self.starts = [len(file.head) for file in plan.files]  # of the data of each file

    # --- prepare and agree ---

    def begin(self, processes: Processes, terms: Terms) -> saver.Save:
        """Agree with the other processes, and have the saver do the rest."""
        plan = self.plan
        name = plan.index_name or plan.files[0].name or followed(self.target.path)
        token = temporary_name(os.path.basename(name))
        with ExitStack() as stack:
            if processes.process == 0:
                self._prepare(stack, token)
            self.joint = processes.agree(terms, self.interrupt, token=token, start=self.starts[0])
            self.commit = stack.pop_all()
        if not plan.index_name:  # metadata may differ, so only process 0 knows the length
            self.starts = [self.joint.start]
        # Every process that agreed does this, so the others never wait for it in vain.
        return saver.submit(self._run, label_of(self.target), is_joint=True)

    def _prepare(self, stack: ExitStack, token: str) -> None:
        """Create the temporary files, as large as they will be."""
        plan, target = replacing_shards(self.plan, self.target)
        folder, durable = target.folder, self.durable
        if folder is None:
            name = _temporary(token, 0)
            descriptor = stack.enter_context(
                replacing(self.target.path, durable=durable, name=name)
            )
            set_size(descriptor, plan.files[0].size)
            return
        names = [file.name for file in plan.files]
        names += [plan.index_name] if plan.index_name else []
        temporaries = {name: _temporary(token, number) for number, name in enumerate(names)}
        stack.enter_context(naming(self.target.path))
        self.create = stack.enter_context(
            replacing_together(folder, temporaries, older_files(plan, target), durable=durable)
        )
        for file in plan.files:
            with self.create(file.name, False) as descriptor:
                set_size(descriptor, file.size)

    # --- the rest, on process 0 and on the others ---

    def _run(self) -> None:
        with closing_bar(self.progress):
            try:
                if self.joint.process == 0:
                    self._lead()
                else:
                    self._follow()
            except BaseException:
                self.joint.leave()  # if the others do not know of this error
                raise

    def _lead(self) -> None:
        """Do the rest as process 0."""
        error: BaseException | None = None
        try:
            with self.commit:
                with not_naming():  # errors of other processes have their own paths
                    hashes, failed = self._work()
                    self.joint.vote(failed)
                self._complete(hashes)
        except BaseException as raised:
            error = raised
            raise
        finally:
            self.joint.report_outcome(error)

    def _follow(self) -> None:
        """Do the rest as another process."""
        _, error = self._work()
        self.joint.vote(error)
        self.joint.hear_outcome(error)

    def _work(self) -> tuple[bytes, BaseException | None]:
        """Write, and hash for checksums. Return an error that the other processes do not know yet."""
        error: BaseException | None = None
        hashes = b""
        try:
            self._write()
        except BaseException as raised:  # noqa: BLE001 - it is raised after the others know it
            error = raised
        if self.plan.checksum:
            self.joint.meet("written", error)
            try:
                hashes = self._hash()
                if self.joint.process:
                    self.joint.give(hashes)
            except BaseException as raised:  # noqa: BLE001 - as above
                error = raised
        return hashes, error

    def _write(self) -> None:
        """Write the bytes that this process owns."""
        heads = 0 if self.joint.process else sum(len(file.head) for file in self.plan.files)
        report = Report(self.progress, heads + size_of(self.share, self.plan.infos))
        for number in range(len(self.plan.files)):
            chunks = self._chunks(number)
            first = next(chunks, None)
            if first is None:  # this process owns nothing of the file
                continue
            chunks = chain([first], chunks)
            del first
            with self._opened(number) as descriptor:
                for offset, piece in chunks:
                    self.interrupt.check()
                    write_at(descriptor, piece, offset)
                    report.add(len(piece))
                    del piece  # the next one may need the memory
                if self.durable:
                    flush(descriptor)
        report.finish()

    def _chunks(self, number: int) -> Iterator[Chunk]:
        file = self.plan.files[number]
        if self.joint.process == 0:
            yield 0, memoryview(file.head)
        yield from own_chunks(file, self.plan.infos, self.share, self.starts[number])

    def _hash(self) -> bytes:
        """Read this process's share of the blocks, and return their hashes."""
        shares = split_blocks(blocks_of(self.plan, self.starts), self.joint.count)
        hashes: list[bytes] = []
        for number, blocks in groupby(shares[self.joint.process], lambda block: block.file):
            with (
                self._opened(number) as descriptor,  # again: a network file system caches
                ThreadPoolExecutor(_READERS, "pytree2safetensors-hash") as pool,
            ):
                tasks = [start(pool, partial(self._hash_block, descriptor, b)) for b in blocks]
                try:
                    hashes += [task.result() for task in tasks]
                finally:
                    for task in tasks:
                        task.cancel()
        return b"".join(hashes)

    def _hash_block(self, descriptor: int, block: Block) -> bytes:
        self.interrupt.check()
        return hash_block(read_at(descriptor, block.stop - block.start, block.start))

    # --- commit ---

    def _complete(self, hashes: bytes) -> None:
        """Write what only process 0 knows now: the head with digests, or the index."""
        plan = self.plan
        digests = self._digests(hashes) if plan.checksum else None
        if plan.index_name:
            with self.create(plan.index_name, self.durable) as descriptor:
                write_at(descriptor, memoryview(plan.sealed(digests)), 0)
        elif plan.checksum:
            with self._opened(0) as descriptor:
                write_at(descriptor, memoryview(plan.sealed(digests)), 0)
                if self.durable:
                    flush(descriptor)

    def _digests(self, hashes: bytes) -> Mapping[str, str]:
        """Return the digest of each tensor, from the hashes of all processes."""
        blocks = blocks_of(self.plan, self.starts)
        shares = split_blocks(blocks, self.joint.count)
        for process in range(1, self.joint.count):
            hashes += self.joint.given(process, _HASH * len(shares[process]))
        pieces = (hashes[at : at + _HASH] for at in range(0, len(hashes), _HASH))
        return digests_of(self.plan, blocks, pieces)

    # --- files ---

    @contextmanager
    def _opened(self, number: int) -> Iterator[int]:
        """Yield a descriptor of a temporary file."""
        name = _temporary(self.joint.token, number)
        folder = self.target.folder
        path = self.target.path if folder is None else os.path.join(folder, name)
        with naming(self.target.path), ExitStack() as stack:
            try:
                descriptor = stack.enter_context(joining(path, name))
            except FileNotFoundError as error:
                text = (
                    f"process {self.joint.process} does not find the file that process 0 has made for "
                    "this save; all processes need the same path, in a folder that they share"
                )
                raise FileNotFoundError(error.errno, text) from None
            yield descriptor


def _temporary(token: str, number: int) -> str:
    """Return the temporary name of a file of a plan."""
    return token if number == 0 else f"{token}-{number}"
