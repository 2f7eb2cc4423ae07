"""Videos to clips: which frames, which part of them, what is set aside and why; and that a second run does nothing."""

import json
import random
import shutil
import struct
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

import charforgex
from charforgex.config import bind, compose
from charforgex.curation.clips import assembling, cutting, measures, scanning
from charforgex.curation.clips.dissolves import Dissolves
from charforgex.curation.clips.settings import ClipSettings, FrameSettings, WindowSettings
from charforgex.curation.clips.windows import Short, windows
from charforgex.curation.items import Face
from charforgex.curation.manifest import Manifest
from charforgex.errors import ConfigError, DataError
from charforgex.filming import Output, writing
from charforgex.videos import frames

pytest.importorskip("av")
SIZE = (64, 96)
SMALL = {
    "curation.limits.min_side": 32, "curation.workers": 1, "curation.faces.detector": "charworld", "curation.windows.frames": 8,
}  # fmt: skip
EIGHT = WindowSettings(frames=4, fps=8)


def scene(number: int, size=SIZE) -> np.ndarray:
    """Coarse squares in shades of one colour, with lines in them that no other scene has."""
    shades = np.random.default_rng(number).integers(60, 160, (size[0] // 8, size[1] // 8, 1)).astype(np.uint8)
    colour = [(1.0, 0.5, 0.3), (0.3, 0.6, 1.0), (0.5, 1.0, 0.4)][number % 3]
    return (np.kron(shades, np.ones((8, 8, 1))) * colour).astype(np.uint8)


def marked(number: int, index: int, size=SIZE) -> np.ndarray:
    """The scene with a bright square that goes right."""
    pixels = scene(number, size)
    left = 8 + 2 * index % (size[1] - 40)
    pixels[8:24, left : left + 16] = 240
    return pixels


def film(path, pictures, rate=24, times=None, codec="ffv1"):
    """A video, losslessly; `times` in seconds of frames that do not come evenly."""
    times = times or [Fraction(index, rate) for index in range(len(pictures))]
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(Output(path, Fraction(rate), 1000 if codec == "ffv1" else 24_000, codec)) as out:
        for time, pixels in zip(times, pictures, strict=True):
            out.write(pixels, Fraction(time), Fraction(1, rate))
    return path


def found(path, settings=EIGHT):
    problems = []
    return list(windows(path, settings, problems, Dissolves())), problems


def indices(window):
    return [window.moments[place].index for place in sorted(window.moments)]


# ---- which frames ----


def test_windows_are_the_nearest_frames_and_none_lies_across_a_cut(tmp_path):
    shots = [marked(0, index) for index in range(27)] + [marked(1, index) for index in range(5)] + [marked(2, index) for index in range(13)]
    (one, two, short, three), problems = found(film(tmp_path / "a.mkv", shots))
    assert not problems
    assert [indices(one), indices(two)] == [[0, 3, 6, 9], [12, 15, 18, 21]]
    assert isinstance(short, Short) and short.shot == 1 and float(short.seconds) == pytest.approx(5 / 24, abs=2e-3)
    assert indices(three) == [32, 35, 38, 41] and [window.shot for window in (one, two, three)] == [0, 0, 2]
    (one, two, *_), _ = found(tmp_path / "a.mkv", WindowSettings(frames=4, fps=8, gap=0.1))
    assert indices(two) == [15, 18, 21, 24]  # the first frame a tenth of a second and more behind


def test_of_uneven_frames_each_serves_one_time_or_is_missed(tmp_path):
    uneven = [0, 0.02, 0.11, 0.13, 0.2, 0.26, 0.38, 0.4]  # wanted are 0, 0.125, 0.25, 0.375
    (window,), _ = found(film(tmp_path / "a.mkv", [marked(0, index) for index in range(8)], times=uneven))
    assert indices(window) == [0, 3, 5, 6] and window.num_missing == 0
    slow = [Fraction(index, 5) for index in range(8)]  # five a second
    (one, _), _ = found(film(tmp_path / "b.mkv", [marked(0, index) for index in range(8)], times=slow))
    assert indices(one) == [0, 1, 2] and one.num_missing == 1  # 0, 0.2 for 0.25 and 0.4 for 0.375
    frozen = [0, 0.1, 0.2, 1.2, 1.3, 1.4, 1.5, 1.6]
    assert [window.num_missing for window in found(film(tmp_path / "c.mkv", [marked(0, i) for i in range(8)], times=frozen))[0]] == [1, 0]


def test_a_video_that_breaks_off_gives_what_is_whole(tmp_path):
    data = film(tmp_path / "a.mp4", [marked(0, index) for index in range(60)], codec="h264").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) * 3 // 4])
    whole, problems = found(tmp_path / "a.mp4")
    assert problems and problems[0].kind == "corrupt"
    assert 1 <= len(whole) < 5 and all(window.num_missing == 0 for window in whole)


def test_turned_videos_are_cut_upright(tmp_path):
    data = bytearray(film(tmp_path / "a.mp4", [marked(0, index) for index in range(13)], codec="h264").read_bytes())
    place = data.index(b"tkhd") + 44  # the display matrix
    data[place : place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(data)
    ((window,), _) = found(tmp_path / "a.mp4")
    assert window.small.shape == (4, 96, 64, 3) and window.looks[0].size == (64, 96)
    wanted = {"a": {"indices": indices(window), "box": (8, 0, 64, 96), "size": (56, 96)}}
    ((_, pictures),) = cutting.clips(tmp_path / "a.mp4", EIGHT, wanted)
    assert [picture.size for picture in pictures] == [(56, 96)] * 4
    assert np.abs(np.asarray(pictures[2]).astype(int) - np.rot90(marked(0, 6), -1)[:, 8:]).mean() < 4


# ---- which part of them ----


def face(left, top, side=20.0):
    return Face((left, top, left + side, top + side), 0.9)


def test_the_crop_holds_the_face_wherever_it_goes():
    looks = [[face(30, 60)], [face(40, 62), face(400, 60, 18.0)], [], [face(60, 70)]]
    one, seen = measures.followed(looks)
    assert one.box == (30, 60, 80, 90) and seen == 3, "the other person is too far away to be the same"
    assert measures.followed([[face(30, 60)], [], [], []]) == (None, 1)
    box, size = measures.crop_of(480, 270, one, FrameSettings(framing="portrait"))
    left, top, right, bottom = box
    assert left <= 30 and top <= 60 and right >= 80 and bottom >= 90 and (right - left, bottom - top) == size
    assert size[0] == size[1] and size[0] % 8 == 0
    far, size = measures.crop_of(480, 270, Face((20, 60, 400, 90), 0.9), FrameSettings())
    assert far == (78, 3, 342, 267) and size == (264, 264), "it goes further than a square can show: the middle of its way"
    centre, size = measures.crop_of(480, 270, None, FrameSettings())
    assert centre == (108, 3, 372, 267) and size == (264, 264)
    assert measures.crop_of(1921, 1079, None, FrameSettings(without_face="whole")) == ((0, 9, 1921, 1070), (768, 424))
    assert measures.crop_of(480, 270, None, FrameSettings(without_face="aside")) is None
    assert measures.crop_of(40, 12, None, FrameSettings()) is None


def test_motion_and_jumps_have_values_that_can_be_checked():
    still = np.full((8, 40, 60, 3), 90, np.uint8)
    grey = measures.smoothed(still + np.arange(8, dtype=np.uint8)[:, None, None, None] * 9)
    assert measures.motion(grey) == pytest.approx(0, abs=1e-3), "a lamp that grows brighter is no motion"
    moving = still.copy()
    for index in range(8):
        moving[index, 10:30, 5 + 4 * index : 25 + 4 * index] = 190
    grey = measures.smoothed(moving)
    assert 85 < measures.motion(grey) < 110 and measures.jump(grey) < 1.2
    hidden = moving.copy()
    hidden[5:, :, :30] = 220
    assert measures.jump(measures.smoothed(hidden)) > 4


# ---- the command ----


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Videos of every kind, drawn so that it is known what becomes of them."""
    from charforgex.charworld import clips, world

    folder = tmp_path_factory.mktemp("videos")
    rng = random.Random(0)

    def drawn(motion, count, rate):
        identity, context = world.draw_identity(rng), clips.draw_setting(rng)
        return list(clips.draw_clip(identity, context, clips.draw_motion(rng, motion), count, 96)), rate

    film(folder / "nod.mkv", *drawn("nod", 18, 8))
    film(folder / "b/walk.mkv", *drawn("walk", 9, 8))
    (folder / "b/walk.txt").write_text("a woman walking in the rain\n")
    shutil.copy(folder / "nod.mkv", folder / "z_again.mkv")
    film(folder / "still.mkv", *drawn("still", 8, 8))
    film(folder / "dark.mkv", [pixels // 8 for pixels in drawn("wave", 8, 8)[0]], 8)
    film(folder / "slow.mkv", *drawn("wave", 8, 5))
    talking, sideways = drawn("talk", 8, 8)[0], drawn("talk", 8, 8)[0]
    film(folder / "spliced.mkv", [*talking[:4], *(np.roll(pixels, 9, axis=1) for pixels in talking[4:])], 8)
    film(folder / "one.mkv", talking[:1], 8)
    (folder / "no.mp4").write_text("no video at all")
    (folder / "lonely.txt").write_text("nobody")
    Image.fromarray(sideways[0]).save(folder / "picture.png")
    return folder


def curate(raw, out, **more):
    data = {"root": str(raw), "trigger": "zatoki", "class_word": "woman"}
    return charforgex.curate_clips(data=data, out=str(out), runs_dir=str(out.parent / "runs"), **SMALL, **more)


@pytest.fixture(scope="module")
def made(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    return out, curate(raw, out)


def test_every_video_ends_in_its_class_with_a_reason(made):
    out, result = made
    told = json.loads((out / "report.json").read_text())
    kinds = {}
    for one in told["clips"]:
        kinds.setdefault(one["video"], []).append(one["kind"])
        assert one["reason"] or one["kind"] == "kept"
    assert kinds == {
        "b/walk.mkv": ["kept"], "nod.mkv": ["kept", "kept"], "z_again.mkv": ["duplicate", "duplicate"], "still.mkv": ["static"],
        "dark.mkv": ["exposure"], "slow.mkv": ["jumping"], "spliced.mkv": ["jumping"], "one.mkv": ["short"],
    }  # fmt: skip
    reasons = {one["video"]: one["reason"] for one in told["clips"]}
    assert reasons["slow.mkv"].startswith("3 of its 8 frames are missing") and "curation.windows.fps=8 may be more" in reasons["slow.mkv"]
    assert reasons["one.mkv"] == "the shot has 0.12 seconds, and a clip takes 1.00"
    assert reasons["z_again.mkv"] == "the same file as nod.mkv!/000001.000s"
    files = {one["name"]: (one["kind"], one["reason"]) for one in told["files"]}
    assert files["no.mp4"][0] == "corrupt" and "no video" in files["no.mp4"][1]
    assert files["lonely.txt"] == ("unsupported", "no video has this name") and files["b/walk.txt"][0] == "sidecar"
    assert files["picture.png"] == ("unsupported", "a picture; charforgex curate makes a dataset of pictures")
    assert files["nod.mkv"] == ("container", "clips kept: 2 of 2, shots: 1")
    assert result["clips"] == 3 and result["classes"] == told["classes"] and result["classes"]["kept"] == 3
    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg") == 9 and "the same file as nod.mkv!/000001.000s" in page


def test_a_clip_that_goes_over_into_another_shot_is_set_aside(tmp_path):
    from charforgex.charworld import clips, world

    one, other = (
        clips.draw_clip(world.draw_identity(random.Random(seed)), clips.draw_setting(random.Random(seed)), clips.Motion("nod"), 24, 96)
        for seed in (1, 2)
    )
    shares = np.clip((np.arange(24) - 7) / 9, 0, 1)[:, None, None, None]
    film(tmp_path / "raw/over.mkv", list(((1 - shares) * one + shares * other).round().astype(np.uint8)), 8)
    result = curate(tmp_path / "raw", tmp_path / "out")
    told = json.loads((tmp_path / "out/report.json").read_text())
    assert [one["kind"] for one in told["clips"]] == ["kept", "dissolving", "kept"]
    assert told["clips"][1]["reason"] == "from 1.00 to 1.88 seconds its frames are one blended into another"
    more = curate(tmp_path / "raw", tmp_path / "all", **{"curation.limits.dissolves": True})
    assert (result["clips"], more["clips"]) == (2, 3)


def test_the_manifest_says_what_training_needs(made, raw):
    out, result = made
    manifest = Manifest.read(out / "clips/clips.jsonl")
    assert str(out / "clips/clips.jsonl") == result["manifest"] and manifest.content_hash() == result["content"]
    by = {record.facts["from"]: record for record in manifest.records}
    assert list(by) == ["b/walk.mkv!/000000.000s", "nod.mkv!/000000.000s", "nod.mkv!/000001.000s"]
    walk, first, second = by.values()
    assert walk.captions == ("zatoki woman walking in the rain",)
    assert first.captions == () and (out / "clips" / walk.path).with_suffix(".txt").read_text() == f"{walk.captions[0]}\n"
    assert (walk.split, first.split, second.split) == ("val", "train", "train"), "the two of one video are on one side"
    assert first.facts["group"] == second.facts["group"] != walk.facts["group"]
    source = [frame.pixels for frame in frames(raw / "nod.mkv")]
    for record, start in ((first, 0), (second, 8)):
        assert record.facts["frames"] == 8 and record.facts["fps"] == 8 and record.width % 8 == record.height % 8 == 0
        left, top, right, bottom = record.facts["box"]
        read = list(frames(out / "clips" / record.path))
        assert [frame.time for frame in read] == [Fraction(index, 8) for index in range(8)]
        for index, frame in enumerate(read):
            assert (frame.pixels == source[start + index][top:bottom, left:right]).all(), "not a pixel is changed"


def test_a_second_run_does_nothing_and_what_a_person_wrote_stays(made, raw, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(made[0].parent, tmp_path, dirs_exist_ok=True)
    curate(raw, out)  # the cuts' memo knows its own folder
    before = {path: path.stat().st_mtime_ns for path in (out / "clips").rglob("*.mkv")}

    def refuse(*args, **more):
        raise AssertionError("a video was decoded again")

    text = next((out / "clips").glob("nod*.txt"))
    text.write_text("zatoki woman who agrees\n")
    monkeypatch.setattr(scanning, "windows", refuse)
    with monkeypatch.context() as patch:
        patch.setattr(cutting, "whole", refuse)
        for _ in range(2):
            curate(raw, out)
            records = {record.path: record for record in Manifest.read(out / "clips/clips.jsonl").records}
            assert records[text.with_suffix(".mkv").name].captions == ("zatoki woman who agrees",)
    assert {path: path.stat().st_mtime_ns for path in (out / "clips").rglob("*.mkv")} == before
    assert curate(raw, out, **{"curation.limits.min_motion": None})["clips"] == 4, "one more is cut, nothing measured again"
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_killed_run_leaves_no_half_clip(raw, tmp_path, monkeypatch):
    write, written = cutting.write, []

    def killed(path, pictures, rate):
        if written:
            with writing(Output(path, rate, 1000, "ffv1")) as out:
                out.write(np.asarray(pictures[0]), Fraction(0), 1 / rate)
                raise KeyboardInterrupt
        written.append(path)
        write(path, pictures, rate)

    monkeypatch.setattr(cutting, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        curate(raw, tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.suffix == ".mkv"] == written


def test_whole_videos_are_held_out_or_shots_of_few():
    from charforgex.curation.clips.deciding import Clip
    from charforgex.curation.split import SplitSettings

    def held(videos, notes):
        names = [(str(video), place) for video, count in enumerate(videos) for place in range(count)]
        clips = [Clip(f"{video}!/{place:010.3f}s", video, None, {"shot": place // 2}) for video, place in names]
        cuts = [{"file": clip.name, "sha256": f"{place:064x}", "clip": clip} for place, clip in enumerate(clips)]
        _, sides = assembling.held_out(clips, [], cuts, SplitSettings(val=0.25), notes)
        return [clip for clip, side in zip(clips, sides, strict=True) if side == "val"]

    notes: list[str] = []
    clips = held([4, 4, 4, 4], notes)
    assert len(clips) == 4 and len({clip.video for clip in clips}) == 1 and not notes
    clips = held([8], notes)
    assert len(clips) == 2 and clips[0].row["shot"] == clips[1].row["shot"]
    assert "Whole videos have too many clips" in notes[0]


def test_what_cannot_be_done_is_said_first(tmp_path, raw):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.png").write_bytes(b"")
    with pytest.raises(DataError, match="has no video among its 1 files"):
        curate(tmp_path / "raw", tmp_path / "out")
    with pytest.raises(DataError, match=r"no clip is kept \(.*exposure"):
        curate(raw, tmp_path / "other", only_report=True, **{"curation.limits.max_low": 1})
    with pytest.raises(ConfigError, match=r"curation\.crop\.framing=middle is not among"):
        curate(raw, tmp_path / "third", **{"curation.crop.framing": "middle"})
    with pytest.raises(ConfigError, match=r"curation\.quality\.max_text is unknown"):
        compose("curate_clips", ["data.root=x", "curation.quality.max_text=1"])


def test_the_yaml_and_its_signatures_agree():
    from dataclasses import asdict

    shown = compose("curate_clips", ["data.root=x"]).curation
    assert bind(ClipSettings, shown, "curation") == ClipSettings()
    told = asdict(ClipSettings())
    assert set(shown) == set(told)
    for part in ("windows", "crop", "limits", "faces", "captions", "rules"):
        assert set(shown[part]) == set(told[part]), part
