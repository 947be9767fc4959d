"""Any JAX pytree to one safetensors file and back, losslessly, without pickle."""

from safetensors.flax import load_file

from pytree2safetensors._background import save_pytree_async
from pytree2safetensors._container import PyTreeContainer, UnkeyedContainer
from pytree2safetensors._errors import (
    FileFormatError,
    KeyPathError,
    Pytree2SafetensorsError,
    TreeStructureError,
    UnsupportedLeafError,
    WeightsMismatchError,
)
from pytree2safetensors._keypath import Key, KeyPath, keypath2string, string2keypath
from pytree2safetensors._load import load_abstract, load_metadata, load_pytree
from pytree2safetensors._save import save_pytree
from pytree2safetensors._tree import dict2pytree, pytree2dict
from pytree2safetensors._weights import load_into_pytree, set_weights

__all__ = [
    "FileFormatError",
    "Key",
    "KeyPath",
    "KeyPathError",
    "PyTreeContainer",
    "Pytree2SafetensorsError",
    "TreeStructureError",
    "UnkeyedContainer",
    "UnsupportedLeafError",
    "WeightsMismatchError",
    "dict2pytree",
    "keypath2string",
    "load_abstract",
    "load_file",
    "load_into_pytree",
    "load_metadata",
    "load_pytree",
    "pytree2dict",
    "save_pytree",
    "save_pytree_async",
    "set_weights",
    "string2keypath",
]
