"""Saving: a tree to the contents of a file, and these to bytes."""

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Final, Literal, NamedTuple

import jax
from beartype import beartype
from jaxtyping import jaxtyped

from pytree2safetensors import _digest, _distributed, _hub
from pytree2safetensors._collector import collector_paused
from pytree2safetensors._errors import UnsupportedLeafError, shorten
from pytree2safetensors._file import Writable, write_file, write_stream
from pytree2safetensors._keypath import cut, split
from pytree2safetensors._layout import Plan, check_metadata, plan
from pytree2safetensors._leaf import DeletedLeaf, Form, describe, is_deleted, is_valueless
from pytree2safetensors._progress import Progress, ProgressOption, reporter
from pytree2safetensors._source import PathLike
from pytree2safetensors._spread import tensor_pieces
from pytree2safetensors._structure import NOTE, Note, write_note
from pytree2safetensors._tree import Flat, PyTree, flatten
from pytree2safetensors._values import joined_bytes

_SMALL: Final = 1 << 16  # bytes: smaller tensors are written together
_JOINED: Final = 4 << 20  # bytes that are written together


class Contents(NamedTuple):
    """What a file is to hold: the form of each tensor, its leaf, and the metadata."""

    forms: dict[str, Form]
    leaves: dict[str, Any]
    metadata: dict[str, str]


@jaxtyped(typechecker=beartype)
def save_pytree(
    tree: PyTree,
    path: PathLike | Writable,
    *,
    metadata: Mapping[str, str] | None = None,
    unsupported: Literal["raise", "skip"] = "raise",
    durable: bool = True,
    checksum: bool = False,
    max_shard_size: int | str | None = None,
    progress: ProgressOption = False,
) -> None:
    """Save a pytree as one safetensors file, from which `load_pytree` gives the same tree back.

    Args:
        tree: Any pytree of arrays, Python scalars, strs and PRNG keys.
        path: The file to write, replaced whole or not at all; or a binary file object; with
            `max_shard_size` a folder, or a file in it whose stem the names begin with.
        metadata: Strings to keep beside the tensors.
        unsupported: "skip" leaves out the leaves that a file cannot hold, but for traced and
            abstract arrays and references to arrays, which are always an error.
        durable: Whether the file has reached the disk when this returns.
        checksum: Keep a digest of each tensor, which loading checks. Costs a second pass.
        max_shard_size: Split what is larger, in bytes or such as "5GB", as model hubs do.
        progress: True for a bar, or a function of (done_bytes, total_bytes).

    Raises:
        UnsupportedLeafError: Leaves that a file cannot hold, or an array that was deleted or
            donated; nothing was written.
        KeyPathError: A key has no spelling, or two leaves have one.
        TreeStructureError: JAX cannot flatten the tree.
        FileFormatError: The metadata or the header are beyond what the format allows.
        ValueError: `max_shard_size` is no size, or `path` then is no path.
        OSError: The file cannot be written; what was there before still is.

    Specification: *Files*.

    >>> save_pytree({"w": 1.5, "steps": (1, 2)}, "model.safetensors")
    """
    with collector_paused():
        try:
            report = reporter(progress, "saving")
            contents = collect(tree, metadata or {}, unsupported)
        except BaseException as error:
            _distributed.tell(tree, error)
            raise
        if _distributed.is_needed(contents.leaves.values()):
            _distributed.save(contents, path, durable, checksum, max_shard_size, report)
        else:
            write(contents, path, durable, checksum, max_shard_size, report)


def write(
    contents: Contents,
    path: PathLike | Writable,
    durable: bool,
    checksum: bool,
    max_shard_size: int | str | None,
    report: Progress | None,
) -> None:
    """Write contents to a file, a file object or a folder."""
    if checksum:
        contents = with_digests(contents)
    if max_shard_size is not None:
        _hub.save(
            contents.forms,
            contents.metadata,
            partial(pieces, contents=contents),
            path,
            max_shard_size=max_shard_size,
            durable=durable,
            report=report,
        )
        return
    planned = plan(contents.forms, contents.metadata)
    size = len(planned.head) + planned.size
    if isinstance(path, str | os.PathLike):  # asked first: some paths can write
        write_file(path, pieces(planned, contents), size, durable=durable, progress=report)
    else:
        write_stream(path, pieces(planned, contents), size, report)


def pieces(planned: Plan, contents: Contents) -> Iterator[memoryview]:
    """The bytes of a file in order: large tensors as they are, small ones joined."""
    yield memoryview(planned.head)
    forms, leaves, _ = contents
    small: list[str] = []
    size = 0
    for name in planned.order:
        nbytes = forms[name].nbytes
        if nbytes < _SMALL:
            small.append(name)
            size += nbytes
            if size < _JOINED:
                continue
        if small:
            yield _joined(small, contents)
            small, size = [], 0
        if nbytes >= _SMALL:
            for _, piece in tensor_pieces(leaves[name], forms[name]):
                yield piece
    if small:
        yield _joined(small, contents)


