"""Clips from videos: the frames that are shown at the asked times, encoded once, and the same whoever asks."""

import json
import shutil
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pytest
import torch

from charforgex.curation.manifest import Manifest, Record
from charforgex.data.clips import ClipData, to_pixels
from charforgex.data.datamodule import CharacterData
from charforgex.errors import ConfigError, DataError
from charforgex.families.animatediff import AnimateDiff
from charforgex.families.sdxl import Sdxl
from charforgex.filming import Output, writing
from charforgex.runs import sha256_file
from charforgex.videos import Frame

pytest.importorskip("av")
BASE = AnimateDiff().tiny()
GEOMETRY = {"pixel_multiple": AnimateDiff().pixel_multiple(BASE), "latent_stride": AnimateDiff().latent_stride(BASE)}


@dataclass
class Counting(AnimateDiff):
    """The tiny AnimateDiff, which notes what it loads and encodes."""

    loaded: list = field(default_factory=list)
    clips: list = field(default_factory=list)

    def load_parts(self, only):
        self.loaded += list(only)
        return BASE

    def encode_pixels(self, parts, pixels_BPTHW):
        self.clips.append(tuple(pixels_BPTHW.shape))
        return super().encode_pixels(parts, pixels_BPTHW)


def picture(number: int, size=(64, 64), video: int = 0) -> np.ndarray:
    """(height, width) of the frame's number in red, on the right half from above; the video's in blue."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[:, size[1] // 2 :] = (number, 255 - number, video)
    return pixels


def film(path, lasts, size=(64, 64), video=0, caption="zkx nods"):
    """A lossless video whose frame n lasts `lasts[n]` seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clock = 1000
    with writing(Output(path, Fraction(8), clock, "ffv1")) as out:
        time = Fraction(0)
        for number, length in enumerate(lasts):
            out.write(picture(number, size, video), time, Fraction(length))
            time += Fraction(length)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


@pytest.fixture
def folder(tmp_path):
    """Four videos of 16 frames at 8 a second and a wide one, which has two clips of 4 frames."""
    for number in range(4):
        film(tmp_path / "in" / f"{number}.mkv", [Fraction(1, 8)] * 8, video=number, caption=f"zkx nods, number {number}")
    film(tmp_path / "in" / "wide.mkv", [Fraction(1, 8)] * 9, size=(48, 96), video=4)
    return tmp_path / "in"


@pytest.fixture
def make(folder, tmp_path):
    def make(source=folder, **settings):
        asked = {"resolution": 64, "frames": 4, "fps": 8, "trigger": "zkx", "seed": 3} | settings
        return ClipData(source, tmp_path / "cache", **asked)

    return make


@pytest.fixture
def prepared(make):
    """Makes and prepares a ClipData; returns it and its counting family."""

    def prepare(weights="vae", **settings):
        data, family = make(**settings), Counting()
        told = data.prepare(
            family, family.load_parts, weights={"vae": weights, "text": "clip"}, prompts=["zkx jumps"], progress=False, **GEOMETRY
        )
        assert told["latent"] == len(family.clips)
        return data, family

    return prepare


def flat(batch) -> list:
    return [batch.mean_BChw.tolist(), batch.std_BChw.tolist(), batch.text.tokens_BLD.tolist(), batch.keys, batch.captions]


# ---- which frames ----


def shown(make, tmp_path, lasts, **settings) -> list[tuple[int, ...]]:
    film(tmp_path / "one" / "film.mkv", lasts)
    data = make(tmp_path / "one", val_count=0, **settings)
    return [window for windows in data._windows.values() for window in windows]


