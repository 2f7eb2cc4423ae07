"""Frames and their times in and out again; sound stays in sync; nothing is left of what failed."""

import json
from fractions import Fraction

import cv2
import numpy as np
import pytest

from charforgex.errors import ConfigError, DataError
from charforgex.filming import Output, check_output, comment_of, writing
from charforgex.videos import clock, frames

av = pytest.importorskip("av")
RATE = Fraction(30000, 1001)
SAMPLES = 48_000


def picture(number: int, size=(48, 64)) -> np.ndarray:
    """A field of soft colours, another for each number."""
    coarse = np.random.default_rng(number).integers(40, 216, (3, 4, 3)).astype(np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)


def make(path, numbers=range(6), size=(48, 64), codec=None, rate=RATE, gaps=None, sound=None, comment=""):
    """A video with the writer; `gaps` is how long each frame lasts, in frames."""
    gaps = gaps or [1] * len(numbers)
    with writing(Output(path, rate, rate.numerator, codec, sound=sound, comment=comment)) as out:
        time = Fraction(0)
        for number, gap in zip(numbers, gaps, strict=True):
            out.write(picture(number, size), time, gap / rate)
            time += gap / rate
    return path


def beeping(path, at, seconds=2, offset=0, name="aac"):
    """A video of ten frames a second with sound that begins at `at` seconds; the video's own clock begins `offset` seconds late."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = out.add_stream(name, rate=SAMPLES, layout="mono")
        samples = np.where(np.arange(seconds * SAMPLES) >= at * SAMPLES, 0.5, 0.0).astype(np.float32)
        samples *= np.sin(np.arange(len(samples)) * 0.2).astype(np.float32)
        for start in range(0, len(samples), 1024):
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = SAMPLES, start, Fraction(1, SAMPLES)
            out.mux(audio.encode(frame))
        out.mux(audio.encode())
        for index in range(int((seconds - offset) * 10)):
            frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24")
            frame.pts, frame.time_base = index + int(offset * 10), Fraction(1, 10)
            out.mux(video.encode(frame))
        out.mux(video.encode())
    return path


def loud_at(path) -> float:
    """When the sound begins, in seconds after the first picture."""
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        start = float((video.start_time or 0) * video.time_base)
        for frame in container.decode(audio):
            loud = np.flatnonzero(np.abs(frame.to_ndarray().astype(np.float32)).max(0) > 0.05)
            if len(loud):
                return frame.time + loud[0] / SAMPLES - start
    raise AssertionError("it is silent")


@pytest.mark.parametrize(
    ("name", "codec", "near"),
    [("a.mp4", None, 3), ("a.mp4", "h265", 4), ("a.mkv", "h264", 3), ("a.webm", None, 6), ("a.mp4", "av1", 8), ("a.mov", None, 3)],
)
def test_frames_come_back_with_their_times_and_colours(tmp_path, name, codec, near):
    found = list(frames(make(tmp_path / name, codec=codec)))
    tick = Fraction(1, 1000) if name.endswith(("mkv", "webm")) else 0  # what Matroska rounds to
    assert len(found) == 6
    for index, frame in enumerate(found):
        assert abs(frame.time - index / RATE) <= tick and frame.pixels.shape == (48, 64, 3)
        assert np.abs(frame.pixels.astype(int) - picture(index)).mean() < near
    assert clock(tmp_path / name).rate == pytest.approx(float(RATE), rel=2e-3)


def test_frames_of_uneven_length_keep_it(tmp_path):
    found = list(frames(make(tmp_path / "a.mp4", range(4), gaps=[1, 3, 2, 5])))
    assert [frame.time * RATE for frame in found] == [0, 1, 4, 6] and [frame.lasts * RATE for frame in found[:3]] == [1, 3, 2]
    with av.open(str(make(tmp_path / "even.mp4", range(11)))) as container:
        stream = container.streams.video[0]
        assert stream.duration * stream.time_base * RATE == 11


def test_odd_sizes_and_one_frame(tmp_path):
    (frame,) = frames(make(tmp_path / "a.mp4", [7], size=(35, 41)))
    assert frame.pixels.shape == (36, 42, 3) and frame.lasts == 1 / RATE
    assert np.abs(frame.pixels[:35, :41].astype(int) - picture(7, (35, 41))).mean() < 4


def test_ffv1_keeps_every_pixel_and_the_same_frames_are_the_same_file(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 35, 41, 3)).astype(np.uint8)
    for name in ("a.mkv", "b.mkv"):
        with writing(Output(tmp_path / name, Fraction(8), 1000, "ffv1")) as out:
            for index, pixels in enumerate(noise):
                out.write(pixels, Fraction(index, 8), Fraction(1, 8))
    found = list(frames(tmp_path / "a.mkv"))
    assert (np.stack([frame.pixels for frame in found]) == noise).all()
    assert [frame.time for frame in found] == [Fraction(index, 8) for index in range(4)]
    assert (tmp_path / "a.mkv").read_bytes() == (tmp_path / "b.mkv").read_bytes()


def test_gif_and_apng_and_a_folder(tmp_path):
    from PIL import Image

    for name, near in (("a.gif", 12), ("a.apng", 0)):
        with Image.open(make(tmp_path / name, size=(35, 41))) as moving:
            assert moving.n_frames == 6 and moving.size == (41, 35) and moving.info["loop"] == 0
            moving.seek(4)
            assert np.abs(np.asarray(moving.convert("RGB")).astype(int) - picture(4, (35, 41))).mean() <= near
    folder = make(tmp_path / "frames", comment="from a test")
    told = json.loads((folder / "frames.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == [*(f"{number:06d}.png" for number in range(1, 7)), "frames.json"]
    assert told["comment"] == "from a test" and told["times"][5] == pytest.approx(float(5 / RATE))
    assert (np.asarray(Image.open(folder / "000003.png")) == picture(2)).all()
    with pytest.raises(ConfigError, match="frames exists; name a new folder"):
        make(folder)


@pytest.mark.parametrize("offset", [0, 0.5])
def test_sound_is_taken_over_and_stays_where_it_was(tmp_path, offset):
    source = beeping(tmp_path / "source.mkv", at=1.2, offset=offset)
    before = loud_at(source)
    assert before == pytest.approx(1.2 - offset, abs=0.06)
    for name in ("out.mp4", "out.mkv"):
        make(tmp_path / name, range(12), sound=source, rate=Fraction(10))
        assert loud_at(tmp_path / name) == pytest.approx(before, abs=0.03)
    with pytest.raises(ConfigError, match=r"out\.webm cannot hold the sound of source\.mkv \(aac\); choose \.mkv, or say sound=false"):
        make(tmp_path / "out.webm", range(2), sound=source)


def test_sound_that_is_damaged_is_said_in_one_line(tmp_path):
    """Its times run backwards: the head of a block of Matroska's second track has the time in bytes 4 and 5."""
    data = beeping(tmp_path / "source.mkv", at=0, seconds=1, name="pcm_s16le").read_bytes()
    pieces = data.split(b"\xa3\x48\x04\x82")
    assert len(pieces) > 30
    pieces[20] = b"\xff\x00" + pieces[20][2:]  # 256 before its cluster begins
    (tmp_path / "broken.mkv").write_bytes(b"\xa3\x48\x04\x82".join(pieces))
    with pytest.raises(DataError, match=r"broken\.mkv: its sound is damaged: .*; say sound=false, or write what is left"):
        make(tmp_path / "out.mkv", range(12), sound=tmp_path / "broken.mkv", rate=Fraction(10))
    assert not (tmp_path / "out.mkv").exists()


