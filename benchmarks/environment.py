"""The environment of the original, and the words about the machine that every result carries."""

import datetime as dt
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE / ".cache"
ORIGINAL = "pytree2safetensors==0.1.4"
SHARED = ("jax", "jaxlib", "numpy", "ml_dtypes", "safetensors", "jaxtyping", "flax")
PEERS = (
    "equinox",
    "flax",
    "h5py",
    "jax",
    "jaxlib",
    "jaxon",
    "msgpack",
    "numpy",
    "orbax-checkpoint",
    "safetensors",
)


def original_python() -> str:
    """Make, once, an environment with the original and what it needs in the versions used here; return its Python.

    flax is there because safetensors looks for it at each tensor, and is slower where it finds none.
    """
    pins = [ORIGINAL, *(f"{name}=={importlib.metadata.version(name)}" for name in SHARED)]
    digest = hashlib.sha256(" ".join([sys.version, *pins]).encode()).hexdigest()[:12]
    folder = CACHE / f"original-{digest}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        print(f"making an environment for {ORIGINAL}", flush=True)
        if shutil.which("uv"):
            subprocess.run(
                ["uv", "venv", "--quiet", "--python", sys.executable, str(folder)], check=True
            )
            subprocess.run(
                ["uv", "pip", "install", "--quiet", "--python", str(python), *pins], check=True
            )
        else:
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *pins], check=True)
        (folder / "complete").touch()
    return str(python)


def versions() -> dict[str, str]:
    """Return the versions of what was measured, where it is installed."""
    found = {"python": platform.python_version()}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def this_version() -> str:
    """Describe the checkout: its last commit, and whether something has changed since."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"


def machine(folder: Path) -> dict[str, str]:
    """Describe the machine and the file system under `folder`."""
    cpu = _line("/proc/cpuinfo", "model name").partition(":")[2].strip()
    memory = int(_line("/proc/meminfo", "MemTotal").split()[1]) / 2**20
    return {
        "cpu": f"{os.cpu_count()} x {cpu or platform.machine()}",
        "memory": f"{memory:.0f} GiB",
        "kernel": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "file system": _file_system(folder),
        "date": dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d"),
    }


def _line(name: str, start: str) -> str:
    lines = Path(name).read_text().splitlines()
    return next((line for line in lines if line.startswith(start)), "")


def _file_system(folder: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(len(where), kind) for where, kind in mounts if folder.resolve().is_relative_to(where)]
    return max(above)[1]