@pytest.mark.parametrize(
    ("rate", "frames", "wanted"),
    [
        (8, 8, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (24, 24, [(0, 3, 6, 9), (12, 15, 18, 21)]),
        (30, 20, [(0, 3, 7, 11)]),  # 0, 3.75, 7.5 and 11.25 frames; what is shown then has begun
        (Fraction(30000, 1001), 61, [(0, 3, 7, 11), (15, 18, 22, 26), (30, 33, 37, 41), (44, 48, 52, 56)]),  # a millisecond is forgiven,
        (4, 4, [(0, 0, 1, 1), (2, 2, 3, 3)]),
    ],
)
def test_frames_are_those_shown_at_the_asked_times(make, tmp_path, rate, frames, wanted):
    assert shown(make, tmp_path, [1 / Fraction(rate)] * frames) == wanted


def test_a_variable_rate_is_asked_for_times_too(make, tmp_path):
    """Frame 1 is shown from 0.1 to 0.6 seconds, the others for 0.1."""
    tenth = Fraction(1, 10)
    lasts = [tenth, 5 * tenth, *[tenth] * 6]
    assert shown(make, tmp_path, lasts, frames=5, fps=5) == [(0, 1, 1, 2, 4)]  # 0.0, 0.2, 0.4, 0.6 and 0.8 seconds
    data = make(tmp_path / "one", val_count=0, frames=5, fps=5)
    assert data.notes[0] == "film.mkv: 1 of its 1 clips show a frame more than once; it has not always 5 a second"


def test_pixels_are_those_frames(prepared, folder):
    data, _ = prepared(frames=4, val_count=1, caption_dropout=0)
    seen = set()
    for step in range(20):
        batch = data.batch(step)
        record = next(record for record in data.train if batch.keys[0].startswith(record.sha256))
        first = int(batch.keys[0].partition("@")[2])
        size, video = (record.height, record.width), data.train.index(record)
        number = 4 if record.path == "wide.mkv" else int(record.path[0])
        clip = np.stack([picture(first + k, size, number) for k in range(4)])
        seen.add((video, first))
        if size == (64, 64):
            mean, std = AnimateDiff().encode_pixels(BASE, to_pixels(clip))
            assert batch.mean_BChw.shape == (1, 4, 4, 8, 8)
            assert torch.equal(batch.mean_BChw, mean) and torch.equal(batch.std_BChw, std)
            assert torch.equal(batch.text.tokens_BLD, AnimateDiff().encode_text(BASE, [f"zkx nods, number {number}"]).tokens_BLD)
        else:
            assert batch.mean_BChw.shape == (1, 4, 4, 6, 10)
            assert batch.crop.original_B2.tolist() == [[48, 96]] and batch.crop.target_B2.tolist() == [[48, 80]]
    assert len(seen) == 8  # four videos to train on, two clips each


def test_references_are_the_held_out_clips(prepared):
    data, _ = prepared(val_count=2)
    clips = list(data.references())
    assert len(clips) == 4 and sum(map(len, data.validation())) == 4
    assert all(clip.dtype == np.uint8 and len(clip) == 4 for clip in clips)
    numbers = sorted(int(clip[0, 0, -1, 0]) for clip in clips)
    assert numbers == [0, 0, 4, 4]
    assert {record.split for record in data.val} == {"val"} and len(data.paths("val")) == 2


def test_mirrored_clips_are_mirrored(prepared):
    data, family = prepared(flip=True, val_count=0, batch_size=2)
    assert len(family.clips) == 20
    found = {tuple(drawn.cut.flip for drawn in data._draw(step)) for step in range(12)}
    assert found == {(False, False), (False, True), (True, False), (True, True)}
    drawn = next(d for step in range(20) for d in data._draw(step) if d.cut.flip and d.item.cut.size == (64, 64))
    number = int(drawn.item.record.path[0])
    clip = np.stack([picture(n, video=number) for n in drawn.item.frames])[:, :, ::-1].copy()
    assert torch.equal(data._row(drawn)["entry"]["mean"], AnimateDiff().encode_pixels(BASE, to_pixels(clip))[0][0])


def test_several_sizes_and_what_is_too_small(prepared):
    data, _ = prepared(resolution=[32, 64, 128], val_count=0)
    assert {item.cut.size for item in data.items if item.record.path != "wide.mkv"} == {(32, 32), (64, 64)}
    assert sum("left out" in note or "not used at every resolution" in note for note in data.notes) == 5
    with pytest.raises(DataError, match=r"Every video is too small for data.resolution=\[128\].*data.upscale=true"):
        prepared(resolution=128)
    assert prepared(resolution=128, upscale=True)[0].items


# ---- once, and the same whoever asks ----


def test_nothing_is_encoded_twice(prepared, folder, tmp_path):
    _, family = prepared(val_count=0)
    assert sorted(family.clips) == [(1, 3, 4, 48, 80)] * 2 + [(1, 3, 4, 64, 64)] * 8
    assert family.loaded == ["vae", "text"]
    for suffix in ("mkv", "txt"):
        (folder / f"0.{suffix}").rename(folder / f"renamed.{suffix}")
    assert prepared(val_count=1)[1].loaded == []
    assert len(prepared(val_count=0, weights="others")[1].clips) == 10
    assert sorted(prepared(val_count=0, frames=8)[1].clips) == [(1, 3, 8, 48, 80)] + [(1, 3, 8, 64, 64)] * 4
    for entry in (tmp_path / "cache" / "clip").rglob("*.safetensors"):
        entry.write_bytes(entry.read_bytes()[:-8])
    assert len(prepared(val_count=0)[1].clips) == 10


def test_a_second_start_decodes_nothing(make, monkeypatch):
    first = make()
    monkeypatch.setattr("charforgex.data.clips.measure", lambda path: pytest.fail("decoded again"))
    assert make()._windows == first._windows


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_any_number_of_workers_first_step_and_share(prepared):
    settings = {"batch_size": 2, "flip": True, "caption_dropout": 0.3}
    data, _ = prepared(**settings)
    wanted = [flat(data.batch(step)) for step in range(12)]
    other, _ = prepared(num_workers=2, **settings)
    assert [flat(batch) for batch in other.train_dataloader(range(3, 12))] == wanted[3:]
    assert [flat(batch) for batch in data.train_dataloader([1, 7])] == [wanted[1], wanted[7]]
    assert {caption for batch in wanted for caption in batch[-1]} >= {"", "zkx nods"}
    assert data.final_prompts(4) == [caption for batch in wanted[:2] for caption in batch[-1]]
    assert data.epoch_batches() == 4 and torch.isfinite(data.text("zkx jumps").tokens_BLD).all()  # 8 clips to train on


# ---- manifests ----


def described(folder, name="clips.jsonl", facts=None, **changes):
    records = [
        Record(
            f"{n}.mkv", sha256_file(folder / f"{n}.mkv"), 64, 64, (f"zkx nods, number {n}",), "val" if n == 3 else "train",
            facts={"frames": 8, "fps": 8.0} if facts is None else facts, **changes,
        )
        for n in range(4)
    ]  # fmt: skip
    Manifest(folder, tuple(records)).write(folder / name)
    return folder / name


def test_curated_clips_are_taken_whole(prepared, folder):
    data, _ = prepared(source=described(folder), frames=8)
    assert {item.frames for item in data.items} == {tuple(range(8))} and len(data.items) == 3
    assert [record.path for record in data.val] == ["3.mkv"]
    (held_out,) = data.validation()
    clip = np.stack([picture(n, video=3) for n in range(8)])
    assert torch.equal(held_out.mean_BChw, AnimateDiff().encode_pixels(BASE, to_pixels(clip))[0])
    assert held_out.captions == ("zkx nods, number 3",)
    assert prepared(source=folder, frames=8)[1].clips == [(1, 3, 8, 48, 80)]  # which the manifest has not; the rest is there


def test_a_manifest_must_be_one_of_clips_that_are_true(make, prepared, folder):
    with pytest.raises(DataError, match=r"0.mkv does not say how many frames .* choose another family"):
        make(described(folder, facts={}))
    with pytest.raises(DataError, match=r"0.mkv \(it has 8 frames in 1.00 seconds; a clip of data.frames=16 at data.fps=8 takes 2.00\)"):
        make(described(folder), frames=16)
    with pytest.raises(DataError, match="val_count=1 has no effect"):
        make(described(folder), val_count=1)
    with pytest.raises(DataError, match=r"has fewer frames than it is said to have, 16"):
        prepared(source=described(folder, facts={"frames": 16, "fps": 8}), frames=16)
    with pytest.raises(DataError, match=r"takes pictures; experiment=animatediff_motion takes clips"):
        CharacterData(described(folder), folder / "c", 64)
    lines = [json.loads(line) | {"width": 80} for line in described(folder).read_text().splitlines()]
    (folder / "wrong.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=r"is 64 x 64 pixels, not 80 x 64"):
        prepared(source=folder / "wrong.jsonl", frames=8)


# ---- what cannot be used ----


def test_what_cannot_be_used_is_said_by_name(make, folder):
    film(folder / "short.mkv", [Fraction(1, 8)] * 3)
    film(folder / "one.mkv", [Fraction(1, 8)])
    film(folder / "tiny.mkv", [Fraction(1, 8)] * 9, size=(12, 40))
    film(folder / "broken.mkv", [Fraction(1, 8)] * 40)
    (folder / "broken.mkv").write_bytes((folder / "broken.mkv").read_bytes()[:3000])
    (folder / "not.mp4").write_bytes(b"not a video" * 50)
    shutil.copy(folder / "0.mkv", folder / "twin.mkv")
    (folder / "lonely.txt").write_text("nobody")
    problems = dict(make().problems)
    assert problems["short.mkv"] == "it has 3 frames in 0.38 seconds; a clip of data.frames=4 at data.fps=8 takes 0.50"
    assert problems["one.mkv"].startswith("it has 1 frame in")
    assert problems["tiny.mkv"] == "its size is 40 x 12; sides below 16 pixels are too small"
    assert "ffmpeg -i broken.mkv" in problems["broken.mkv"]
    assert "no video" in problems["not.mp4"]
    assert problems["twin.mkv"].startswith("it is the same file as 0.mkv")
    assert problems["lonely.txt"] == "no video has this name" and len(problems) == 7


def test_a_video_that_changes_its_size_is_refused(make, folder, monkeypatch):
    """As broadcasts do; no writer here makes one."""
    shown = [Frame(picture(0, size), Fraction(n), Fraction(1)) for n, size in enumerate([(64, 64), (64, 64), (48, 64)])]
    monkeypatch.setattr("charforgex.videos.frames", lambda path: iter(shown))
    with pytest.raises(DataError, match=r"0.mkv \(its frames have several sizes, 64 x 64 and 64 x 48\)"):
        make()


def test_refusals(make, prepared, folder, tmp_path):
    with pytest.raises(DataError, match=r"There is no folder or manifest .*nowhere"):
        make(tmp_path / "nowhere")
    with pytest.raises(DataError, match="neither a folder of videos nor a manifest"):
        make(folder / "0.mkv")
    with pytest.raises(DataError, match=r"val_count=4 of 5 usable videos: choose 0 to 3"):
        make(val_count=4)
    with pytest.raises(ConfigError, match=r"data.resolution=\[\] names no resolution"):
        make(resolution=[])
    with pytest.raises(DataError, match=r'The trigger "ohwx" is absent from 5 captions'):
        make(trigger="ohwx")
    (folder / "0.txt").unlink()
    with pytest.raises(DataError, match=r"1 of 5 videos have no caption: 0.mkv"):
        make()
    assert make(default_caption="zkx").train
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no video, such as .mp4"):
        make(tmp_path / "empty")
    film(tmp_path / "empty" / "short.mkv", [Fraction(1, 8)] * 3)
    with pytest.raises(
        DataError, match=r"empty has no clip of data.frames=4 at data.fps=8 to train on. Not usable are short.mkv \(it has 3"
    ):
        make(tmp_path / "empty")
    data = make(default_caption="zkx")
    with pytest.raises(ConfigError, match="family=sdxl makes pictures, and clips are for families of clips"):
        data.prepare(Sdxl(), lambda only: pytest.fail(), weights={"vae": "v", "text": "t"}, progress=False, **GEOMETRY)
    film(folder / "1.mkv", [Fraction(1, 8)] * 8, video=9)
    with pytest.raises(DataError, match=r"1.mkv was changed after it was read"):
        data.prepare(Counting(), lambda only: BASE, weights={"vae": "v", "text": "t"}, progress=False, **GEOMETRY)


def test_of_one_video_its_last_clips_are_held_out(prepared, make, tmp_path):
    film(tmp_path / "one" / "film.mkv", [Fraction(1, 8)] * 40)
    data, _ = prepared(source=tmp_path / "one")
    assert len(data.items) == 8 and [item.frames for item in data.val_items] == [(32, 33, 34, 35), (36, 37, 38, 39)]
    assert data.notes == ["the last 2 of the 10 clips of film.mkv are held out; with three videos or more, whole ones are"]
    assert sum(map(len, data.validation())) == 2 and [clip[0, 0, -1, 0] for clip in data.references()] == [32, 36]
    assert make(tmp_path / "one", val_count=0).val == ()
    assert make(tmp_path / "one", frames=40).notes == ["no clip is held out: there is 1 in all; give three videos or more"]
