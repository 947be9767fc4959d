"""The coordination service of `jax.distributed`, whose keys all processes see.

Specification: *Saving*.
"""

from typing import Any, Final

_PREFIX: Final = "pytree2safetensors/"


class CoordinationKeys:
    """Keys that all processes see, kept by the coordination service of `jax.distributed`.

    JAX has no public interface to them. The client has had these methods since before JAX 0.4.30.
    """

    def __init__(self, client: Any) -> None:
        self.client = client

    def set(self, key: str, value: str) -> None:
        """Set a key that no other process sets; repeating the same value changes nothing."""
        try:
            self.client.key_value_set(_PREFIX + key, value)
        except RuntimeError as error:
            # The request was sent twice. Another value is an error.
            if "ALREADY_EXISTS" not in str(error) or self.wait(key, 0.0) != value:
                raise

    def wait(self, key: str, seconds: float) -> str | None:
        """Return the value of a key; None if no process sets it in time."""
        milliseconds = max(1, round(seconds * 1000))
        try:
            value: str = self.client.blocking_key_value_get(_PREFIX + key, milliseconds)
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise
        return value

    def find(self, folder: str) -> dict[str, str]:
        """Return the last parts of the keys that are in a folder now."""
        found = self.client.key_value_dir_get(_PREFIX + folder)
        return {key.rpartition("/")[2]: value for key, value in found}

    def delete(self, folder: str) -> None:
        """Delete a folder of keys."""
        self.client.key_value_delete(_PREFIX + folder)


def coordination_client() -> Any:
    """Return the client of `jax.distributed`; None if it is not initialized."""
    from jax._src import distributed  # no public module has the client

    return distributed.global_state.client
