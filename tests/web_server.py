"""A web server on this machine that serves ranges, counts what it is asked, and can misbehave."""

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from loopback import QuietHandler, serving


class Request(NamedTuple):
    """A request, and how many bytes of the file went out."""

    method: str
    path: str
    sent: int


class WebServer:
    """Serves files from memory.

    Attributes:
        files: The contents, by path.
        requests: What was asked, in order.
        delay: Seconds that each request takes.
        has_ranges: "yes", "no" (which it says), or "ignored".
        compresses: Whether it compresses files for clients that accept this, and then ignores ranges.
        has_etags: Whether files have entity tags.
        obeys_if_match: Whether it refuses to send a file with another tag than was asked for.
        has_head: Whether it answers HEAD, which presigned URLs of S3 refuse.
        key: What the header X-Key has to be, if anything.
        refusal: The status of the answer to requests for other files, or without the key.
        before: Called with the number of each request, before it is answered; may change files, or
            raise a ConnectionError to drop the connection.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.delay = 0.0
        self.has_ranges = "yes"
        self.has_etags = self.obeys_if_match = self.has_head = True
        self.compresses = False
        self.key = ""
        self.refusal = 404
        self.before: Callable[[int], None] = lambda number: None
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.url = ""

    @property
    def sent(self) -> int:
        return sum(request.sent for request in self.requests)


def etag_of(content: bytes) -> str:
    return f'"{hash(content) & 0xFFFFFFFF:x}-{len(content)}"'


class _Handler(QuietHandler):
    state: WebServer

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        state = self.state
        with state.lock:
            number = len(state.requests)
            state.requests.append(Request(self.command, self.path, 0))
            state.at_once += 1
            state.most_at_once = max(state.most_at_once, state.at_once)
        try:
            time.sleep(state.delay)
            state.before(number)
            self.respond(number)
        except ConnectionError:
            self.close_connection = True
            self.connection.close()
        finally:
            with state.lock:
                state.at_once -= 1

    def respond(self, number: int) -> None:
        state = self.state
        content = state.files.get(self.path.partition("?")[0])
        if content is None or state.key not in {"", self.headers.get("X-Key")}:
            self.reply(state.refusal)
            return
        if self.command == "HEAD" and not state.has_head:
            self.reply(403)
            return
        etag, wanted = etag_of(content), self.headers.get("If-Match")
        if wanted is not None and wanted != etag and state.obeys_if_match:
            self.reply(412)
            return
        size, ranges = len(content), self.headers.get("Range")
        headers = {"Accept_Ranges": "none" if state.has_ranges == "no" else "bytes"}
        if state.has_etags:
            headers["ETag"] = etag
        status = 200
        if state.compresses and "gzip" in self.headers.get("Accept-Encoding", ""):
            content = gzip.compress(content)
            headers["Content_Encoding"] = "gzip"
        elif ranges and state.has_ranges == "yes":
            first, last = ranges.removeprefix("bytes=").split("-")
            content = content[int(first) : int(last) + 1]
            headers["Content_Range"] = f"bytes {first}-{last}/{size}"
            status = 206
        if self.command == "GET":
            state.requests[number] = Request(self.command, self.path, len(content))
        self.reply(status, content, **headers)


@contextmanager
def web_server() -> Iterator[WebServer]:
    state = WebServer()
    with serving(_Handler, state):
        yield state
