"""Types that several folders share."""

from typing import Any, TypeAlias

# What a note says of a node or leaf whose key path or tensor does not tell it: a kind, or a kind and an argument.
Kind: TypeAlias = str | list[Any]

# Bytes, and where they go: their offset in bytes from the start of a file or of a tensor.
Chunk: TypeAlias = tuple[int, memoryview]
