"""Videos of others: what they show, upright and in time, and what is said of those that cannot be read."""

import sys

import numpy as np
import pytest

from charforgex.errors import CharForgeError, DataError
from charforgex.videos import frames
from tests.test_filming import SAMPLES, make, picture

av = pytest.importorskip("av")


def test_turned_videos_are_upright(tmp_path):
    import struct

    make(tmp_path / "a.mp4", [3])
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    place = data.index(b"tkhd") + 4 + 40  # version, times, id, and layer: then nine numbers, the display matrix
    assert struct.unpack(">9i", data[place : place + 36]) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    data[place : place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    (frame,) = frames(tmp_path / "turned.mp4")
    assert frame.pixels.shape == (64, 48, 3)
    assert np.abs(frame.pixels.astype(int) - np.rot90(picture(3), -1)).mean() < 4


def test_what_breaks_off_or_is_no_video_is_said_in_one_line(tmp_path):
    data = make(tmp_path / "whole.mp4", range(90)).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    (tmp_path / "text.mp4").write_text("no video at all")
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("cut", "text", "empty", "gone"):
        with pytest.raises(DataError) as caught:
            list(frames(tmp_path / f"{name}.mp4"))
        assert f"{name}.mp4" in str(caught.value) and "\n" not in str(caught.value)
    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        audio = out.add_stream("aac", rate=SAMPLES, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = SAMPLES
        out.mux(audio.encode(frame))
        out.mux(audio.encode())
    with pytest.raises(DataError, match="no pictures, only sound"):
        list(frames(tmp_path / "sound.mp4"))


def test_without_pyav_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(CharForgeError, match=r"pip install 'charforgex\[video\]'"):
        list(frames(tmp_path / "a.mp4"))


def test_memory_does_not_grow_with_length(tmp_path):
    """Frames of 0.4 MB each."""
    import resource

    def peak(count):
        path = make(tmp_path / f"{count}.mp4", [0] * count, size=(360, 384))
        for _ in frames(path):
            pass
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before = peak(150)
    assert peak(450) - before < 60  # MiB; 300 frames more are 119
