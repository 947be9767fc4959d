"""Templates: putting stored leaves into the places that a tree of your own has for them."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from beartype import beartype
from jaxtyping import jaxtyped

from pytree2safetensors._collector import collector_paused
from pytree2safetensors._errors import WeightsMismatchError, shorten
from pytree2safetensors._file import PathLike, Readable
from pytree2safetensors._keypath import below, string2keypath, under
from pytree2safetensors._leaf import Logical, holds, to_host, to_jax, weaken, wrap_key
from pytree2safetensors._load import names_below, read, take, warn_foreign
from pytree2safetensors._progress import ProgressOption, part_of, reporter
from pytree2safetensors._sharding import Wanted, concrete, place, plan_shards, read_sharded
from pytree2safetensors._slot import Slot, misfit, slot_of, to_python
from pytree2safetensors._store import Store, open_store
from pytree2safetensors._tree import PyTree, flatten

Rename: TypeAlias = Callable[[str], str] | Mapping[str, str]

_LISTED = 20  # of each kind of mismatch in a message
_COMPARED = 2000  # names among which the nearest is looked for


@jaxtyped(typechecker=beartype)
def set_weights(
    module: PyTree,
    dictionary: Mapping[str, Any],
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
    names = [name for name in dictionary if below(prefix, name) is not None]
    slots = {name: slot_of(dictionary[name]) for name in names}
    available = {name: None if slot is None else slot.leaf for name, slot in slots.items()}
    matches = _match(
        template, available, dictionary, _Options("the dictionary", strict, cast, prefix, rename)
    )
    leaves = list(template.leaves)
    for position, name in matches:
        slot = template.slots[position]
        if slot is not None:
            leaves[position] = _fitted(slot, dictionary[name], name)
    return jax.tree_util.tree_unflatten(template.treedef, leaves)


@jaxtyped(typechecker=beartype)
def load_into_pytree(
    module: PyTree,
    path: PathLike | Readable,
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
        OSError: The file cannot be read.

    Specification: *Loading into a template*.

    >>> save_pytree({"w": np.ones(2, np.float32)}, "model.safetensors")
    >>> load_into_pytree({"w": np.zeros(2, np.float32)}, "model.safetensors")
    {'w': array([1., 1.], dtype=float32)}
    """
    with collector_paused(), open_store(path) as store:
        template = _template(module)
        names = names_below(store, prefix).values()
        matches = _match(
            template,
            _Stored(store, names),
            _Scalars(store),
            _Options(store.label, strict, cast, prefix, rename),
        )
        leaves = list(template.leaves)
        for position, value in _read_matches(store, template, matches, mmap, progress):
            leaves[position] = value
        return jax.tree_util.tree_unflatten(template.treedef, leaves)


class _Template(NamedTuple):
    """A flattened template: what each of its leaves asks for."""

    treedef: Any
    names: list[str]
    leaves: list[Any]
    slots: list[Slot | None]


class _Options(NamedTuple):
    """How to match, and what messages call the source."""

    label: str
    strict: bool
    cast: bool
    prefix: str
    rename: Rename | None


def _template(module: Any) -> _Template:
    flat = flatten(module)
    treedef = jax.tree_util.tree_structure(module)
    return _Template(treedef, flat.names, flat.leaves, [slot_of(leaf) for leaf in flat.leaves])


