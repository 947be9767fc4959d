"""Stores on this machine, for tests: servers of their protocols, from PyPI and npm."""

import asyncio
import logging
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fsspec
import pytest

# Of the account that every Azurite has.
_AZURE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


def needed(module: str) -> Any:
    """A module that `tox -e remote` installs."""
    return pytest.importorskip(module, reason="tox -e remote installs it")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def options_of(scheme: str, **options: Any) -> Iterator[None]:
    """Give options to the file systems of a scheme, for one test only."""
    kind = fsspec.get_filesystem_class(scheme)
    kind.clear_instance_cache()
    try:
        with patch.dict(fsspec.config.conf, {scheme: options}):
            yield
    finally:
        kind.clear_instance_cache()


@contextmanager
def google(folder: Path) -> Iterator[str]:
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # which would ask Google
    needed("gcsfs")
    emulator = needed("gcp_storage_emulator.server")
    logging.getLogger("gcp_storage_emulator").setLevel(logging.ERROR)
    port = free_port()
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    try:
        with options_of("gs", endpoint_url=f"http://127.0.0.1:{port}", token="anon"):
            yield "gs://bucket/folder"
    finally:
        server.stop()


@contextmanager
def azure(folder: Path) -> Iterator[str]:
    needed("adlfs")
    azurite = shutil.which("azurite-blob")
    if azurite is None:
        pytest.skip("npm install azurite has its server")
    port = free_port()
    account = f"http://127.0.0.1:{port}/devstoreaccount1"
    connection = (
        f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={_AZURE_KEY};"
        f"BlobEndpoint={account};"
    )
    command = [azurite, "--blobPort", str(port), "--location", str(folder), "--silent"]
    with subprocess.Popen([*command, "--skipApiVersionCheck"]) as process:
        try:
            service = needed("azure.storage.blob").BlobServiceClient
            with service.from_connection_string(connection) as client:
                client.create_container("bucket")
            with options_of("abfs", connection_string=connection):
                yield "abfs://bucket/folder"
        finally:
            process.kill()


@contextmanager
def sftp(folder: Path) -> Iterator[str]:
    needed("paramiko")
    ssh = needed("asyncssh")

    class Server(ssh.SSHServer):  # type: ignore[misc,name-defined] # a module that may be missing
        def password_auth_supported(self) -> bool:
            return True

        def validate_password(self, user: str, password: str) -> bool:
            return password == "secret"

    async def listen() -> Any:
        key = ssh.generate_private_key("ssh-ed25519")
        options = {"server_host_keys": [key], "server_factory": Server, "sftp_factory": True}
        return await ssh.listen("127.0.0.1", 0, **options)

    async def stop() -> None:
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    def call(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = call(listen())
    for name in "tmp", "folder":
        (folder / name).mkdir()
    try:
        with options_of("sftp", temppath=str(folder / "tmp")):
            yield f"sftp://user:secret@127.0.0.1:{server.get_port()}{folder}/folder"
    finally:
        call(stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def ftp(folder: Path) -> Iterator[str]:
    logging.getLogger("pyftpdlib").setLevel(logging.ERROR)
    authorizer = needed("pyftpdlib.authorizers").DummyAuthorizer()
    authorizer.add_user("user", "secret", str(folder), perm="elradfmwMT")
    kind = needed("pyftpdlib.handlers").FTPHandler
    handler = type("Handler", (kind,), {"authorizer": authorizer})
    server = needed("pyftpdlib.servers").FTPServer(("127.0.0.1", 0), handler)
    run = {"target": server.serve_forever, "kwargs": {"timeout": 0.1, "handle_exit": False}}
    thread = threading.Thread(**run, daemon=True)
    thread.start()
    for name in "tmp", "folder":  # the first for what is not committed
        (folder / name).mkdir()
    try:
        with options_of("ftp"):
            yield f"ftp://user:secret@127.0.0.1:{server.address[1]}/folder"
    finally:
        server.close_all()
        thread.join()


STORES: dict[str, Callable[[Path], AbstractContextManager[str]]] = {
    "gs": google,
    "abfs": azure,
    "sftp": sftp,
    "ftp": ftp,
}
