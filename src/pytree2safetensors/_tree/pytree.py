"""The type of any tree, in the signatures of public functions.

Specification: *Trees and flat dicts*.
"""

from typing import TYPE_CHECKING, Any, TypeAlias

import jaxtyping

if TYPE_CHECKING:
    # Type checkers do not know jaxtyping's own, and strict ones report that to our users.
    PyTree: TypeAlias = Any
else:
    PyTree = jaxtyping.PyTree
