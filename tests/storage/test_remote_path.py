"""How messages show URLs."""

import pytest

from pytree2safetensors._storage import remote_path


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://h.com/a?b=c", "https://h.com/a?..."),
        ("https://me:secret@h.com/a", "https://...@h.com/a"),
        ("simplecache::https://me@h.com/a?b", "simplecache::https://...@h.com/a?..."),
        ("hf://someone/model@main/x", "hf://someone/model@main/x"),
        ("abfs://container@account.net/x", "abfs://container@account.net/x"),
        ("404, url='http://h.com/a?t=s'", "404, url='http://h.com/a?...'"),
    ],
)
def test_credentials_are_left_out_of_urls(url: str, shown: str) -> None:
    assert remote_path.hide_credentials(url) == shown
