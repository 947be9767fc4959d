"""Keys: the classes that JAX's key paths are made of, with types.

Specification: *Key paths*.
"""

from typing import TYPE_CHECKING, TypeAlias

from jax.tree_util import tree_flatten_with_path

if TYPE_CHECKING:
    # JAX declares its key classes as `Any`; only this module gives them types.
    class DictKey:
        """The key of an entry of a dict."""

        key: object

        def __init__(self, key: object) -> None: ...

    class GetAttrKey:
        """The key of an attribute."""

        name: str

        def __init__(self, name: str) -> None: ...

    class SequenceKey:
        """The key of an element of a list or tuple."""

        idx: int

        def __init__(self, idx: int) -> None: ...

    class FlattenedIndexKey:
        """The key of a child of a node that was registered without keys."""

        key: int

        def __init__(self, key: int) -> None: ...
else:
    from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

Key: TypeAlias = DictKey | GetAttrKey | SequenceKey | FlattenedIndexKey
KeyPath: TypeAlias = tuple[Key, ...]

MAX_INDEX = 2**31 - 1  # the largest index of JAX's keys


def item_key(value: object) -> DictKey:
    """Make the key of a dict's entry."""
    if value is not None:
        return DictKey(value)
    # From JAX 0.4.36 to 0.9, flattening a dict makes this key, but its class does not.
    (((key,), _),), _ = tree_flatten_with_path({None: 0})
    found: DictKey = key
    return found
