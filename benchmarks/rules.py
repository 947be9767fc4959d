"""What rules cost: a PyTorch checkpoint of 1 GB in bfloat16 into JAX trees, by rules and by hand.

Each measurement is a process of its own, which reads the file from the page cache. By hand means
what guides for such models do: `safetensors.flax.load_file`, then transpose, reshape and stack.

    python benchmarks/rules.py [--small]
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.flax
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rst import plain, table

from pytree2safetensors import Rule, explain, load_into_pytree, save_pytree
from pytree2safetensors._leaves.routes import routes_of
from pytree2safetensors._tree.rule_index import RuleIndex

OUTPUT = Path(__file__).parent.parent / "docs" / "benchmarks" / "rules.rst"
ROUNDS = 5

FULL = {"E": 2048, "H": 16, "K": 16, "D": 128, "F": 5632, "L": 8, "V": 32000}
SMALL = {"E": 256, "H": 4, "K": 4, "D": 64, "F": 704, "L": 4, "V": 2000}
LLAMA_3_8B = {"E": 4096, "H": 32, "K": 8, "D": 128, "F": 14336, "L": 32, "V": 128256}


class Model:
    """A Llama by its sizes."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes

    def shapes(self) -> dict[str, tuple[int, ...]]:
        E, H, K, D, F, L, V = self.sizes.values()  # noqa: N806 - as papers write them
        shapes = {"model.embed_tokens": (V, E), "model.norm": (E,), "lm_head": (V, E)}
        for l in range(L):
            layer = f"model.layers.{l}."
            shapes |= {
                f"{layer}self_attn.{p}_proj": (n * D, E)
                for p, n in zip("qkv", (H, K, K), strict=True)
            }
            shapes |= {f"{layer}self_attn.o_proj": (E, H * D)}
            shapes |= {f"{layer}mlp.{m}_proj": (F, E) for m in ("gate", "up")}
            shapes |= {f"{layer}mlp.down_proj": (E, F)}
            shapes |= {f"{layer}{n}_layernorm": (E,) for n in ("input", "post_attention")}
        return {f"{name}.weight": shape for name, shape in shapes.items()}

    def file(self) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        return {
            name: rng.integers(0, 1 << 15, shape, np.uint16).view(ml_dtypes.bfloat16)
            for name, shape in self.shapes().items()
        }

    def save_empty(self, path: Path) -> None:
        """Save a file whose data takes no room on the disk: all of it is a hole."""
        header, end = {}, 0
        for name, shape in self.shapes().items():
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)

    def rules(self, scanned: bool) -> list[Rule]:
        layer, l = ("layers", "l ") if scanned else ("layers.{l}", "")
        block = "model.layers.{l}."
        return [
            Rule("model.embed_tokens.weight", "embed"),
            Rule(block + "self_attn.{p:q,k,v}_proj.weight", layer + ".{p}", f"(h d) e -> {l}e h d"),
            Rule(block + "self_attn.o_proj.weight", layer + ".o", f"e (h d) -> {l}h d e"),
            Rule(block + "mlp.{m:gate,up,down}_proj.weight", layer + ".{m}", f"o i -> {l}i o"),
            Rule(block + "{n:input,post_attention}_layernorm.weight", layer + ".{n}", f"e -> {l}e"),
            Rule("model.norm.weight", "norm"),
            Rule("lm_head.weight", "head", "v e -> e v"),
        ]

    def template(self, scanned: bool, sharded: bool) -> Any:
        E, H, K, D, F, L, V = self.sizes.values()  # noqa: N806 - as papers write them
        mesh = Mesh(np.array(jax.devices()), ("x",))

        def leaf(*shape: int) -> Any:
            axes = [
                "x" if a == len(shape) - 1 and shape[a] % 8 == 0 else None
                for a in range(len(shape))
            ]
            sharding = NamedSharding(mesh, PartitionSpec(*axes)) if sharded else None
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

        lead = (L,) if scanned else ()
        shapes = {"q": (E, H, D), "k": (E, K, D), "v": (E, K, D), "o": (H, D, E)}
        shapes |= {"gate": (E, F), "up": (E, F)}
        shapes |= {"down": (F, E), "input": (E,), "post_attention": (E,)}
        layers = [
            {n: leaf(*lead, *s) for n, s in shapes.items()} for _ in range(1 if scanned else L)
        ]
        tree = {"embed": leaf(V, E), "norm": leaf(E), "head": leaf(E, V)}
        return tree | {"layers": layers[0] if scanned else layers}

    def by_hand(self, path: Path, scanned: bool, sharded: bool) -> Any:
        E, H, _, D, _, L, _ = self.sizes.values()  # noqa: N806 - as papers write them
        file = safetensors.flax.load_file(path)

        def layer(l: int) -> dict[str, Any]:
            def get(name: str) -> Any:
                return file[f"model.layers.{l}.{name}.weight"]

            found = {
                p: get(f"self_attn.{p}_proj").reshape(-1, D, E).transpose(2, 0, 1) for p in "qkv"
            }
            found["o"] = get("self_attn.o_proj").reshape(E, H, D).transpose(1, 2, 0)
            found |= {m: get(f"mlp.{m}_proj").T for m in ("gate", "up", "down")}
            return found | {n: get(f"{n}_layernorm") for n in ("input", "post_attention")}

        layers: Any = [layer(l) for l in range(L)]
        if scanned:
            layers = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
        tree = {"embed": file["model.embed_tokens.weight"], "norm": file["model.norm.weight"]}
        tree |= {"head": file["lm_head.weight"].T, "layers": layers}
        if not sharded:
            return tree
        return jax.device_put(
            tree, jax.tree.map(lambda s: s.sharding, self.template(scanned, True))
        )


