"""Videos of others: what they show, upright and in time, and what is said of those that cannot be read."""

import struct
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from charforgex.errors import CharForgeError, DataError
from charforgex.videos import frames
from tests.test_filming import SAMPLES, beeping, make, picture

av = pytest.importorskip("av")


def test_turned_videos_are_upright(tmp_path):
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
    (tmp_path / "folder.mp4").mkdir()
    for suffix in ("mkv", "webm"):
        data = make(tmp_path / f"a.{suffix}", range(40)).read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(data[: len(data) * 3 // 4])
    for name in ("cut.mp4", "cut.mkv", "cut.webm", "text.mp4", "empty.mp4", "gone.mp4", "folder.mp4"):
        with pytest.raises(DataError) as caught:
            list(frames(tmp_path / name))
        assert name in str(caught.value) and "\n" not in str(caught.value)
        assert name[:3] != "cut" or "ffmpeg -i" in str(caught.value)


def test_sound_alone_is_no_video_even_with_a_cover(tmp_path):
    from av.stream import Disposition

    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        audio = out.add_stream("aac", rate=SAMPLES, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = SAMPLES
        out.mux(audio.encode(frame))
        out.mux(audio.encode())
    with av.open(str(tmp_path / "sound.mp4")) as source, av.open(str(tmp_path / "cover.m4a"), "w", format="mp4") as out:
        cover, sound = out.add_stream("mjpeg"), out.add_stream_from_template(source.streams.audio[0])
        cover.width, cover.height, cover.pix_fmt, cover.disposition = 64, 48, "yuvj420p", Disposition.attached_pic
        for packet in (packet for packet in source.demux() if packet.size):
            packet.stream = sound
            out.mux(packet)
        out.mux([*cover.encode(av.VideoFrame.from_ndarray(picture(1), format="rgb24")), *cover.encode()])
    for name in ("sound.mp4", "cover.m4a"):
        with pytest.raises(DataError, match="no moving pictures, only sound"):
            list(frames(tmp_path / name))


def test_of_what_was_cut_without_being_encoded_anew_the_shown_frames_come(tmp_path):
    """An edit list that leaves out four frames at the beginning, on which others build, and six at the end."""
    data = bytearray(make(tmp_path / "a.mp4", range(20), rate=Fraction(25)).read_bytes())
    place = data.index(b"elst") + 4 + 8  # version and count: then how long it is shown, in thousandths, and from when on
    lasts, since = struct.unpack(">Ii", data[place : place + 8])
    assert lasts == 800
    ticks = struct.unpack(">I", data[data.index(b"mdhd") + 16 :][:4])[0]
    data[place : place + 8] = struct.pack(">Ii", 400, since + ticks * 4 // 25)
    (tmp_path / "cut.mp4").write_bytes(data)
    found = list(frames(tmp_path / "cut.mp4"))
    assert [frame.time * 25 for frame in found] == list(range(10))
    assert all(np.abs(frame.pixels.astype(int) - picture(4 + index)).mean() < 4 for index, frame in enumerate(found))


def test_a_video_may_begin_late(tmp_path):
    """Matroska says when it ends, not how long it is."""
    found = list(frames(beeping(tmp_path / "late.mkv", at=1, seconds=5, offset=2.5)))
    assert len(found) == 25 and found[0].time == 0 and found[-1].time == pytest.approx(2.4, abs=2e-3)


@pytest.mark.parametrize("suffix", ["gif", "png"])
def test_what_is_transparent_is_on_white(tmp_path, suffix):
    shown = [Image.fromarray(np.dstack([picture(number), np.full((48, 64), 255, np.uint8)])) for number in range(3)]
    for one in shown:
        one.paste((0, 0, 0, 0), (0, 0, 32, 48))
    path = tmp_path / f"a.{suffix}"
    shown[0].save(path, save_all=True, append_images=shown[1:], duration=[100, 300, 200], disposal=2 if suffix == "gif" else 1, loop=0)
    found = list(frames(path))
    assert [float(frame.time) for frame in found] == [0, 0.1, 0.4]
    assert all((frame.pixels[:, :31] == 255).all() for frame in found)
    assert all(np.abs(frame.pixels[:, 33:].astype(int) - picture(number)[:, 33:]).mean() < 9 for number, frame in enumerate(found))


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
