"""What was cut is taken as it is only while it is there and is what is wanted."""

from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from charforgex.curation import cutting
from charforgex.curation.ingest import IngestSettings, units
from charforgex.runs import plain, sha256_file


@pytest.fixture
def job(tmp_path):
    """Three pictures, each to be cut to its left half, and one that nobody wants."""
    (tmp_path / "raw").mkdir()
    wanted = {}
    for number in range(4):
        path = tmp_path / f"raw/{number}.png"
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
        if number < 3:
            cuts = [{"framing": "full", "box": [0, 0, 32, 64], "size": [32, 64], "file": f"{number}_full.png"}]
            face = {"box": [4, 4, 28, 28], "score": 1.0, "landmarks": [], "yaw": None, "pitch": None, "roll": None}
            wanted[path.name] = {"sha256": sha256_file(path), "face": face, "subject": None, "cuts": cuts}
    told = IngestSettings()
    return {
        "root": str(tmp_path / "raw"), "cache": str(tmp_path / "cache"), "out": str(tmp_path / "out"), "masks": "face",
        "ingest": plain(asdict(told)), "units": [unit.to_json() for unit in units(tmp_path / "raw", told)], "wanted": wanted,
    }  # fmt: skip


@pytest.fixture
def decoded(monkeypatch):
    """Sizes of what is decoded while the test runs."""
    done, real = [], cutting.decode_picture

    def decode(*args, **more):
        done.append(real(*args, **more))
        return done[-1]

    monkeypatch.setattr(cutting, "decode_picture", decode)
    return done


def by_file(rows):
    return sorted(rows, key=lambda row: row["file"])


def test_cuts_and_masks_are_written_and_remembered(job, tmp_path, decoded):
    rows = by_file(cutting.cut(job))
    assert [row["item"] for row in rows] == ["0.png", "1.png", "2.png"] and len(decoded) == 3, "what nobody wants is not decoded"
    for row in rows:
        source = np.asarray(Image.open(tmp_path / "raw" / row["item"]))
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / row["file"])), source[:, :32])
        assert sha256_file(tmp_path / "out" / row["file"]) == row["sha256"]
        assert sha256_file(tmp_path / "out" / row["mask"]) == row["mask_sha256"]
    assert len(list((tmp_path / "cache/cuts").iterdir())) == 1, "one memo for all"
    assert by_file(cutting.cut(job)) == rows and len(decoded) == 3


@pytest.mark.parametrize("file", ["1_full.png", "1_full.mask.png"])
@pytest.mark.parametrize("gone", [True, False])
def test_what_is_gone_or_was_overwritten_is_cut_again_alone(job, tmp_path, decoded, file, gone):
    rows = by_file(cutting.cut(job))
    if gone:
        (tmp_path / "out" / file).unlink()
    else:
        Image.new("L", (32, 64)).save(tmp_path / "out" / file)
    assert by_file(cutting.cut(job)) == rows and len(decoded) == 4
    assert [sha256_file(tmp_path / "out" / row["file"]) for row in rows] == [row["sha256"] for row in rows]
    assert [sha256_file(tmp_path / "out" / row["mask"]) for row in rows] == [row["mask_sha256"] for row in rows]


def test_other_crops_of_the_same_name_and_back(job, tmp_path, decoded):
    """Runs with other settings into one folder take turns."""
    rows = by_file(cutting.cut(job))
    job["wanted"]["1.png"]["cuts"][0] |= {"box": [32, 0, 64, 64]}
    other = by_file(cutting.cut(job))
    assert [a == b for a, b in zip(rows, other, strict=True)] == [True, False, True] and len(decoded) == 4
    job["wanted"]["1.png"]["cuts"][0] |= {"box": [0, 0, 32, 64]}
    assert by_file(cutting.cut(job)) == rows
    assert sha256_file(tmp_path / "out/1_full.png") == rows[1]["sha256"]


def test_a_picture_less_is_no_work(job, decoded):
    rows = by_file(cutting.cut(job))
    del job["wanted"]["0.png"]
    assert by_file(cutting.cut(job)) == rows[1:] and len(decoded) == 3


def test_what_changed_since_it_was_measured_is_told_and_the_rest_is_cut(job, tmp_path):
    (tmp_path / "raw/0.png").unlink()
    (tmp_path / "raw/1.png").write_bytes((tmp_path / "raw/2.png").read_bytes())
    job["wanted"]["5.png"] = job["wanted"]["2.png"]
    found = {row["item"]: row.get("error") for row in cutting.cut(job)}
    assert found["2.png"] is None
    assert "has changed in the meantime" in found["1.png"] and "not there any more" in found["5.png"]
    assert found["0.png"]