class _Stored(Mapping[str, Logical | None]):
    """What a store has under some of its names, judged when it is asked for.

    So a tensor of a dtype that nothing here reads stands in nobody's way.
    """

    def __init__(self, store: Store, names: Iterable[str]) -> None:
        self.store, self.names = store, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Logical:
        return self.store.logical(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _Scalars(Mapping[str, Any]):
    """The Python scalars of a store, read when they are asked for."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __getitem__(self, name: str) -> Any:
        return take(self.store, [name], False, None)[name]

    def __iter__(self) -> Any:
        return iter(self.store.forms)

    def __len__(self) -> int:
        return len(self.store.forms)


# --- matching ---------------------------------------------------------------------------------


def _match(
    template: _Template,
    available: Mapping[str, Logical | None],
    values: Mapping[str, Any],
    options: _Options,
) -> list[tuple[int, str]]:
    """Which name goes to which leaf of the template, by position."""
    found: list[tuple[int, str]] = []
    missing: list[tuple[str, str]] = []  # the path in the template, and the name looked for
    mismatched: list[str] = []
    lost = False  # an abstract leaf has no value to fall back on
    castable = False
    used: set[str] = set()
    for position, (path, slot) in enumerate(zip(template.names, template.slots, strict=True)):
        if slot is None:
            name = under(options.prefix, path)  # `rename` knows the names of data alone
            if name in available and available[name] is None:
                used.add(name)  # neither is data
            continue
        name = _renamed(path, options)
        if name not in available:
            missing.append((path, name))
            lost = lost or slot.abstract
            continue
        used.add(name)
        stored = available[name]
        value = None
        if stored is None:
            reason: str | None = "what is given for it is no data"
        else:
            if _needs_value(slot, stored):
                value = values[name]
            reason = misfit(slot, stored, value, cast=options.cast)
        if reason is None:
            found.append((position, name))
        else:
            mismatched.append(f"{shorten(path)}: {reason}")
            lost = lost or slot.abstract
            castable = castable or (
                stored is not None and misfit(slot, stored, value, cast=True) is None
            )
    unexpected = [name for name in available if name not in used]
    wanted = any(slot is not None for slot in template.slots)
    nothing = not found and (bool(available) or wanted)
    if (options.strict and (missing or unexpected or mismatched)) or lost or nothing:
        remedy = _remedy(options, bool(missing), castable, nothing)
        raise _mismatch(options, missing, unexpected, mismatched, remedy)
    return found


def _renamed(path: str, options: _Options) -> str:
    rename = options.rename
    if rename is None:
        return under(options.prefix, path)
    if isinstance(rename, Mapping):
        return rename[path] if path in rename else under(options.prefix, path)
    return rename(path)


def _needs_value(slot: Slot, stored: Logical) -> bool:
    return (
        stored.dtype is None
        and stored.kind not in {"key", "str"}
        and (
            slot.leaf.dtype is not None
            or (stored.kind == "int" and slot.leaf.kind in {"float", "complex"})
        )
    )


def _mismatch(
    options: _Options,
    missing: list[tuple[str, str]],
    unexpected: list[str],
    mismatched: list[str],
    remedy: str,
) -> WeightsMismatchError:
    counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(mismatched)} mismatched"
    candidates = unexpected[:_COMPARED]
    missing_lines = [_with_nearest(name, candidates) for _, name in missing[:_LISTED]]
    parts = [
        f"{options.label} does not fit the template: {counts}",
        *_section("missing (the template has them)", missing_lines, len(missing)),
        *_section(
            "unexpected (the template has no place for them)",
            [shorten(name) for name in unexpected[:_LISTED]],
            len(unexpected),
        ),
        *_section("mismatched", mismatched[:_LISTED], len(mismatched)),
        remedy,
    ]
    return WeightsMismatchError(
        "\n".join(parts), [path for path, _ in missing], unexpected, mismatched
    )


def _with_nearest(name: str, candidates: list[str]) -> str:
    near = difflib.get_close_matches(name[:300], candidates, 1) if len(name) <= 300 else []
    return shorten(name) + (f" (nearest: {shorten(near[0])})" if near else "")


def _section(title: str, lines: Iterable[str], count: int) -> list[str]:
    if not count:
        return []
    more = [f"    ... and {count - _LISTED:,} more"] if count > _LISTED else []
    return [f"  {title}:", *(f"    {line}" for line in lines), *more]


def _remedy(options: _Options, missing: bool, castable: bool, nothing: bool) -> str:
    if not options.strict and not nothing:
        return (
            "strict=False keeps the template's leaves, and what is abstract has no value to keep."
        )
    remedies = ["rename= maps names", "prefix= takes a subtree"] if missing else []
    remedies += ["cast=True converts dtypes"] if castable else []
    if nothing:
        return "Nothing fits, which strict=False does not allow either" + _listed(remedies)
    return "; ".join([*remedies, "strict=False loads what fits"]) + "."


def _listed(remedies: list[str]) -> str:
    return f": {'; '.join(remedies)}." if remedies else "."


# --- values -----------------------------------------------------------------------------------


def _fitted(slot: Slot, value: Any, name: str) -> Any:
    """A leaf of a dictionary, as its place in the template wants it."""
    if slot.target == "python":
        return value if type(value) is str else to_python(value, slot.leaf)
    if slot.target != "jax":
        copy = np.array(to_host(value, slot.leaf.dtype))
        return copy if slot.target == "numpy" else copy[()]
    if not isinstance(value, jax.Array):
        # A copy: JAX would take the memory of the caller's array over.
        host = np.array(to_host(value, slot.leaf.dtype))
        value = _adopted([host])[0]
        if isinstance(value, jax.Array) and slot.leaf.weak:
            value = weaken(value)
    elif _is_foreign(slot) and value.dtype != slot.leaf.dtype:
        return np.array(to_host(value, slot.leaf.dtype))  # JAX would narrow it
    elif slot.leaf.dtype is not None and value.dtype != slot.leaf.dtype:
        value = value.astype(slot.leaf.dtype)
    if slot.leaf.kind == "key" and value.dtype == np.uint32:
        value = wrap_key(value, slot.leaf.impl)
    if slot.sharding is None or not isinstance(value, jax.Array):
        return value
    return place(value, concrete(slot.sharding, name))


def _adopted(hosts: list[Any]) -> list[Any]:
    """JAX arrays that own the memory of these, where JAX can hold their dtypes."""
    held = [position for position, host in enumerate(hosts) if holds(host.dtype)]
    found: list[Any] = list(hosts)
    for position, made in zip(held, to_jax([hosts[i] for i in held]), strict=True):
        found[position] = made
    return found


def _read_matches(
    store: Store,
    template: _Template,
    matches: list[tuple[int, str]],
    mmap: bool,
    progress: ProgressOption,
) -> Iterable[tuple[int, Any]]:
    """Read what was matched, each leaf as its place in the template wants it."""
    scattered: list[tuple[int, Wanted]] = []
    whole: list[tuple[int, str, Slot]] = []
    values: list[tuple[int, str, Slot]] = []  # Python scalars and strs
    for position, name in matches:
        slot = template.slots[position]
        if slot is None:
            continue
        stored = store.logical(name)
        if stored.kind not in {"array", "key"}:
            values.append((position, name, slot))
        elif slot.sharding is not None and not _is_foreign(slot):
            sharding = concrete(slot.sharding, name)
            scattered.append((position, Wanted(name, slot.leaf, sharding)))
        else:
            whole.append((position, name, slot))
    python = take(store, {name for _, name, _ in values}, False, None)
    for position, name, slot in values:
        yield position, _fitted(slot, python[name], name)
    plans = [plan_shards(store, wanted) for _, wanted in scattered]
    names = {name for _, name, _ in whole}
    size = sum(store.forms[name].nbytes for name in names)
    total = size + sum(plan.size for plan in plans)
    report = reporter(progress, "loading")
    apart = {name for _, name, slot in whole if slot.target != "jax" or _is_foreign(slot)}
    hosts = read(store, names, mmap, part_of(report, 0, total), apart)
    yield from _placed(store, whole, hosts)
    arrays = read_sharded(store, plans, mmap, part_of(report, size, total))
    yield from zip((position for position, _ in scattered), arrays, strict=True)


def _is_foreign(slot: Slot) -> bool:
    return slot.leaf.dtype is not None and not holds(slot.leaf.dtype)


def _placed(
    store: Store, whole: list[tuple[int, str, Slot]], hosts: Mapping[str, Any]
) -> Iterable[tuple[int, Any]]:
    """Turn what was read whole into leaves, all arrays of JAX in one go."""
    arrays: list[tuple[int, str, Slot]] = []
    foreign: list[str] = []
    seen = {name for _, name, slot in whole if slot.target == "jax"}  # whose memory others own
    for position, name, slot in whole:
        if slot.target == "jax":
            arrays.append((position, name, slot))
            if _is_foreign(slot):
                foreign.append(name)
        elif slot.target == "python":
            yield position, to_python(hosts[name], slot.leaf)
        else:
            host = to_host(hosts[name], slot.leaf.dtype)
            host = host.copy() if name in seen else host  # two leaves of the template, one tensor
            seen.add(name)
            yield position, host if slot.target == "numpy" else host[()]
    values: list[Any] = []
    given: set[str] = set()
    for _, name, slot in arrays:
        host = to_host(hosts[name], slot.leaf.dtype)
        if _is_foreign(slot):  # a NumPy array, which its owner may change
            host = host.copy() if name in given else host
            given.add(name)
        values.append(host)
    made = _adopted(values)
    for (position, name, slot), value in zip(arrays, made, strict=True):
        leaf = value
        if slot.leaf.kind == "key":
            leaf = wrap_key(leaf, slot.leaf.impl)
        elif store.logical(name).weak and isinstance(leaf, jax.Array):
            leaf = weaken(leaf)
        yield position, leaf
    if foreign:
        warn_foreign(store, foreign)
