"""A web server on this machine that serves ranges, counts what it is asked, and can misbehave."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


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
        has_etags: Whether files have entity tags.
        key: What the header X-Key has to be, if anything.
        before: Called with the number of each request, before it is answered; may change files, or
            raise a ConnectionError to drop the connection.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.delay = 0.0
        self.has_ranges = "yes"
        self.has_etags = True
        self.key = ""
        self.before: Callable[[int], None] = lambda number: None
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.url = ""

    @property
    def sent(self) -> int:
        return sum(request.sent for request in self.requests)


def etag_of(content: bytes) -> str:
    return f'"{hash(content) & 0xFFFFFFFF:x}-{len(content)}"'


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: WebServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_content=False)

    def do_GET(self) -> None:
        self.answer(with_content=True)

    def answer(self, *, with_content: bool) -> None:
        state = self.state
        with state.lock:
            number = len(state.requests)
            state.requests.append(Request(self.command, self.path, 0))
            state.at_once += 1
            state.most_at_once = max(state.most_at_once, state.at_once)
        try:
            time.sleep(state.delay)
            state.before(number)
            self.respond(number, with_content)
        except ConnectionError:
            self.close_connection = True
            self.connection.close()
        finally:
            with state.lock:
                state.at_once -= 1

    def respond(self, number: int, with_content: bool) -> None:
        state = self.state
        content = state.files.get(self.path.partition("?")[0])
        if content is None or state.key not in {"", self.headers.get("X-Key")}:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        etag, wanted = etag_of(content), self.headers.get("If-Match")
        if wanted is not None and wanted != etag:
            self.send_response(412)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size, ranges = len(content), self.headers.get("Range")
        status = 200
        if ranges and state.has_ranges == "yes":
            first, last = ranges.removeprefix("bytes=").split("-")
            content = content[int(first) : int(last) + 1]
            status = 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        if state.has_etags:
            self.send_header("ETag", etag)
        self.send_header("Accept-Ranges", "none" if state.has_ranges == "no" else "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_content:
            state.requests[number] = Request(self.command, self.path, len(content))
            self.wfile.write(content)


@contextmanager
def web_server() -> Iterator[WebServer]:
    state = WebServer()
    handler = type("Handler", (_Handler,), {"state": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield state
        server.shutdown()
        thread.join()
