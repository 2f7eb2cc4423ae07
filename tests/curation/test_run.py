"""The command as a whole: a folder as people have them becomes a dataset; killed, resumed, changed by hand."""

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

import charforgex
from charforgex.curation import pipeline, shards
from charforgex.curation.manifest import open_manifest
from charforgex.curation.report import read, set_captions
from charforgex.curation.run import Source, make_dataset
from charforgex.curation.settings import CurationSettings
from charforgex.data.mess import write_archive, write_mess
from charforgex.errors import CharForgeError, ConfigError, DataError

COUNTS = {"kept": 8, "recompressed": 1, "dark": 1, "noisy": 1, "small": 1, "stranger": 2, "truncated": 1, "empty": 1, "document": 1}
SMALL = {"quality": {"min_side": 64, "min_detail_side": None}, "crops": {"min_side": 64, "framings": ["full"]}, "workers": 1, "shard": 4}


def curate(folder, **more):
    """A run into `folder`/out, with its cache beside it."""
    settings = {"data": {"root": str(folder / "raw")}, "out": str(folder / "out"), "runs_dir": str(folder / "runs"), "curation": SMALL}
    return charforgex.curate(**{**settings, **more, "curation": {**SMALL, **more.get("curation", {})}})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, expected classes, result.json)."""
    folder = tmp_path_factory.mktemp("curated")
    expected = write_mess(folder / "raw", 0, COUNTS, 192)
    expected |= write_archive(folder / "raw/pack.zip", 0, 1, 192)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "raw").iterdir()}
    result = curate(folder, data={"root": str(folder / "raw"), "trigger": "zatoki"})
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "raw").iterdir()} == before, "nothing is changed"
    return folder, expected, result


@pytest.fixture
def folder(made, tmp_path):
    """A copy of that run, to be changed."""
    shutil.copytree(made[0], tmp_path / "copy")
    told = tmp_path / "copy/out/provenance.json"
    told.write_text(told.read_text().replace(str(made[0]), str(tmp_path / "copy")))
    return tmp_path / "copy"


def test_every_file_ends_in_its_class(made):
    folder, expected, result = made
    found = {row["name"]: row["kind"] for row in read(folder / "out")["pictures"]}
    assert found == expected
    assert result["classes"] == read(folder / "out")["classes"]
    assert all(row["reason"] for row in read(folder / "out")["pictures"] if row["kind"] != "kept")


def test_the_dataset_is_a_manifest_and_a_folder_for_any_trainer(made):
    result = made[2]
    manifest = open_manifest(result["manifest"])
    assert manifest.content_hash() == result["content"]
    assert {side: len(manifest.of(side)) for side in ("train", "val")} == {"train": 8, "val": 1}
    for record in manifest.records:
        picture = manifest.root / record.path
        texts = picture.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
        assert tuple(texts) == record.captions
        assert record.mask == record.path.removesuffix(".png") + ".mask.png" and (manifest.root / record.mask).is_file()
        assert record.facts["framing"] == "full" and record.facts["scores"]["sharpness"] > 0 and "face" in record.facts
    captioned = [record for record in manifest.records if record.captions]
    assert len(captioned) == 8 and all("zatoki woman" in record.captions[0] for record in captioned)
    plain = open_manifest(manifest.root)  # the folder itself, as other trainers see it
    assert {record.path for record in plain.records} == {record.path for record in manifest.records}


def test_a_second_run_decodes_nothing_and_comes_to_the_same(made, folder, monkeypatch):
    def refuse(*args):
        raise AssertionError("a picture was decoded again")

    shutil.rmtree(folder / "out")
    monkeypatch.setattr(shards, "decode_picture", refuse)
    assert curate(folder, data={"root": str(folder / "raw"), "trigger": "zatoki"})["content"] == made[2]["content"]


def test_what_somebody_wrote_stays(made, folder):
    """Beside the picture, or by way of an editor; however often the command runs again."""
    before = {r.path: r.captions for r in open_manifest(made[2]["manifest"]).records}
    one, two = list(before)[:2]
    again(folder)  # the folder is a copy, and its manifest now its own
    (folder / "out/pictures" / one).with_suffix(".txt").write_text("zatoki woman with a kite\n")
    set_captions(folder / "out/pictures" / pipeline.MANIFEST, two, ["zatoki woman in the rain"])
    wanted = before | {one: ("zatoki woman with a kite",), two: ("zatoki woman in the rain",)}
    for _ in range(2):
        assert {r.path: r.captions for r in open_manifest(again(folder)["manifest"]).records} == wanted
    (folder / "out/pictures" / one).with_suffix(".txt").unlink()
    assert open_manifest(again(folder)["manifest"]).records[0].captions == before[one], "without a file there is nothing to keep"


def again(folder):
    return curate(folder, data={"root": str(folder / "raw"), "trigger": "zatoki"})


def test_two_folders_are_two_datasets(tmp_path):
    """Of the same name and with the same settings: the second must not take the first's place."""
    for name in ("a", "b"):
        write_mess(tmp_path / name / "raw", 0, {"kept": 2}, 128, captions=False)
    outs = [
        charforgex.curate(data={"root": str(tmp_path / name / "raw")}, runs_dir=str(tmp_path / "runs"), curation=SMALL)["out"]
        for name in ("a", "b", "a")
    ]
    assert outs[0] == outs[2] != outs[1]
    with pytest.raises(ConfigError, match=r"holds what was made of .*name another folder"):
        charforgex.curate(data={"root": str(tmp_path / "b/raw")}, out=outs[0], curation=SMALL)
    with pytest.raises(ConfigError, match="lies in out="):
        make_dataset(Source(f"{outs[0]}/pictures"), CurationSettings(), Path(outs[0]), tmp_path / "cache", Console())


