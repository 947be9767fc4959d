"""How messages show URLs."""

import time
from pathlib import Path

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
        ("abfs://me:secret@account.net/x", "abfs://...@account.net/x"),
        ("hf://gpt2@main/x", "hf://gpt2@main/x"),
        ("memory://a@b", "memory://a@b"),
        ("zip://a@b::ftp://me:secret@h/x", "zip://a@b::ftp://...@h/x"),
        ("webhdfs://me:secret@h/x", "webhdfs://...@h/x"),
        ("ftp://me:s@cr@et@h/x", "ftp://...@h/x"),
        ("ftp://me:it's a secret?@h/x", "ftp://...@h/x"),
        ("http://h/my file?secret", "http://h/my file?..."),
        ("https://h/a?x='b' c&s=secret", "https://h/a?..."),
        ("https:/me:secret@h/a?secret", "https:/...@h/a?..."),  # as pathlib shortens it
        ("FTP://me:secret@h/x", "FTP://...@h/x"),
        ("C:/me@h/x", "C:/me@h/x"),
        ("/me@h/x?y", "/me@h/x?y"),
    ],
)
def test_credentials_are_left_out_of_urls(url: str, shown: str) -> None:
    assert remote_path.shown_url(url) == shown
    assert remote_path.shown_url(shown) == shown
    for text in ("{}", "404, url='{}'", "cannot open {}: no (such) file", "{} (see {}) is [{}]"):
        hidden = remote_path.hide_credentials(text.replace("{}", url), url)
        assert hidden == text.replace("{}", shown)
        assert remote_path.hide_credentials(hidden, url) == hidden


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("404, url='http://h.com/a?t=s'", "404, url='http://h.com/a?...'"),
        ("404, url='http://h.com/a?t='s'&u'", "404, url='http://h.com/a?...'"),
        ("(http://h.com/a?t=s): none", "(http://h.com/a?...): none"),
        ("cannot reach http://h.com/a b. Why? See x", "cannot reach http://h.com/a b. Why? See x"),
    ],
)
def test_credentials_are_left_out_of_texts(text: str, shown: str) -> None:
    assert remote_path.hide_credentials(text, "s3://bucket/x") == shown


def test_a_local_path_is_shown_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert remote_path.shown_url("dd:/me@y?z") == "dd:/...@y?..."
    (tmp_path / "dd:").mkdir()
    assert remote_path.shown_url("dd:/me@y?z") == "dd:/me@y?z"
    assert remote_path.shown_url("dd://me@y?z") == "dd://...@y?..."
    for path in ("run/dd:/me@y?z", "dd:me@y", " dd:/me@y"):
        assert remote_path.shown_url(path) == path


def test_an_empty_query_stays() -> None:
    assert remote_path.shown_url("https://h/a?") == "https://h/a?"


@pytest.mark.parametrize("part", ["://", "ab:/", "ab://", "hf:/", "a.", "?'", "@", "ab:/? "])
@pytest.mark.parametrize("start", ["", "ab://x", "ab:/?"])
def test_showing_a_url_takes_time_in_proportion_to_its_length(start: str, part: str) -> None:
    text = start + 20_000 * part + "x"
    began = time.process_time()
    remote_path.shown_url(text)
    remote_path.hide_credentials(text, "s3://bucket/x")
    assert time.process_time() - began < 0.5  # a pattern that tries each place again takes seconds