def measured(work: Callable[[], Any]) -> tuple[float, float, float]:
    """Return seconds, those of processors, and the peak memory in GB beyond what was there before."""

    def status(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1e6

    jax.block_until_ready(jnp.ones((2, 2)).T)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before, start, used = status("VmRSS"), time.perf_counter(), time.process_time()
    jax.block_until_ready(work())
    seconds = time.perf_counter() - start, time.process_time() - used
    return *seconds, status("VmHWM") - before


def run(kind: str, how: str, path: Path, model: Model) -> None:
    scanned, sharded = kind != "list", kind == "sharded"
    if how == "by hand":
        found = measured(lambda: model.by_hand(path, scanned, sharded))
    else:
        template = model.template(scanned, sharded)
        found = measured(lambda: load_into_pytree(template, path, rename=model.rules(scanned)))
    print(*found)


def matching(model: Model) -> float:
    """Return the microseconds of a processor that a leaf costs to match, among 40 rules."""
    rules = [Rule(f"x{n}.{{*}}.w", f"y{n}.{{*}}.k", "o i -> i o") for n in range(33)]
    rules += model.rules(False)
    paths = [f"@layers#{l}@{p}" for l in range(1000) for p in "qkv"]
    times = []
    for _ in range(5):
        start = time.process_time()
        routes_of(RuleIndex(rules), paths, [(64, 8, 8)] * len(paths), complete=False)
        times.append(time.process_time() - start)
    return min(times) / len(paths) * 1e6


def explaining(scanned: bool, folder: Path) -> float:
    """Return the milliseconds of a processor that explaining a load of Llama 3 8B costs."""
    model = Model(LLAMA_3_8B)
    template, rules = model.template(scanned, False), model.rules(scanned)
    model.save_empty(folder / "empty.safetensors")
    times = []
    for _ in range(5):
        start = time.process_time()
        explain(template, folder / "empty.safetensors", rename=rules)
        times.append(time.process_time() - start)
    return min(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a file of some megabytes")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = Model(SMALL if options.small else FULL)
    if options.run:
        run(options.run[0], options.run[1], Path(options.run[2]), model)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        file = model.file()
        size = sum(values.nbytes for values in file.values()) / 1e9
        safetensors.numpy.save_file(file, path)
        del file
        rows = []
        for kind in ("list", "scanned", "sharded"):
            for how in ("rules", "by hand"):
                small = ["--small"] if options.small else []
                command = [sys.executable, __file__, *small, "--run", kind, how, str(path)]
                runs = [
                    tuple(map(float, subprocess.check_output(command, text=True).split()))
                    for _ in range(ROUNDS)
                ]
                seconds, used, peaks = zip(*runs, strict=True)
                spread = (
                    f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
                )
                rows.append(
                    [
                        kind,
                        how,
                        spread,
                        f"{min(used):.2f}",
                        f"{statistics.median(peaks) / size:.2f}",
                    ]
                )
        head = ["tree", "way", "seconds", "processor, seconds", "peak memory / model"]
        versions = f"JAX {jax.__version__}, {os.cpu_count()} cores, median of {ROUNDS} (range)"
        title = f"A PyTorch checkpoint of {size:.2f} GB in bfloat16; {versions}"
        print(title, plain(head, rows), sep="\n\n")
        if not options.small:
            OUTPUT.write_text(table(title, head, rows))
        template, rules = model.template(True, False), model.rules(True)
        tree = load_into_pytree(template, path, rename=rules)
        start = time.perf_counter()
        save_pytree(tree, path, rename=rules, durable=False)
        print(f"\nSaving the scanned tree: {time.perf_counter() - start:.2f} s")
        listed, stacked = (explaining(scanned, Path(folder)) for scanned in (False, True))
        print(f"Explaining Llama 3 8B: {listed:.1f} ms as a list, {stacked:.1f} ms stacked")
    print(f"Matching: {matching(model):.1f} us a leaf")


if __name__ == "__main__":
    main()