@pytest.mark.parametrize(
    "curation, said",
    [
        ({"people": {"references": "nowhere"}}, "curation.people.references=nowhere has no pictures"),
        ({"captions": {"backend": "blip2", "source": "./nowhere"}}, "there is no such folder"),
    ],
)
def test_what_is_lacking_is_told_before_anything_is_looked_at(tmp_path, monkeypatch, curation, said):
    write_mess(tmp_path / "raw", 0, {"kept": 1}, 64, captions=False)
    monkeypatch.setattr(pipeline, "scan", lambda *args: pytest.fail("pictures were looked at"))
    with pytest.raises(CharForgeError, match=said):
        curate(tmp_path, curation=curation)


def test_a_picture_that_went_is_taken_out(made, folder):
    gone = open_manifest(made[2]["manifest"]).records[0]
    name = gone.facts["from"]
    (folder / "raw" / name).unlink()
    (folder / "raw" / name).with_suffix(".txt").unlink(missing_ok=True)
    curate(folder, data={"root": str(folder / "raw"), "trigger": "zatoki"})
    stem = gone.path.removesuffix(".png")
    assert not [path for path in (folder / "out/pictures").iterdir() if path.name.startswith(stem)]


def test_killed_it_goes_on_and_comes_to_the_same(made, folder):
    """After SIGKILL in the middle only the shard in work is done again."""
    shutil.rmtree(folder / "runs")
    shutil.rmtree(folder / "out")
    code = (
        "import charforgex, json, sys; from tests.curation.test_run import curate; from pathlib import Path;"
        f"curate(Path({str(folder)!r}), data={{'root': {str(folder / 'raw')!r}, 'trigger': 'zatoki'}})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    store = folder / "runs/cache" / shards.FOLDER

    def done():
        return [path for path in store.glob("[0-9a-f]*") if path.is_dir()]

    deadline = time.monotonic() + 120
    while len(done()) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in done()}
    assert len(kept) >= 2 and not (folder / "out/result.json").exists(), "it was killed between two shards"
    result = curate(folder, data={"root": str(folder / "raw"), "trigger": "zatoki"})
    assert result["content"] == made[2]["content"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was done is not done again"


def test_a_look_writes_a_report_alone(folder):
    result = curate(folder, out=str(folder / "look"), only_report=True)
    assert result["manifest"] is None
    assert sorted(path.name for path in (folder / "look").iterdir()) == [
        "config.yaml", "provenance.json", "report.html", "report.json", "result.json",
    ]  # fmt: skip
    assert read(folder / "look")["analysis"]["num_pictures"] == 9


def test_where_nobody_is_in_most_pictures_nobody_is_set_aside(tmp_path):
    """As with photographs, of which charworld's judge knows nothing: better all than a guess."""
    for number in range(6):
        write_mess(tmp_path / "raw" / str(number), number, {"kept": 1}, 128, captions=False)
    curate(tmp_path, only_report=True)
    told = read(tmp_path / "out")
    assert told["classes"] == {"kept": 6}
    assert any("too few to set the others aside" in note for note in told["notes"])


def test_what_a_person_should_know_of_captions_is_told(tmp_path):
    write_mess(tmp_path / "raw", 0, {"kept": 3}, 128, captions=False)
    (tmp_path / "raw/0000.txt").write_text("a woman with " + " ".join(f"number{n}" for n in range(60)))
    panel = {"captions": {"backend": ["charworld", "sidecar"]}}
    result = curate(tmp_path, curation=panel)
    records = {record.facts["from"]: record.facts for record in open_manifest(result["manifest"]).records}
    named = next(name for name in records if name.startswith("0000"))
    assert "CLIP reads 77" in records[named]["caption"]["notes"][0]
    assert all(0 <= facts["caption"]["quality"] <= 1 for name, facts in records.items() if name != named)
    assert any("Of 1 caption the rules have a remark" in note for note in read(tmp_path / "out")["notes"])
    assert "CLIP reads 77" in (tmp_path / "out/report.html").read_text()


def test_of_a_turned_copy_and_its_picture_the_one_with_the_character_stays(tmp_path):
    write_mess(tmp_path / "raw", 0, {"kept": 8}, 192, captions=False)
    for number, turn in ((2, Image.Transpose.ROTATE_180), (5, Image.Transpose.ROTATE_90)):
        Image.open(tmp_path / f"raw/{number:04d}.png").transpose(turn).save(tmp_path / f"raw/000{number}_0.png")  # met after the picture
        (tmp_path / f"raw/{number:04d}.png").rename(tmp_path / f"raw/{number:04d}_1.png")
    curate(tmp_path, only_report=True)
    found = {row["name"]: row["kind"] for row in read(tmp_path / "out")["pictures"]}
    assert {name for name, kind in found.items() if kind == "duplicate"} == {"0002_0.png", "0005_0.png"}
    assert read(tmp_path / "out")["classes"] == {"kept": 8, "duplicate": 2}


def test_without_a_face_there_is_no_portrait(tmp_path):
    write_mess(tmp_path / "raw", 0, {"landscape": 2, "kept": 3}, 128, captions=False)
    loose = {"people": {"require_face": False}, "crops": {"min_side": 64, "framings": ["portrait"]}}
    curate(tmp_path, curation=loose)
    reasons = [row["reason"] for row in read(tmp_path / "out")["pictures"] if row["kind"] == "no_face"]
    assert reasons == ["no face was found in it, and curation.crops.framings has portrait, which are cut around one"] * 2
    result = curate(tmp_path, curation={**loose, "crops": SMALL["crops"], "masks": "subject"})
    records = {record.facts["from"]: record for record in open_manifest(result["manifest"]).records}
    assert len(records) == 5 and all(record.mask for record in records.values())


def test_what_cannot_be_curated_is_told(tmp_path):
    (tmp_path / "raw").mkdir()
    with pytest.raises(DataError, match="has no files"):
        curate(tmp_path)
    (tmp_path / "raw/a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"no picture is kept \(1 corrupt\)"):
        curate(tmp_path)
    assert (tmp_path / "out/report.html").is_file(), "and the report says why"
    with pytest.raises(ConfigError, match="nowhere"):
        curate(tmp_path, data={"root": str(tmp_path / "nowhere")}, out=str(tmp_path / "never"))
    assert not (tmp_path / "never").exists(), "a mistyped folder leaves none behind"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious.txt").write_text("x")
    with pytest.raises(ConfigError, match="holds other files"):
        curate(tmp_path, out=str(tmp_path / "mine"))
    with pytest.raises(ConfigError, match="say it twice"):
        curate(tmp_path, data={"root": str(tmp_path / "raw"), "trigger": "a"}, curation={"rules": {"trigger": "b"}})


def test_a_log_tells_how_far_it_is(monkeypatch):
    monkeypatch.setattr(pipeline, "EVERY", -1)
    console = Console(file=io.StringIO())
    with pipeline.progress(console) as bar:
        bar.start("looking at pictures", 2000)
        bar.step(1500)
        bar.start("deciding")
    assert console.file.getvalue().splitlines() == ["looking at pictures: 2,000", "looking at pictures: 1,500 of 2,000"]


def test_captions_changed_by_hand_are_found_by_what_was_written(tmp_path):
    (tmp_path / "pictures").mkdir()
    assert pipeline.edited(tmp_path / "pictures") == {}
    rows = [{"path": f"{name}.png", "captions": said, "facts": {}} for name, said in (("a", ["one"]), ("b", ["two"]), ("c", []))]
    (tmp_path / "pictures" / pipeline.MANIFEST).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("a", "one\n"), ("b", "better\n"), ("c", "new\nwords\n")):
        Path(tmp_path / f"pictures/{name}.txt").write_text(text)
    assert pipeline.edited(tmp_path / "pictures") == {"b.png": ("better",), "c.png": ("new", "words")}


def test_captions_of_a_run_that_was_stopped_while_it_wrote_them_are_nobodys(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, now in {pipeline.MANIFEST: ("old",), pipeline.NEXT: ("newer", "fresh")}.items():
        rows = [{"path": f"{path}.png", "captions": [text], "facts": {}} for path, text in zip("ab", now, strict=False)]
        (pictures / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (pictures / "a.txt").write_text("newer\n")
    (pictures / "b.txt").write_text("fresh\n")
    assert pipeline.edited(pictures) == {}
    (pictures / "a.txt").write_text("mine\n")
    assert pipeline.edited(pictures) == {"a.png": ("mine",)}
