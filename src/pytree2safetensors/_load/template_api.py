"""Templates: putting stored leaves into the places that a tree of your own has for them.

Specification: *Loading into a template*.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from beartype import beartype
from jaxtyping import jaxtyped

from pytree2safetensors._collector import collector_paused
from pytree2safetensors._leaves.decode import cast_array, to_host
from pytree2safetensors._leaves.spec import LeafSpec, TracedSpec
from pytree2safetensors._leaves.to_jax import to_jax, weaken, wrap_key
from pytree2safetensors._load.api import names_below, read, take, warn_foreign
from pytree2safetensors._load.checkpoint import OpenCheckpoint, open_checkpoint
from pytree2safetensors._load.matching import Options, Rename, match
from pytree2safetensors._load.sharded import Wanted, concrete, place, plan_shards, read_sharded
from pytree2safetensors._load.template import TemplateLeaf, template_leaves, to_python
from pytree2safetensors._storage.byte_source import PathLike, Readable
from pytree2safetensors._storage.progress import ProgressOption, part_of, reporter
from pytree2safetensors._tree.flatten import PyTree, flatten
from pytree2safetensors._tree.keypath import string2keypath
from pytree2safetensors._tree.paths import strip_prefix


@jaxtyped(typechecker=beartype)
def set_weights(
    module: PyTree,
    dictionary: Mapping[str, Any],
    verbose: bool = False,
    *,
    strict: bool = True,
    cast: bool = False,
    prefix: str = "",
    rename: Rename | None = None,
) -> PyTree:
    """Make a new pytree: `module` with its leaves taken from `dictionary`.

    Args:
        module: The template: arrays, `jax.ShapeDtypeStruct`s, NumPy arrays, Python scalars.
        dictionary: Names to leaves, such as `pytree2dict` gives.
        verbose: Whether to tell on stderr what `strict=False` left as it was, or did not use.
        strict: Whether every leaf must be there and fit, and none be left over. Where False, the
            template keeps what does not fit; nothing fitting at all is still an error.
        cast: Convert dtypes to those of the template, as far as NumPy's "same_kind" goes.
        prefix: A spelled key path: take the entries below it.
        rename: From a spelled key path of the template to the name in the dictionary.

    Returns:
        A tree with exactly the treedef of `module`.

    Raises:
        WeightsMismatchError: What is missing, unexpected or differs, all at once.
        KeyPathError: A key path of `module`, or `prefix`, has no spelling.
        TreeStructureError: JAX cannot flatten `module`.

    Specification: *Loading into a template*.

    >>> set_weights({"w": 0.0}, {"@w": 1.5})
    {'w': 1.5}
    """
    if not all(isinstance(name, str) for name in dictionary):
        raise TypeError("the names of leaves are strs")
    template = _template(module)
    if prefix:
        string2keypath(prefix)
    names = [name for name in dictionary if strip_prefix(prefix, name) is not None]
    slots = template_leaves(dictionary[name] for name in names)
    available = {
        name: _given(slot, dictionary[name]) for name, slot in zip(names, slots, strict=True)
    }
    options = Options("the dictionary", strict, verbose, cast, prefix, rename)
    matches = match(template.names, template.slots, available, lambda _: dictionary, options)
    leaves = list(template.leaves)
    for position, name in matches:
        slot = template.slots[position]
        if slot is not None:
            leaves[position] = _fitted(slot, dictionary[name])
    return jax.tree_util.tree_unflatten(template.treedef, leaves)


@jaxtyped(typechecker=beartype)
def load_into_pytree(
    module: PyTree,
    path: PathLike | Readable,
    verbose: bool = False,
    *,
    strict: bool = True,
    cast: bool = False,
    prefix: str = "",
    rename: Rename | None = None,
    mmap: bool = False,
    progress: ProgressOption = False,
) -> PyTree:
    """Load a file into the places of a template, reading only what the template needs.

    Args:
        module: The template: arrays, `jax.ShapeDtypeStruct`s, NumPy arrays, Python scalars. A leaf
            with a sharding gets its values in that sharding.
        path: A file, a binary file object, a folder of shards or its index.
        verbose: Whether to tell on stderr what `strict=False` left as it was, or did not use.
        strict: Whether every leaf must be there and fit, and none be left over. Where False, the
            template keeps what does not fit; nothing fitting at all is still an error.
        cast: Convert dtypes to those of the template, as far as NumPy's "same_kind" goes.
        prefix: A spelled key path: take the subtree there.
        rename: From a spelled key path of the template to the name in the file.
        mmap: Map the file instead of reading it; nothing may change the file afterwards.
        progress: True for a bar, or a function of (done_bytes, total_bytes).

    Returns:
        A tree with exactly the treedef of `module`.

    Raises:
        WeightsMismatchError: What is missing, unexpected or differs, all at once.
        FileFormatError: The file is damaged, or no safetensors file.
        KeyPathError: A key path of `module`, or `prefix`, has no spelling.
        TreeStructureError: JAX cannot flatten `module`.
        ValueError: `mmap` of a file object.
        OSError: The file cannot be read.

    Specification: *Loading into a template*.

    >>> save_pytree({"w": np.ones(2, np.float32)}, "model.safetensors")
    >>> load_into_pytree({"w": np.zeros(2, np.float32)}, "model.safetensors")
    {'w': array([1., 1.], dtype=float32)}
    """
    with collector_paused(), open_checkpoint(path, mmap) as store:
        template = _template(module)
        names = names_below(store, prefix, template.wanted()).values()
        options = Options(store.label, strict, verbose, cast, prefix, rename)
        available = _Stored(store, names)

        def scalars(asked: Collection[str]) -> Mapping[str, Any]:
            return take(store, asked, False, None)

        matches = match(template.names, template.slots, available, scalars, options)
        leaves = list(template.leaves)
        for position, value in _read_matches(store, template, matches, mmap, progress):
            leaves[position] = value
        return jax.tree_util.tree_unflatten(template.treedef, leaves)


class _Template(NamedTuple):
    """A flattened template: what each of its leaves asks for."""

    treedef: Any
    names: list[str]
    leaves: list[Any]
    slots: list[TemplateLeaf | None]

    def wanted(self) -> Iterator[str]:
        """The names of what is data."""
        return (name for name, slot in zip(self.names, self.slots, strict=True) if slot)


def _template(module: Any) -> _Template:
    flat = flatten(module)
    treedef = jax.tree_util.tree_structure(module)
    return _Template(treedef, flat.names, flat.leaves, template_leaves(flat.leaves))


class _Stored(Mapping[str, LeafSpec | None]):
    """What a store has under some of its names, judged when it is asked for.

    So a tensor of a dtype that nothing here reads stands in nobody's way.
    """

    def __init__(self, store: OpenCheckpoint, names: Iterable[str]) -> None:
        self.store, self.names = store, dict.fromkeys(names)

    def __getitem__(self, name: str) -> LeafSpec:
        return self.store.spec_of(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


# --- values -----------------------------------------------------------------------------------


def _given(slot: TemplateLeaf | None, value: Any) -> LeafSpec | None:
    """What a leaf of a dictionary is; None where it has no values."""
    if slot is None or slot.abstract:
        return None
    return TracedSpec(*slot.leaf) if isinstance(value, jax.core.Tracer) else slot.leaf


def _fitted(slot: TemplateLeaf, value: Any) -> Any:
    """A leaf of a dictionary, as its place in the template wants it."""
    if slot.target == "python":
        return value if type(value) is str else to_python(value, slot.leaf)
    if slot.target in {"numpy", "scalar"}:
        copy = np.array(to_host(value, slot.leaf.dtype))
        return copy if slot.target == "numpy" else copy[()]
    if not isinstance(value, jax.Array):
        # A copy: JAX would take the memory of the caller's array over.
        host = np.array(to_host(value, slot.leaf.dtype))
        if slot.target == "foreign":
            return host
        value = to_jax([host])[0]
        if slot.leaf.weak:
            value = weaken(value)
    elif slot.target == "foreign" and value.dtype != slot.leaf.dtype:
        return np.array(to_host(value, slot.leaf.dtype))  # JAX would narrow it
    elif slot.leaf.dtype is not None and value.dtype != slot.leaf.dtype:
        value = value.astype(slot.leaf.dtype)
    if slot.leaf.kind == "key" and value.dtype == np.uint32:
        value = wrap_key(value, slot.leaf.impl)
    if not isinstance(value, jax.Array) or isinstance(value, jax.core.Tracer):
        return value  # where a traced value lives is for JAX to say
    sharding = None if slot.sharding is None else concrete(slot.sharding)
    return value if sharding is None else place(value, sharding)


def _read_matches(
    store: OpenCheckpoint,
    template: _Template,
    matches: list[tuple[int, str]],
    mmap: bool,
    progress: ProgressOption,
) -> Iterable[tuple[int, Any]]:
    """Read what was matched, each leaf as its place in the template wants it."""
    scattered: list[tuple[int, Wanted]] = []
    whole: list[tuple[int, str, TemplateLeaf]] = []
    values: list[tuple[int, str, TemplateLeaf]] = []  # Python scalars and strs
    for position, name in matches:
        slot = template.slots[position]
        if slot is None:
            continue
        stored = store.spec_of(name)
        wanted = slot.sharding if slot.target == "jax" else None
        sharding = None if wanted is None else concrete(wanted)
        if stored.kind not in {"array", "key"}:
            values.append((position, name, slot))
        elif sharding is not None:
            scattered.append((position, Wanted(name, slot.leaf, sharding)))
        else:
            whole.append((position, name, slot))
    python = take(store, {name for _, name, _ in values}, False, None)
    for position, name, slot in values:
        yield position, _fitted(slot, python[name])
    plans = [plan_shards(store, wanted) for _, wanted in scattered]
    names = {name for _, name, _ in whole}
    size = sum(store.infos[name].nbytes for name in names)
    total = size + sum(plan.size for plan in plans)
    report = reporter(progress, "loading", jax.process_index)
    apart = {name for _, name, slot in whole if slot.target != "jax"}
    hosts = read(store, names, mmap, part_of(report, 0, total), apart)
    yield from _placed(store, whole, hosts)
    arrays = read_sharded(store, plans, mmap, part_of(report, size, total))
    yield from zip((position for position, _ in scattered), arrays, strict=True)


def _placed(
    store: OpenCheckpoint, whole: list[tuple[int, str, TemplateLeaf]], hosts: Mapping[str, Any]
) -> Iterable[tuple[int, Any]]:
    """Turn what was read whole into leaves, all arrays of JAX in one go."""
    arrays = [item for item in whole if item[2].target == "jax"]
    given = {name for _, name, _ in arrays}  # whose memory others own
    for position, name, slot in whole:
        host = hosts[name]
        if slot.target == "python":
            yield position, to_python(host, slot.leaf)
        elif slot.target != "jax":
            host = cast_array(host, slot.leaf.dtype)
            host = host.copy() if name in given else host  # two leaves of the template, one tensor
            given.add(name)
            yield position, host[()] if slot.target == "scalar" else host
    made = to_jax([cast_array(hosts[name], slot.leaf.dtype) for _, name, slot in arrays])
    for (position, name, slot), value in zip(arrays, made, strict=True):
        leaf = value
        if slot.leaf.kind == "key":
            leaf = wrap_key(leaf, slot.leaf.impl)
        elif name in store.note.leaves:
            stored = store.spec_of(name)
            if stored.weak and leaf.dtype == stored.dtype:  # not where it was cast
                leaf = weaken(leaf)
        yield position, leaf
    foreign = [name for _, name, slot in whole if slot.target == "foreign"]
    if foreign:
        warn_foreign(store, foreign)