def test_a_comment_and_a_video_without_sound(tmp_path):
    silent = make(tmp_path / "silent.mp4")
    with av.open(str(make(tmp_path / "a.mp4", sound=silent, comment="4x, by a test"))) as container:
        assert container.metadata["comment"] == "4x, by a test" and not container.streams.audio


def test_what_fails_leaves_nothing_and_harms_nothing(tmp_path):
    make(tmp_path / "a.mp4", [1])
    before = (tmp_path / "a.mp4").read_bytes()
    for name in ("a.mp4", "new.gif", "folder"):
        with pytest.raises(RuntimeError), writing(Output(tmp_path / name, RATE, RATE.numerator)) as out:
            out.write(picture(0), Fraction(0), 1 / RATE)
            raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "codec", "said"),
    [
        ("a.txt", None, "a video ends in one of .mp4"),
        ("a.webm", "h264", "holds vp9, av1"),
        ("a.gif", "h264", "no choice of codecs"),
    ],
)
def test_what_does_not_go_together_is_refused_first(tmp_path, name, codec, said):
    with pytest.raises(ConfigError, match=said):
        check_output(tmp_path / name, codec)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.gif", "a.apng", "frames"])
def test_every_format_says_what_it_is(tmp_path, name):
    said = json.dumps({"prompt": "a café, <lora:x:1> \\ 'quoted'\n" * 30})
    path = make(tmp_path / name, range(3), comment=said)
    assert comment_of(path) == said
    assert comment_of(make(tmp_path / f"silent-{name}", range(2))) is None
    if name == "frames":
        assert comment_of(path / "000002.png") == said


def test_a_gif_has_one_palette_and_does_not_flicker(tmp_path):
    """A still half beside a moving one: its pixels are the same in all frames, and near what they were."""
    from PIL import Image

    still = cv2.resize(picture(1), (64, 64), interpolation=cv2.INTER_CUBIC)
    made = [np.concatenate([still, np.roll(cv2.resize(picture(2), (64, 64)), 5 * number, 1)], 1) for number in range(5)]
    with writing(Output(tmp_path / "a.gif", Fraction(8), 8)) as out:
        for number, pixels in enumerate(made):
            out.write(pixels, Fraction(number, 8), Fraction(1, 8))
    with Image.open(tmp_path / "a.gif") as moving:
        shown, waits = [], []
        for number in range(moving.n_frames):
            moving.seek(number)
            waits.append(moving.info["duration"])
            shown.append(np.asarray(moving.convert("RGB")).astype(int))
    assert len(shown) == 5 and sum(waits[:4]) == 500
    assert all((frame[:, :64] == shown[0][:, :64]).all() for frame in shown)
    assert len(np.unique(np.concatenate(shown).reshape(-1, 3), axis=0)) <= 256
    assert max(np.abs(frame - pixels).mean() for frame, pixels in zip(shown, made, strict=True)) < 6


def test_few_colours_are_kept_as_they_are(tmp_path):
    from charforgex.gifs import MOST_SAMPLES, Palette, Spool

    flat = np.zeros((16, 16, 3), np.uint8)
    flat[4:12, 4:12] = (200, 40, 90)
    spool = Spool()
    for number in range(2 * MOST_SAMPLES + 3):
        spool.add(flat, Fraction(number), Fraction(1))
    assert len(spool.samples) <= MOST_SAMPLES and spool.step == 4
    assert all((pixels == flat).all() for pixels, _, _ in spool.frames())
    spool.close()
    palette = Palette(flat)
    places = palette.frame(flat).to_ndarray()
    shown = palette.colours[places[0] if isinstance(places, tuple) else places]
    assert (shown == flat).all()
