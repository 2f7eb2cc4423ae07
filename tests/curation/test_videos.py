"""Frames of videos: the sharpest of each scene, upright, in the right colours; and what broken files still give."""

import struct
import sys
import tempfile
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest

from charforgex.curation.pictures import MAX_PIXELS
from charforgex.curation.videos import VideoSettings, choose, items

av = pytest.importorskip("av")
SETTINGS = VideoSettings()
RATE = 10
SECONDS = 3  # of a scene


def scene(number: int) -> np.ndarray:
    """(64, 96, 3) coarse squares in shades of one colour, with fine lines in them."""
    shades = np.kron(np.random.default_rng(number).integers(60, 160, (8, 12, 1)), np.ones((8, 8, 1), int))
    colour = [(1.0, 0.5, 0.3), (0.3, 0.6, 1.0), (0.5, 1.0, 0.4)][number % 3]
    return (shades * colour + 16 * (np.arange(64) % 2)[:, None, None]).astype(np.uint8)


def frames(scenes=2, sharp=(12, 45)):
    """Three seconds a scene; all frames are blurred but those in `sharp`."""
    for index in range(scenes * SECONDS * RATE):
        pixels = np.roll(scene(index // (SECONDS * RATE)), index % 3, 1)
        yield pixels if index in sharp else cv2.GaussianBlur(pixels, (0, 0), 1.5)


def encode(path, pictures, codec="mpeg4", options=None):
    with av.open(str(path), "w", options=options or {}) as out:
        stream = out.add_stream(codec, rate=RATE)
        stream.pix_fmt, stream.bit_rate, stream.gop_size, stream.width, stream.height = "yuv420p", 2_000_000, 10, 96, 64
        for pixels in pictures:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    return path


@cache
def clip(suffix: str, codec: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        options = {"movflags": "+faststart"} if suffix == "mp4" else {}
        return encode(Path(folder, f"clip.{suffix}"), frames(), codec, options).read_bytes()


def opened(tmp_path, data, name="clip.mp4", settings=SETTINGS, max_pixels=MAX_PIXELS):
    (tmp_path / name).write_bytes(data)
    found = list(items(tmp_path / name, name, settings, max_pixels))
    assert found[-1].name == name and all(item.picture for item in found[:-1])
    assert len({item.name for item in found}) == len(found)
    return {item.name.removeprefix(f"{name}!/"): item for item in found}


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "mpeg4"), ("mkv", "mpeg4"), ("webm", "libvpx"), ("mov", "mpeg4")])
def test_the_sharpest_of_each_scene(tmp_path, suffix, codec):
    name = f"clip.{suffix}"
    found = opened(tmp_path, clip(suffix, codec), name, VideoSettings(per_scene=1))
    assert list(found) == ["000001.200s", "000004.500s", name]
    assert found[name].verdict == ("container", "2 of 60 frames are used, scenes: 2")
    for index, item in enumerate(list(found.values())[:-1]):
        assert item.picture.mode == "RGB" and item.picture.size == (96, 64)
        wanted = cv2.blur(np.roll(scene(index), (12, 45)[index] % 3, 1), (5, 5)).astype(int)
        assert np.abs(cv2.blur(np.asarray(item.picture), (5, 5)) - wanted).mean() < 12  # of 255, lossy


def test_the_gap_and_the_caps(tmp_path):
    data = clip("mkv", "mpeg4")
    times = [float(name[:-1]) for name in opened(tmp_path, data, "c.mkv", VideoSettings(gap=0.5, per_scene=4)) if name != "c.mkv"]
    for first in (0, 3):
        inside = [time for time in times if first <= time < first + 3]
        assert len(inside) == 4 and min(np.diff(inside)) >= 0.5 - 1e-6
    capped = opened(tmp_path, data, "c.mkv", VideoSettings(gap=0.5, per_scene=4, max_frames=2))
    assert list(capped) == ["000001.200s", "000004.500s", "c.mkv"]  # each scene's best come first
    short = opened(tmp_path, data, "c.mkv", VideoSettings(max_minutes=2 / 60))
    assert max(list(short)[:-1]) <= "000002.000s" and short["c.mkv"].verdict.kind == "too_large"
    assert "longer than 0.0333333 minutes" in short["c.mkv"].verdict.reason
    assert opened(tmp_path, data, "c.mkv", max_pixels=6143)["c.mkv"].verdict.kind == "too_large"


def test_choosing_is_greedy_by_sharpness():
    times, sharp, scenes = [0, 0.4, 1.0, 1.5, 9], [5, 9, 8, 7, 1], [0, 0, 0, 0, 1]
    assert choose(times, sharp, scenes, VideoSettings(gap=1.0, per_scene=3)) == {1, 3, 4}
    assert choose(times, sharp, scenes, VideoSettings(gap=0.5, per_scene=2)) == {1, 2, 4}
    assert choose(times, sharp, scenes, VideoSettings(gap=0.1, per_scene=9, max_frames=2)) == {1, 4}
    assert choose([], [], [], SETTINGS) == set()


def test_a_dissolve_is_a_new_scene_and_shaking_is_none(tmp_path):
    a, b = scene(1), scene(2)
    dissolve = [cv2.addWeighted(a, 1 - share, b, share, 0) for share in np.clip((np.arange(60) - 15) / 30, 0, 1)]
    found = opened(tmp_path, encode(tmp_path / "d.mkv", dissolve).read_bytes(), "d.mkv")
    assert not found["d.mkv"].verdict.reason.endswith("scenes: 1")
    shaken = [cv2.GaussianBlur(np.roll(a, (7 * index % 5, 3 * index % 5), (0, 1)), (0, 0), 0.5 + index % 3) for index in range(30)]
    found = opened(tmp_path, encode(tmp_path / "s.mkv", shaken).read_bytes(), "s.mkv")
    assert "scenes: 1" in found["s.mkv"].verdict.reason


