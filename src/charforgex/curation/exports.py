"""A manifest in other clothes: a Parquet table for millions of pictures, and the tar files that WebDataset streams."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charforgex.errors import ConfigError, DataError
from charforgex.runs import replace_atomic

if TYPE_CHECKING:
    from charforgex.curation.manifest import Manifest

ROWS = 10_000  # of a Parquet file written, and read, at a time
TAR_PICTURES = 1000  # of a tar file: some hundred MB, as WebDataset advises
NESTED = ("captions", "facts")  # columns that hold JSON, so that every reader has the same types


def need_pyarrow() -> Any:
    """pyarrow. Raises ConfigError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ConfigError('A .parquet manifest needs pyarrow: pip install "charforgex[parquet]".') from error
    return pyarrow


def write_parquet(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One row a record, in their order; `captions` and `facts` as JSON texts."""
    pa = need_pyarrow()
    types = dict.fromkeys(("path", "sha256", "captions", "split", "mask", "mask_sha256", "facts"), pa.string())
    schema = pa.schema(types | dict.fromkeys(("version", "width", "height"), pa.int32()))
    with replace_atomic(path) as temporary, pa.parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
        rows = iter(rows)
        while some := list(islice(rows, ROWS)):
            plain = [{**row, **{name: json.dumps(row[name], ensure_ascii=False) for name in NESTED}} for row in some]
            writer.write_table(pa.Table.from_pylist(plain, schema=schema))


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows as `write_parquet` got them. Raises DataError."""
    pa = need_pyarrow()
    try:
        with pa.parquet.ParquetFile(path) as file:
            for some in file.iter_batches(ROWS):
                for row in some.to_pylist():
                    yield {**row, **{name: json.loads(row[name]) for name in NESTED if name in row}}
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        raise DataError(f"The manifest {path} cannot be read: {error}.") from error


def write_webdataset(manifest: Manifest, folder: Path) -> list[Path]:
    """`<split>-000000.tar`, ...: for each picture <key>.png, .txt, .json and .mask.png, where the key is the start of its SHA-256.

    The same manifest gives the same bytes. Returns the files, which replace those that were there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for split in sorted({record.split for record in manifest.records}):
        records = sorted(manifest.of(split), key=lambda record: record.sha256)
        for number in range(0, len(records), TAR_PICTURES):
            path = folder / f"{split}-{number // TAR_PICTURES:06d}.tar"
            with replace_atomic(path) as temporary, tarfile.open(temporary, "w") as tar:
                for record in records[number : number + TAR_PICTURES]:
                    key = record.sha256[:16]
                    _add(tar, f"{key}{Path(record.path).suffix.lower()}", manifest.file(record.path).read_bytes())
                    _add(tar, f"{key}.txt", "\n".join(record.captions).encode())
                    about = {"path": record.path, "sha256": record.sha256, "width": record.width, "height": record.height}
                    _add(tar, f"{key}.json", json.dumps(about | {"facts": dict(record.facts)}, sort_keys=True).encode())
                    if record.mask:
                        _add(tar, f"{key}.mask.png", manifest.file(record.mask).read_bytes())
            written.append(path)
    for path in folder.glob("*.tar"):
        if path not in written:
            path.unlink()
    return written


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))
