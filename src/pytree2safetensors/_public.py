"""All public names. The package imports this module when the first of them is used."""

from safetensors.flax import load_file

from pytree2safetensors._errors import (
    FileFormatError,
    KeyPathError,
    Pytree2SafetensorsError,
    TreeStructureError,
    UnsupportedLeafError,
    WeightsMismatchError,
)
from pytree2safetensors._load.api import load_abstract, load_metadata, load_pytree
from pytree2safetensors._load.explaining import explain
from pytree2safetensors._load.flat_dict import dict2pytree
from pytree2safetensors._load.into_template import load_into_pytree, set_weights
from pytree2safetensors._save.api import save_pytree, save_pytree_async
from pytree2safetensors._save.flat_dict import pytree2dict
from pytree2safetensors._tree.containers import PyTreeContainer, UnkeyedContainer
from pytree2safetensors._tree.keypath import string2keypath
from pytree2safetensors._tree.keys import Key, KeyPath
from pytree2safetensors._tree.rule import Rule
from pytree2safetensors._tree.spelling import keypath2string

__all__ = [
    "FileFormatError",
    "Key",
    "KeyPath",
    "KeyPathError",
    "PyTreeContainer",
    "Pytree2SafetensorsError",
    "Rule",
    "TreeStructureError",
    "UnkeyedContainer",
    "UnsupportedLeafError",
    "WeightsMismatchError",
    "dict2pytree",
    "explain",
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