# The top of the picture is the first letter; what FFmpeg's display matrix of a phone does to it.
TURNS = {
    "upright": ((1, 0, 0, 1), lambda a: a),
    "clockwise": ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),
    "half": ((-1, 0, 0, -1), lambda a: np.rot90(a, 2)),
    "counterclockwise": ((0, -1, 1, 0), lambda a: np.rot90(a, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda a: a[:, ::-1]),
    "mirrored_clockwise": ((0, 1, 1, 0), lambda a: a.swapaxes(0, 1)),
}


@pytest.mark.parametrize("name", TURNS)
def test_rotation_metadata_is_applied(tmp_path, name):
    (a, b, c, d), turned = TURNS[name]
    upright = np.zeros((64, 96, 3), np.uint8)
    upright[:32, :48], upright[:32, 48:], upright[32:, :48] = (200, 30, 30), (30, 200, 30), (30, 30, 200)
    data = bytearray(encode(tmp_path / "r.mp4", [upright] * 5).read_bytes())
    at = data.index(b"tkhd") + 44  # the matrix of a track header, version 0 (ISO/IEC 14496-12)
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    picture = next(iter(opened(tmp_path, bytes(data)).values())).picture
    wanted = turned(upright)
    assert picture.size == wanted.shape[1::-1]
    assert np.abs(np.asarray(picture).astype(int) - wanted)[8:-8:4, 8:-8:4].mean() < 8


def test_colours_follow_the_standard_that_a_frame_names(tmp_path):
    for colorspace, luma in ((1, (0.2126, 0.7152)), (5, (0.299, 0.587))):  # BT.709, BT.601
        red, green = luma
        frame = av.VideoFrame(96, 64, "yuv420p")
        colour = np.array([180, 60, 40]) / 255
        y = colour @ [red, green, 1 - red - green]
        values = 16 + 219 * y, 128 + 112 * (colour[2] - y) / (red + green), 128 + 112 * (colour[0] - y) / (1 - red)
        for plane, value in zip(frame.planes, values, strict=True):
            plane.update(bytes([round(value)]) * plane.buffer_size)
        with av.open(str(tmp_path / "c.mkv"), "w") as out:
            stream = out.add_stream("mpeg4", rate=RATE)
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 96, 64, "yuv420p", 2_000_000
            stream.codec_context.colorspace = colorspace
            out.mux(stream.encode(frame))
            out.mux(stream.encode())
        picture = next(iter(opened(tmp_path, (tmp_path / "c.mkv").read_bytes(), "c.mkv").values())).picture
        assert np.abs(np.asarray(picture)[30, 40].astype(int) - [180, 60, 40]).max() <= 4


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "mpeg4"), ("mkv", "mpeg4"), ("webm", "libvpx"), ("avi", "mpeg4")])
def test_a_file_that_breaks_off_gives_what_came_before(tmp_path, suffix, codec):
    data, name, before = clip(suffix, codec), f"c.{suffix}", 0
    for tenth in (0, 1, 3, 5, 7, 8):
        found = opened(tmp_path, data[: len(data) * tenth // 10] or b"\0", name)
        assert found[name].verdict.kind == "corrupt" and found[name].verdict.reason
        assert len(found) >= before or suffix == "webm"
        before = len(found)
    assert before >= 4


def test_damage_inside_is_told_and_hides_nothing_behind_it(tmp_path):
    data = bytearray(clip("mkv", "mpeg4"))
    start = len(data) // 3
    data[start : start + 400] = bytes(400)
    found = opened(tmp_path, bytes(data), "c.mkv")
    assert any(name < "000002.000s" for name in list(found)[:-1]) and any(name > "000003.000s" for name in list(found)[:-1])


PLAYLISTS = {
    "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://127.0.0.1:1/a.ts\n#EXT-X-ENDLIST\n",
    "chain": b"ffconcat version 1.0\nfile good.mkv\n",
    "session": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
    "list": b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"></MPD>',
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_files_that_name_other_files_are_not_followed(tmp_path, name):
    (tmp_path / "good.mkv").write_bytes(clip("mkv", "mpeg4"))
    found = opened(tmp_path, PLAYLISTS[name], "x.mp4")
    assert list(found) == ["x.mp4"] and found["x.mp4"].verdict.kind == "corrupt"


def test_sound_alone_is_unsupported(tmp_path):
    with av.open(str(tmp_path / "s.mkv"), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        out.mux(stream.encode(sound))
    assert opened(tmp_path, (tmp_path / "s.mkv").read_bytes(), "s.mkv")["s.mkv"].verdict.kind == "unsupported"


def test_the_same_file_gives_the_same_frames(tmp_path):
    one, two = (opened(tmp_path, clip("mkv", "mpeg4"), "c.mkv") for _ in range(2))
    assert [(n, i.picture and i.picture.tobytes()) for n, i in one.items()] == [
        (n, i.picture and i.picture.tobytes()) for n, i in two.items()
    ]


def test_without_pyav_the_way_to_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    found = opened(tmp_path, b"anything")
    assert found["clip.mp4"].verdict.kind == "unsupported" and "charforgex[video]" in found["clip.mp4"].verdict.reason
