"""The manifest as a Parquet table and as WebDataset's tar files says the same."""

import json
import tarfile

import pytest
from PIL import Image

from charforgex.curation import exports
from charforgex.curation.manifest import Manifest, from_folder, open_manifest
from charforgex.errors import DataError


@pytest.fixture
def manifest(tmp_path):
    for number in range(5):
        Image.new("RGB", (20 + number, 16), (number * 40, 10, 200)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"a picture of {number}\nein “Bild” {number}\n", encoding="utf-8")
    Image.new("L", (20, 16), 255).save(tmp_path / "0.mask.png")
    found = from_folder(tmp_path)
    first = found.records[0]
    known = type(first)(**{**vars(first), "facts": {"framing": "full", "box": [0, 0, 20, 16]}})
    return Manifest(tmp_path, (known, *found.records[1:]))


def test_parquet_and_back(manifest, monkeypatch):
    pytest.importorskip("pyarrow", reason="Parquet is an extra: pip install charforgex[parquet]")
    monkeypatch.setattr(exports, "ROWS", 2)  # several batches
    path = manifest.root / "manifest.parquet"
    manifest.write(path)
    read = open_manifest(path)
    assert read.records == manifest.records
    assert read.content_hash() == manifest.content_hash()
    (manifest.root / "1.png").write_bytes(b"other")
    with pytest.raises(DataError, match=r"1\.png \(its content has changed\)"):
        Manifest.read(path)


def test_a_parquet_file_that_is_none(tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet is an extra: pip install charforgex[parquet]")
    path = tmp_path / "manifest.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read"):
        open_manifest(path)


def test_webdataset(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "TAR_PICTURES", 3)
    folder = tmp_path / "tars"
    files = exports.write_webdataset(manifest, folder)
    assert [path.name for path in files] == ["train-000000.tar", "train-000001.tar", "val-000000.tar"]
    before = [path.read_bytes() for path in files]
    assert [path.read_bytes() for path in exports.write_webdataset(manifest, folder)] == before, "the same bytes each time"
    found = {}
    for path in files:
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    for record in manifest.records:
        key = record.sha256[:16]
        assert found.pop(f"{key}.png") == (manifest.root / record.path).read_bytes()
        assert found.pop(f"{key}.txt").decode() == "\n".join(record.captions)
        assert json.loads(found.pop(f"{key}.json"))["facts"] == dict(record.facts)
        if record.mask:
            assert found.pop(f"{key}.mask.png") == (manifest.root / record.mask).read_bytes()
    assert not found


def test_webdatasets_own_reader(manifest, tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="only to read back what is written: pip install webdataset")
    files = exports.write_webdataset(manifest, tmp_path / "tars")
    rows = list(webdataset.WebDataset([str(path) for path in files], shardshuffle=False).decode("pil"))
    assert {row["__key__"] for row in rows} == {record.sha256[:16] for record in manifest.records}
    assert sorted(row["png"].size for row in rows) == [(20 + number, 16) for number in range(5)]
    assert all(row["txt"].startswith("a picture of") for row in rows)
