"""Several LoRAs of any format to one: `python merge.py lora=[a.safetensors,b.safetensors]`, `python merge.py --help`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    try:
        from charforgex.cli import run
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed for this Python ({sys.executable}); in this folder, run: pip install .")
    run("merge", root=Path(__file__).resolve().parent)
