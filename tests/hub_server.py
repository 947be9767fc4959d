"""A server on this machine with the part of the Hugging Face Hub that huggingface_hub's file system uses."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loopback import QuietHandler, serving

REPOSITORY = "someone/model"
_API = f"/api/models/{REPOSITORY}"


class HubServer:
    """One model repository.

    Attributes:
        files: The contents, by path in the repository.
        requests: What was asked, in order.
        commits: Whether the server accepts commits.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.commits = True
        self.url = ""


class _Handler(QuietHandler):
    state: HubServer

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.state.requests.append(f"GET {path}")
        if path in {_API, f"{_API}/revision/main"}:
            self.answer({"id": REPOSITORY, "sha": "0" * 40, "siblings": []})
        elif path.startswith(f"{_API}/tree/main"):
            folder = path.removeprefix(f"{_API}/tree/main").strip("/")
            self.answer(self.tree(folder)) if self.tree(folder) else self.missing()
        elif path.startswith(f"/{REPOSITORY}/resolve/main/"):
            self.file(path.removeprefix(f"/{REPOSITORY}/resolve/main/"))
        else:
            self.missing()

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.state.requests.append(f"POST {path}")
        if path == f"{_API}/preupload/main":
            files = [file["path"] for file in json.loads(body)["files"]]
            self.answer(
                {
                    "files": [
                        {"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files
                    ]
                }
            )
        elif path == f"{_API}/commit/main" and self.state.commits:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.state.files[line["value"]["path"]] = content
                elif line["key"] == "deletedFile":
                    del self.state.files[line["value"]["path"]]
            url = f"{self.state.url}/{REPOSITORY}/commit/{'1' * 40}"
            self.answer({"commitUrl": url, "commitOid": "1" * 40, "success": True})
        elif path == f"{_API}/paths-info/main":
            wanted = json.loads(body)["paths"]
            self.answer([entry for entry in self.tree("") if entry["path"] in wanted])
        else:
            self.missing()

    def tree(self, folder: str) -> list[dict[str, Any]]:
        found = []
        for path, content in self.state.files.items():
            if path.rpartition("/")[0] == folder or not folder:
                oid = hashlib.sha1(content).hexdigest()
                found.append({"type": "file", "oid": oid, "size": len(content), "path": path})
        return found

    def file(self, path: str) -> None:
        content = self.state.files.get(path)
        if content is None:
            self.missing()
            return
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        self.answer(content[int(first) : int(last) + 1], status=206)

    def answer(self, content: Any, status: int = 200) -> None:
        self.reply(status, content if isinstance(content, bytes) else json.dumps(content).encode())

    def missing(self) -> None:
        self.reply(404, X_Error_Code="EntryNotFound")


@contextmanager
def hub_server() -> Iterator[HubServer]:
    state = HubServer()
    with serving(_Handler, state):
        yield state
