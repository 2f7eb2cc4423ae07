"""From a folder of pictures of a character to a LoRA: `python train.py`, `python train.py --help`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    try:
        from charforgex.cli import run
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed for this Python ({sys.executable}); in this folder, run: pip install .")
    run("train", root=Path(__file__).resolve().parent)
