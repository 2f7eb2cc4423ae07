"""From a mess of pictures, archives and videos to a dataset: `python curate.py data.root=pictures`, `python curate.py --help`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    try:
        from charforgex.cli import run
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed for this Python ({sys.executable}); in this folder, run: pip install .")
    run("curate", root=Path(__file__).resolve().parent)
