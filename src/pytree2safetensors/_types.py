"""Types that several folders share."""

from typing import Any, TypeAlias

# The kind of a node or leaf in a note: a word, or a word and an argument.
Kind: TypeAlias = str | list[Any]

# Bytes, and their offset in bytes from the start of a file or a tensor.
Chunk: TypeAlias = tuple[int, memoryview]
