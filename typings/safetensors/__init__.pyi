# Types for what safetensors itself leaves untyped: its root module, as of 0.8.

import os
from collections.abc import Sequence
from types import EllipsisType, TracebackType
from typing import Any, Literal, TypeAlias, TypedDict, final, type_check_only

from typing_extensions import Self

_Index: TypeAlias = int | slice | EllipsisType

@type_check_only
class _Tensor(TypedDict):
    dtype: str
    shape: list[int]
    data: bytearray

@type_check_only
class _Slice:
    def __getitem__(self, index: _Index | tuple[_Index, ...] | list[int], /) -> Any: ...
    def get_dtype(self) -> str: ...
    def get_shape(self) -> list[int]: ...

__version__: str

class SafetensorError(Exception): ...

@final
class TensorSpec:
    def __new__(cls, *, dtype: str, shape: Sequence[int], data_ptr: int, data_len: int) -> Self: ...
    @property
    def data_len(self) -> int: ...
    @property
    def data_ptr(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> list[int]: ...

@final
class safe_open:
    def __new__(
        cls,
        filename: str | os.PathLike[str],
        framework: Literal["flax", "jax", "np", "numpy", "pt", "tf"],
        device: str | int | None = ...,
        *,
        backend: Literal["mmap", "pread"] = ...,
    ) -> Self: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        _exc_type: type[BaseException] | None,
        _exc_value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None: ...
    # What it returns depends on the framework.
    def get_slice(self, name: str) -> _Slice: ...
    def get_tensor(self, name: str) -> Any: ...
    def get_tensors(self) -> dict[str, Any]: ...
    def keys(self) -> list[str]: ...
    def metadata(self) -> dict[str, str] | None: ...
    def offset_keys(self) -> list[str]: ...

def deserialize(bytes: bytes) -> list[tuple[str, _Tensor]]: ...
def serialize(
    tensor_dict: dict[str, TensorSpec], metadata: dict[str, str] | None = None
) -> bytes: ...
def serialize_file(
    tensor_dict: dict[str, TensorSpec],
    filename: str | os.PathLike[str],
    metadata: dict[str, str] | None = None,
) -> None: ...
