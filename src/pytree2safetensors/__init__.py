"""Save any JAX pytree to safetensors and load it back, losslessly and without pickle."""

from typing import TYPE_CHECKING

from pytree2safetensors._version import __version__ as __version__

if TYPE_CHECKING:
    from pytree2safetensors._public import *  # noqa: F403 - checkers read its __all__
    from pytree2safetensors._public import __all__ as __all__
else:
    del TYPE_CHECKING  # not a name of this package
    __import__("concurrent.futures.thread")  # not possible any more when the interpreter is exiting

    # The names in `_public` need JAX. The command's help does not, so the first use imports them.
    def __getattr__(name):
        if name.startswith("_") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        public = import_module("pytree2safetensors._public")
        globals().update({key: getattr(public, key) for key in ("__all__", *public.__all__)})
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
