"""Who is it, does it obey, which is better: `python evaluate.py lora=<file or run>`, `python evaluate.py --help`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    try:
        from charforgex.cli import run
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed for this Python ({sys.executable}); in this folder, run: pip install .")
    run("evaluate", root=Path(__file__).resolve().parent)