def _joined(names: list[str], contents: Contents) -> memoryview:
    """The bytes of small tensors, one after the other."""
    forms, leaves, _ = contents
    return memoryview(
        joined_bytes([leaves[name] for name in names], [forms[name] for name in names])
    )


def collect(
    tree: Any, metadata: Mapping[str, str], unsupported: Literal["raise", "skip"]
) -> Contents:
    """Check a tree wholly, before anything is written."""
    check_metadata(metadata)
    flat = flatten(tree)
    found = describe(flat.leaves)
    places = [place for place, form in enumerate(found) if form is None]
    unfit = [(flat.names[place], flat.leaves[place]) for place in places]
    if unfit:
        _check_unfit(unfit, skip=unsupported == "skip")
        leave_out([name for name, _ in unfit], flat)
    forms = dict(zip(flat.names, filter(None, found), strict=True))
    leaves = dict(zip(flat.names, flat.leaves, strict=True))
    kinds = {name: form.kind for name, form in forms.items() if form.kind is not None}
    for name in kinds:
        if not forms[name].dtype:  # the note holds all of it
            del forms[name], leaves[name]
    if flat.kinds.get("") == "dict":
        del flat.kinds[""]  # the default reading of a file without names
    note = write_note(Note(flat.kinds, kinds))
    whole = {"format": "flax", **metadata}
    if note is not None:
        whole[NOTE] = note
    return Contents(forms, leaves, whole)


def _check_unfit(unfit: list[tuple[str, Any]], *, skip: bool) -> None:
    """Refuse leaves that a file cannot hold, unless they are to be left out."""
    deleted = next((name for name, leaf in unfit if is_deleted(leaf)), None)
    if deleted is not None:
        raise DeletedLeaf(
            f"the array at {shorten(deleted)} has been deleted or donated; save it before, "
            "or save the array that took its place"
        )
    # Arrays without values nobody means to leave out.
    valueless = any(is_valueless(leaf) for _, leaf in unfit)
    if valueless or not skip:
        raise UnsupportedLeafError(_unfit_message(unfit, valueless))


def _unfit_message(unfit: list[tuple[str, Any]], valueless: bool) -> str:
    lines = [f"  {shorten(name)}: {_type_name(leaf)}" for name, leaf in unfit]
    remedy = (
        "Save arrays that have values: outside of jit, no abstract ones, and of a reference what it holds."
        if valueless
        else 'Save with unsupported="skip" to leave them out; load_into_pytree then keeps those of '
        "its template. (A class of your own is no leaf once it is registered as a pytree node.)"
    )
    return "\n".join([f"{len(unfit)} of the tree's leaves cannot be stored:", *lines, remedy])


def _type_name(leaf: Any) -> str:
    kind = type(leaf)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(leaf, jax.core.Tracer):
        return f"{name}, a traced value"
    if kind is str:
        return f"{name} with the two halves of a surrogate pair, which JSON makes one character"
    dtype = getattr(leaf, "dtype", None)
    return f"{name} of dtype {dtype}" if dtype is not None else name


def leave_out(names: Iterable[str], flat: Flat) -> None:
    """Take leaves out of a flattened tree, so that what remains is a tree again.

    Where children are numbered, a `None` keeps the place; elsewhere the name is gone.
    """
    left_out = set(names)
    kept = [name for name in flat.names if name not in left_out]
    parents = _ancestors([*kept, *flat.kinds])
    keyless: dict[str, set[str]] = {}  # the segments that OrderedDicts lose
    for name in sorted(left_out, key=lambda name: len(split(name)), reverse=True):
        if not name:
            flat.kinds[name] = "None"
            continue
        parent, segment = cut(name)
        if segment[0] == "#":
            flat.kinds[name] = "None"
            parents |= _ancestors([name])
            continue
        kind = flat.kinds.get(parent)
        if isinstance(kind, list):
            keyless.setdefault(parent, set()).add(segment)
        elif parent not in parents:
            flat.kinds[parent] = "dict" if segment[0] == "@" else "PyTreeContainer"
            parents |= _ancestors([parent])
    for parent, gone in keyless.items():
        kind = flat.kinds[parent]
        flat.kinds[parent] = [kind[0], [segment for segment in kind[1] if segment not in gone]]
    remaining = [
        (n, leaf) for n, leaf in zip(flat.names, flat.leaves, strict=True) if n not in left_out
    ]
    flat.names[:] = [name for name, _ in remaining]
    flat.leaves[:] = [leaf for _, leaf in remaining]


def _ancestors(names: Iterable[str]) -> set[str]:
    """The paths of all nodes above these names."""
    found: set[str] = set()
    for name in names:
        above = name
        while above and (above := cut(above)[0]) not in found:
            found.add(above)
    return found


def with_digests(contents: Contents) -> Contents:
    """The same contents, with a digest of each tensor in the metadata."""
    digests = {
        name: _digest.digest_tensor(
            name, form, (piece for _, piece in tensor_pieces(contents.leaves[name], form))
        )
        for name, form in contents.forms.items()
    }
    return contents._replace(metadata=_digest.add_digests(contents.metadata, digests))
