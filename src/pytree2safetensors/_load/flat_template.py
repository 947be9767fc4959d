"""Flattened templates and open files: the leaves that are needed, and the leaves that are stored.

Specification: *Loading into a template*.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from pytree2safetensors._leaves.renaming import Rename, rules_in
from pytree2safetensors._leaves.spec import LeafSpec
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.complaints import check
from pytree2safetensors._load.given import ignored_data
from pytree2safetensors._load.holding import held_arrays
from pytree2safetensors._load.matching import Comparison, Found, Options, compare
from pytree2safetensors._load.prefixes import names_below
from pytree2safetensors._load.template import TemplateLeaf, template_leaves
from pytree2safetensors._tree.depth import deep_structure
from pytree2safetensors._tree.flatten import flatten
from pytree2safetensors._tree.orders import keyed_structure


class FlatTemplate(NamedTuple):
    """A flattened template, with what each leaf needs."""

    treedef: Any
    names: list[str]
    leaves: list[Any]
    needs: list[TemplateLeaf | None]
    held: dict[int, str]  # why leaves that are not data do not fit, if they hold arrays

    def wanted(self) -> Iterator[str]:
        """Return the names of leaves that are data."""
        return (name for name, need in zip(self.names, self.needs, strict=True) if need)

    def keeping(self, values: Mapping[str, Any]) -> tuple["FlatTemplate", list[str]]:
        """Keep leaves that are not data, where they are also values, under any name.

        Returns:
            The template without complaints about these leaves, and their names.
        """
        others = {
            id(leaf) for leaf, need in zip(self.leaves, self.needs, strict=True) if need is None
        }
        own = {name: id(value) for name, value in values.items() if id(value) in others}
        kept = {*own.values()}
        held = {n: why for n, why in self.held.items() if id(self.leaves[n]) not in kept}
        return self._replace(held=held), [*own]

    def compared(
        self,
        available: Mapping[str, Any],
        values: Callable[[Collection[str]], Mapping[str, Any]],
        options: Options,
    ) -> Comparison:
        """Compare the template with the leaves that it may get."""
        return compare(self.names, self.needs, self.held, available, values, options)

    def match(
        self,
        available: Mapping[str, Any],
        values: Callable[[Collection[str]], Mapping[str, Any]],
        options: Options,
        own: Iterable[str] = (),
    ) -> list[Found]:
        """Return which name or view goes to which leaf. Leaves that the template keeps have `own` names.

        Raises:
            WeightsMismatchError: They do not fit.
        """
        outcome = self.compared(available, values, options)
        outcome.used.update(own)
        given = values({name for _, name in outcome.unstorable})
        pairs = [(self.leaves[position], given[name]) for position, name in outcome.unstorable]
        for (position, _), reason in zip(outcome.unstorable, ignored_data(pairs), strict=True):
            if reason is not None:
                outcome.mismatched.append((self.names[position], reason))
        check(outcome, options)
        return outcome.found


def flat_template(module: Any) -> FlatTemplate:
    """Flatten a template."""
    flat = flatten(module, is_template=True)
    structure = keyed_structure if flat.is_keyed else jax.tree_util.tree_structure
    treedef = deep_structure(module, structure) if flat.is_deep else structure(module)
    needs = template_leaves(flat.leaves)
    return FlatTemplate(treedef, flat.names, flat.leaves, needs, held_arrays(flat.leaves, needs))


def stored_for(
    template: FlatTemplate, checkpoint: OpenCheckpoint, prefix: str, rename: Rename | None
) -> "Stored":
    """Return the leaves of a checkpoint that a template may get."""
    below = names_below(checkpoint, prefix, template.wanted()).values()
    # The names in rules do not begin at `prefix`.
    return Stored(checkpoint, below if rules_in(rename) is None else sorted(checkpoint.infos))


class Stored(Mapping[str, LeafSpec | str]):
    """The leaves of a checkpoint under some names, or why they cannot be loaded.

    They are described on demand, so a leaf that is not needed cannot raise an error.
    """

    def __init__(self, checkpoint: OpenCheckpoint, names: Iterable[str]) -> None:
        self.checkpoint, self.names = checkpoint, dict.fromkeys(names)

    def __getitem__(self, name: str) -> LeafSpec | str:
        return self.checkpoint.spec_or_reason(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
