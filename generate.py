"""Pictures with a base model and any number of LoRAs: `python generate.py lora=FILE prompt="..."`, `python generate.py --help`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    try:
        from charforgex.cli import run
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed for this Python ({sys.executable}); in this folder, run: pip install .")
    run("generate", root=Path(__file__).resolve().parent)
