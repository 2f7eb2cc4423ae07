"""Shards keep their content when files come and go; what they found is read piece by piece."""

import json
import os
import time
import tracemalloc
from dataclasses import asdict

import numpy as np
import pytest

from charforgex.curation import shards
from charforgex.curation.executors import Local
from charforgex.curation.ingest import IngestSettings, Unit, units
from charforgex.curation.items import Finding
from charforgex.curation.settings import CurationSettings
from charforgex.data.mess import write_archive, write_mess
from charforgex.runs import plain


def named(names):
    return [Unit(name, "picture") for name in sorted(names)]


def contents(planned):
    return {tuple(unit.path for unit in shard) for shard in planned}


NAMES = [f"photos/{number:05d}.jpg" for number in range(2000)]


def test_a_file_more_leaves_the_other_shards_as_they_are():
    """At the front, at the end, and anywhere."""
    before = contents(shards.plan(named(NAMES), 64))
    for name in ["a.jpg", "zebra.jpg", *(f"photos/{number:05d}+.jpg" for number in range(0, 2000, 40))]:
        after = contents(shards.plan(named([*NAMES, name]), 64))
        assert 1 <= len(after - before) <= 2 and 1 <= len(before - after) <= 2, name


def test_so_does_a_folder_more():
    before = contents(shards.plan(named(NAMES), 64))
    assert len(before - contents(shards.plan(named([*NAMES, *(f"a/{number}.jpg" for number in range(500))]), 64))) <= 2


@pytest.mark.parametrize("pictures", [1, 2, 3, 5, 64, 256, 5000])
def test_shards_are_neither_too_large_nor_too_small_and_in_order(pictures):
    planned = shards.plan(named(NAMES), pictures)
    sizes = [len(shard) for shard in planned]
    assert max(sizes) <= pictures and np.mean(sizes) >= min(pictures, 2000) / 2
    assert [unit.path for shard in planned for unit in shard] == NAMES


def test_archives_and_videos_are_shards_of_their_own_after_the_others():
    mixed = [Unit("a.zip", "archive"), Unit("b.jpg", "picture"), Unit("c.mp4", "video"), Unit("d.txt", "sidecar"), Unit("e", "other")]
    assert [[unit.path for unit in shard] for shard in shards.plan(mixed, 10)] == [["b.jpg", "d.txt", "e"], ["a.zip"], ["c.mp4"]]
    assert shards.plan([], 10) == []


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    """(root, cache folder, names of the shards) of nine pictures that are good or not."""
    root = tmp_path_factory.mktemp("scanned")
    write_mess(root / "raw", 0, {"kept": 4, "empty": 1, "stranger": 1}, 96)
    write_archive(root / "raw/pack.zip", 0, 2, 96)
    settings = plain(asdict(CurationSettings().scan()))
    done = shards.scan_all(root / "raw", root / "cache", units(root / "raw", IngestSettings()), settings, 4, Local(1))
    return root, [name for _, name, _ in sorted(done)]


def test_findings_are_read_one_by_one(scanned):
    """By where they begin, in any order, as in the file, whichever shard they are in."""
    root, names = scanned
    assert len(names) >= 3
    findings = shards.Findings(root / "cache", names)
    lines = [line for name in names for line in (root / f"cache/shards/{name}/findings.jsonl").read_text("utf-8").splitlines()]
    assert len(findings) == len(lines)
    heads = 0
    for index in reversed(range(len(findings))):
        found = findings[index]
        assert json.loads(lines[index]) == plain(found.to_json())
        assert len(findings.face_vectors(index)) == len(found.faces)
        heads += len(found.faces)
        looked_at = found.row is not None
        assert looked_at == (found.verdict is None) == (findings.thumbnail(index) is not None) == (findings.vector(index) is not None)
        assert (findings.preview(index) or b"")[:3] == (b"\xff\xd8\xff" if looked_at else b"")
    assert heads >= 6
    with pytest.raises(IndexError):
        findings[len(findings)]


def test_what_belongs_to_a_finding_is_its_own(scanned):
    """The same picture scanned alone has the same thumbnail, face and preview."""
    root, names = scanned
    findings = shards.Findings(root / "cache", names)
    index = next(i for i in reversed(range(len(findings))) if findings[i].faces and "!" not in findings[i].name)
    (root / "alone").mkdir()
    (root / "alone/x.jpg").write_bytes((root / "raw" / findings[index].name).read_bytes())
    settings = plain(asdict(CurationSettings().scan()))
    done = shards.scan_all(root / "alone", root / "cache", units(root / "alone", IngestSettings()), settings, 4, Local(1))
    alone = shards.Findings(root / "cache", [name for _, name, _ in done])
    assert alone[0].sha256 == findings[index].sha256 and alone[0].faces == findings[index].faces
    np.testing.assert_array_equal(alone.thumbnail(0), findings.thumbnail(index))
    np.testing.assert_allclose(alone.face_vectors(0), findings.face_vectors(index), atol=1e-5)
    assert alone.preview(0) == findings.preview(index)


def held(folder, count):
    """Bytes that reading all of one shard of `count` findings leaves in memory."""
    (folder / "shards/x").mkdir(parents=True)
    columns = {name: shards.Column(folder / "shards/x", name, kind) for name, kind in shards.COLUMNS.items()}
    with open(folder / "shards/x/findings.jsonl", "wb") as file:
        for number in range(count):
            file.write(json.dumps(Finding(f"pack.zip!/{number}.jpg", scores={"sharpness": number}, row=number).to_json()).encode())
            for name, value in (("findings", file.tell()), ("heads", 0), ("thumbnails", np.zeros((8, 8, 3)))):
                columns[name].add(np.array(value))
    for column in columns.values():
        column.close()
    (folder / "shards/x/shapes.json").write_text(json.dumps({name: column.shape for name, column in columns.items()}))
    tracemalloc.start()
    findings = shards.Findings(folder, ["x"])
    assert [finding.scores["sharpness"] for finding in findings] == list(range(count))
    assert findings.thumbnail(count - 1).shape == (8, 8, 3)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return size


def test_memory_does_not_grow_with_a_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "REMEMBERED", 50)
    few, many = held(tmp_path / "few", 300), held(tmp_path / "many", 3000)
    assert many < few + 50_000, (few, many)


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path):
    dead, alive = tmp_path / f"{shards.UNFINISHED}dead", tmp_path / f"{shards.UNFINISHED}alive"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "findings.jsonl").write_text("{}")
        for path in (folder, folder / "findings.jsonl"):
            os.utime(path, (time.time() - 2 * shards.DEAD,) * 2)
    (alive / "findings.jsonl").write_text("{}\n")
    shards.sweep(tmp_path)
    assert not dead.exists() and alive.exists()
