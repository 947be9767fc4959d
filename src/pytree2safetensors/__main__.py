"""`python -m pytree2safetensors`: the command."""

import sys

from pytree2safetensors._cli.main import main

if __name__ == "__main__":
    sys.exit(main())
