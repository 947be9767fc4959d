"""Loading into a template: stored leaves replace the leaves of a given tree.

Specification: *Loading into a template*.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import jax

from pytree2safetensors._arguments import checked
from pytree2safetensors._collector import collector_paused
from pytree2safetensors._leaves.jax_versions import with_sharding
from pytree2safetensors._leaves.renaming import Rename, rules_in
from pytree2safetensors._leaves.spec import ARRAYS
from pytree2safetensors._leaves.views import View
from pytree2safetensors._load.eager import eagerly
from pytree2safetensors._load.flat_template import flat_template, stored_for
from pytree2safetensors._load.given import fitted, given_spec, seen_through
from pytree2safetensors._load.matching import Options
from pytree2safetensors._load.opening import again_if_replaced, open_checkpoint
from pytree2safetensors._load.reading import read_leaves
from pytree2safetensors._load.shardings import concrete
from pytree2safetensors._load.slots import Wanted
from pytree2safetensors._load.stored import scalar_reader, warn_foreign
from pytree2safetensors._load.template import TemplateLeaf, template_leaves
from pytree2safetensors._storage.locations import PathLike, Readable
from pytree2safetensors._storage.progress import ProgressOption, reporter
from pytree2safetensors._tree.keypath import string2keypath
from pytree2safetensors._tree.paths import strip_prefix

# A tree of the caller's, which a function returns with other leaves. Type checkers keep its type.
T = TypeVar("T")


@checked
def set_weights(
    module: T,
    dictionary: Mapping[str, Any],
    verbose: bool = False,
    *,
    strict: bool = True,
    unexpected: Literal["raise", "skip"] = "raise",
    cast: bool = False,
    prefix: str = "",
    rename: Rename | None = None,
) -> T:
    """Return `module` with its leaves replaced by those of `dictionary`.

    Args:
        module: The template. Its leaves are arrays, `jax.ShapeDtypeStruct`s, NumPy arrays, Python
            scalars, strs and PRNG keys.
        dictionary: A mapping from names to leaves, such as `pytree2dict` returns.
        verbose: Print on stderr what did not fit with `strict=False`.
        strict: Raise if any leaf is missing, unexpected or mismatched. If False, keep the leaves of
            the template that do not fit; raise only if one of them has no value, or if no leaf fits.
            The logger "pytree2safetensors" reports what did not fit.
        unexpected: "raise", or "skip" to ignore leaves that the template does not have.
        cast: Convert dtypes to those of the template, which must be of the same kind or a later one
            in the order bool, unsigned integer, signed integer, float, complex. Values of arrays that
            do not fit wrap or overflow, as in NumPy.
        prefix: A spelled key path. Use the entries below it.
        rename: Rules; or a function or mapping from a spelled key path of the template to the name
            in the dictionary.

    Returns:
        A tree with the treedef of `module`. Type checkers give it the type of `module`.

    Raises:
        WeightsMismatchError: Leaves are missing, unexpected or mismatched. Its attributes list all of
            them, and the message lists the first 20 of each kind.
        KeyPathError: A key path of `module` cannot be spelled, or `prefix` is not a key path.
        TreeStructureError: JAX cannot flatten `module`; or, before JAX 0.4.36, gives the children of a
            node another order with their keys than without.
        ValueError: The path of a rule is ambiguous in `module`.

    Specification: *Loading into a template*.

    >>> set_weights({"w": 0.0}, {"@w": 1.5})
    {'w': 1.5}
    """
    template = flat_template(module)
    if prefix:
        string2keypath(prefix)
    whole = rules_in(rename) is not None  # the names in rules do not begin at `prefix`
    names = [name for name in dictionary if whole or strip_prefix(prefix, name) is not None]
    given = template_leaves(dictionary[name] for name in names)
    available = {
        name: given_spec(leaf, dictionary[name]) for name, leaf in zip(names, given, strict=True)
    }
    template, own = template.keeping(
        {name: dictionary[name] for name, spec in available.items() if spec is None}
    )
    options = Options("the dictionary", strict, verbose, cast, prefix, rename, unexpected)
    matches = template.match(available, lambda _: dictionary, options, own)
    leaves = list(template.leaves)
    pairs = (
        (
            _placed(need),
            dictionary[source]
            if isinstance(source, str)
            else seen_through(source, dictionary, need),
        )
        for _, source, need in matches
    )
    for (position, *_), leaf in zip(matches, fitted(pairs), strict=True):
        leaves[position] = leaf
    loaded: T = jax.tree_util.tree_unflatten(template.treedef, leaves)
    return loaded


@again_if_replaced
@checked
def load_into_pytree(
    module: T,
    path: PathLike | Readable,
    verbose: bool = False,
    *,
    strict: bool = True,
    unexpected: Literal["raise", "skip"] = "raise",
    cast: bool = False,
    prefix: str = "",
    rename: Rename | None = None,
    mmap: bool = False,
    progress: ProgressOption = False,
) -> T:
    """Load a file into a template, and read only what the template needs.

    Args:
        module: The template. Its leaves are arrays, `jax.ShapeDtypeStruct`s, NumPy arrays, Python
            scalars, strs and PRNG keys. A loaded array has the sharding of a committed array, or of
            a `jax.ShapeDtypeStruct` that has one.
        path: The path or URL of a file, a folder of shards or its index; or a binary file object.
        verbose: Print on stderr what did not fit with `strict=False`.
        strict: Raise if any leaf is missing, unexpected or mismatched. If False, keep the leaves of
            the template that do not fit; raise only if one of them has no value, or if no leaf fits.
            The logger "pytree2safetensors" reports what did not fit.
        unexpected: "raise", or "skip" to ignore leaves that the template does not have.
        cast: Convert dtypes to those of the template, which must be of the same kind or a later one
            in the order bool, unsigned integer, signed integer, float, complex. Values of arrays that
            do not fit wrap or overflow, as in NumPy.
        prefix: A spelled key path. Load the subtree there.
        rename: Rules; or a function or mapping from a spelled key path of the template to the name
            in the file.
        mmap: Map the file instead of reading it. The file must not change afterwards.
        progress: True for a progress bar, or a function of (done_bytes, total_bytes), which may be
            called in other threads, one call at a time.

    Returns:
        A tree with the treedef of `module`. Type checkers give it the type of `module`.

    Raises:
        WeightsMismatchError: Leaves are missing, unexpected or mismatched. Its attributes list all of
            them, and the message lists the first 20 of each kind.
        FileFormatError: The file is damaged, is not a safetensors file, or changes during the load; or
            the folder has no checkpoint, or none of several takes precedence.
        KeyPathError: A key path of `module` cannot be spelled, or `prefix` is not a key path.
        TreeStructureError: JAX cannot flatten `module`; or, before JAX 0.4.36, gives the children of a
            node another order with their keys than without.
        ValueError: `mmap` is True, and `path` is a file object or a URL; or the path of a rule is
            ambiguous in `module`.
        RuntimeError: A function that `jax.shard_map` runs without `jax.jit` cannot load.
        OSError: The file cannot be read.

    Specification: *Loading into a template*.

    >>> save_pytree({"w": np.ones(2, np.float32)}, "model.safetensors")
    >>> load_into_pytree({"w": np.zeros(2, np.float32)}, "model.safetensors")
    {'w': array([1., 1.], dtype=float32)}
    """
    with open_checkpoint(path, mmap) as checkpoint:
        with collector_paused():
            template = flat_template(module)
        available = stored_for(template, checkpoint, prefix, rename)
        options = Options(checkpoint.label, strict, verbose, cast, prefix, rename, unexpected)
        read_scalars = scalar_reader(checkpoint)
        with collector_paused():
            matches = template.match(available, read_scalars, options)
        report = reporter(progress, "loading", jax.process_index)
        leaves = list(template.leaves)
        wanted: list[tuple[int, Wanted]] = []
        python: list[tuple[int, Wanted]] = []  # stored as Python scalars and strs
        with collector_paused():
            for position, source, need in matches:
                is_array = isinstance(source, View) or checkpoint.spec_of(source).kind in ARRAYS
                (wanted if is_array else python).append((position, Wanted(source, _placed(need))))
        scalars = read_scalars({want.name for _, want in python})
        values = eagerly(lambda: fitted((want.leaf, scalars[want.name]) for _, want in python))
        for (position, _), value in zip(python, values, strict=True):
            leaves[position] = value
        found = read_leaves(checkpoint, [want for _, want in wanted], mmap=mmap, progress=report)
        for (position, _), value in zip(wanted, found, strict=True):
            leaves[position] = value
        foreign = [want for _, want in (*python, *wanted) if want.leaf.target == "foreign"]
        if foreign:
            warn_foreign(checkpoint, foreign)
        loaded: T = jax.tree_util.tree_unflatten(template.treedef, leaves)
        return loaded


def _placed(leaf: TemplateLeaf) -> TemplateLeaf:
    """Return the same leaf, with its sharding on the current mesh."""
    if leaf.sharding is None:
        return leaf
    sharding = concrete(leaf.sharding)
    if sharding is leaf.sharding:
        return leaf
    format_ = None if sharding is None else with_sharding(leaf.format, sharding)
    return leaf._replace(sharding=sharding, format=format_)
