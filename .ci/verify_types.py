"""Check with pyright that the types of the public interface are complete.

`pytree2safetensors.orbax` is left out: Orbax has no types, and its classes are the bases there.
"""

import json
import subprocess
import sys

COMMAND = ["-m", "pyright", "--pythonpath", sys.executable, "--ignoreexternal", "--outputjson"]


def main() -> None:
    """Print what is incomplete, and exit with 1 if there is anything."""
    command = [sys.executable, *COMMAND, "--verifytypes", "pytree2safetensors"]
    said = subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout
    report = json.loads(said)["typeCompleteness"]
    symbols = [symbol for symbol in report["symbols"] if symbol["isExported"]]
    assert any(symbol["name"] == "pytree2safetensors.save_pytree" for symbol in symbols), report
    wrong = [
        symbol
        for symbol in symbols
        if not (symbol["isTypeKnown"] or symbol["name"].startswith("pytree2safetensors.orbax."))
    ]
    for symbol in wrong:
        print(symbol["name"], *(found["message"] for found in symbol["diagnostics"]), sep="\n    ")
    print(f"{len(symbols)} public symbols, {len(wrong)} without a complete type")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
