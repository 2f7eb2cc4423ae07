"""What a run leaves on disk: atomic writes, the run's folder, result.json, config.yaml, provenance.json, hashes.

Every write that matters goes through `write_atomic` or `replace_atomic`: a reader sees the old file or the new one, never half of one,
whenever the process or the machine dies. Nothing here imports torch; versions come from the installed packages' metadata.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from charforgex.errors import ConfigError

TEMPORARY = ".tmp-"  # what the names of unfinished files begin with; such a file is never read
PACKAGES = ["charforgex", "torch", "numpy", "pillow", "lightning", "diffusers", "transformers", "peft", "accelerate", "safetensors"]
PACKAGES += ["hydra-core", "omegaconf"]
EXIT_OK, EXIT_ERROR = 0, 2  # 2: something the user can mend, said in one line
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143  # Ctrl-C and SIGTERM, after what was done is saved: the same command goes on from there
LOCATIONS = ("run_dir", "runs_dir", "cache_dir", "resume", "fresh", "trial", "hydra")  # keys that say where and for whom, not what
PLACES = {"trainer": ("devices", "nodes", "strategy")}  # such keys of groups


# ---- atomic writes ----


@contextlib.contextmanager
def replace_atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`; when the block ends well, the file written there becomes `path`, on disk for good.

    The temporary name keeps the suffix, for writers that choose the format by it. When the block raises, the temporary file is removed and
    `path` is as it was. The folder is made if it is missing. For single files, not for folders.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(6)}-{path.name}")
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_atomic(path: str | os.PathLike, data: bytes | str) -> Path:
    """Writes `data` (a string as UTF-8) so that `path` holds all of it or is as it was before. Returns the path."""
    path = Path(path)
    with replace_atomic(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def remove_unfinished(folder: str | os.PathLike) -> list[Path]:
    """Deletes what killed processes left unfinished under `folder`, and says what. Only for a folder that nobody else is writing to."""
    leftovers = sorted(Path(folder).rglob(f"{TEMPORARY}*"))
    for path in leftovers:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return leftovers


def fsync_folder(folder: Path) -> None:
    """The new name itself must reach the disk. Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- the run folder ----


def create_run_dir(root: str | os.PathLike, name: str) -> Path:
    """Makes and returns `<root>/<date>_<time>_<name>`; a number is added when a run of the same second has it already."""
    started = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    base = f"{started}_{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-') or 'run'}"
    for count in range(1, 1000):
        path = Path(root) / (base if count == 1 else f"{base}-{count}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"cannot make the run folder {path}: {error.strerror}; choose another with run_dir=<folder>") from error
    raise ConfigError(f"{root} holds 999 runs named {base} already; choose another folder with run_dir=<folder>")


def write_json(path: str | os.PathLike, values: Any) -> Path:
    """Atomic, readable JSON that every parser accepts: numbers that are not finite become null, paths become strings."""
    return write_atomic(path, json.dumps(plain(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_result(run_dir: str | os.PathLike, values: Mapping[str, Any]) -> Path:
    """result.json of a run. Raises TypeError for a value that JSON has no word for."""
    return write_json(Path(run_dir) / "result.json", values)


def save_config(run_dir: str | os.PathLike, cfg: Any) -> Path:
    """config.yaml: the resolved config, which with the provenance suffices to repeat the run."""
    from omegaconf import OmegaConf

    return write_atomic(Path(run_dir) / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(cfg), resolve=True))


def write_provenance(run_dir: str | os.PathLike, *, seed: int, inputs: Mapping[str, str | os.PathLike] | None = None, **more: Any) -> Path:
    """provenance.json: what ran, on what, from what. `inputs` maps names to files or folders, to be hashed; `more` is added as it is."""
    return write_json(Path(run_dir) / "provenance.json", provenance(seed=seed, inputs=inputs) | more)


def provenance(*, seed: int, inputs: Mapping[str, str | os.PathLike] | None = None) -> dict[str, Any]:
    import platform

    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "folder": os.getcwd(),
        "seed": seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": versions(),
        "git": git_state(),
        "inputs": {name: {"path": str(path), "sha256": sha256_path(path)} for name, path in (inputs or {}).items()},
    }


def versions() -> dict[str, str | None]:
    """Installed versions of what decides a run's numbers, None for a package that is not there. Imports none of them."""
    from importlib import metadata  # here and below: what --help can do without

    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_state() -> dict[str, Any] | None:
    """Commit, and whether tracked files differ from it, of the checkout that this package is run from; None when it is installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or not (root / "src" / "charforgex").is_dir():
        return None
    import subprocess

    try:
        commit = _git(root, "rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git(root, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None  # no git program, or a checkout that is not ours to read: a run must not fail for that


def _git(root: Path, *arguments: str) -> str:
    import subprocess

    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


# ---- hashes ----


def sha256_file(path: str | os.PathLike) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_path(path: str | os.PathLike) -> str:
    """sha256 of a file, or of a folder's relative names and contents."""
    path = Path(path)
    if not path.is_dir():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith(TEMPORARY)):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def config_hash(cfg: Any) -> str:
    """sha256 of what a config asks for, wherever it lies: without `LOCATIONS` and `PLACES`, and of absolute paths only the last part.

    The order of keys does not count, nor whether a whole number is written 1 or 1.0.
    """
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
    values = {key: value for key, value in values.items() if key not in LOCATIONS}
    for group, names in PLACES.items():
        if isinstance(values.get(group), dict):
            values[group] = {key: value for key, value in values[group].items() if key not in names}
    text = json.dumps(_placeless(plain(values)), sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _placeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _placeless(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_placeless(item) for item in value]
    if isinstance(value, str) and PurePath(value).is_absolute():
        return PurePath(value).name
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def plain(value: Any) -> Any:
    """Only what JSON and YAML know. Scalars of numpy and torch are asked for their Python value."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "item"):
        return plain(value.item())
    raise TypeError(f"{value!r} ({type(value).__name__}) has no place in a JSON file")
