"""Frames between frames: where they belong, at the right times, never across a cut, with the sound where it was."""

import json
from fractions import Fraction
from itertools import pairwise

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import charforgex
from charforgex import cli
from charforgex.config import compose
from charforgex.errors import CharForgeError, ConfigError
from charforgex.generation.between import by_network, dis, linear, started
from charforgex.generation.ifnet import IFNet, Layout
from charforgex.generation.interpolate import as_rate, divided, evenly, interpolate, smooth
from charforgex.videos import Frame, clock, frames
from tests.test_filming import beeping, loud_at, make

av = pytest.importorskip("av")


def field(seed: int, size=256) -> np.ndarray:
    """A texture with coarse and fine parts, float32 in [0, 255]."""
    draw = np.random.default_rng(seed)
    parts = [(6, 1.0), (24, 0.5), (64, 0.25)]
    layers = [cv2.resize(draw.random((n, n, 3), np.float32), (size, size), interpolation=cv2.INTER_CUBIC) * share for n, share in parts]
    total = sum(layers)
    return (total - total.min()) / (total.max() - total.min()) * 255


def moving(time: float, size=(96, 128)) -> np.ndarray:
    """A disc with a texture that goes 16 pixels to the right while what is behind it goes two up."""
    height, width = size
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    behind = cv2.warpAffine(field(1), np.float32([[1, 0, 40], [0, 1, 40 + 2 * time]]), (width, height), flags=flags)
    disc = cv2.warpAffine(field(2), np.float32([[1, 0, 60 - 16 * time], [0, 1, 60]]), (width, height), flags=flags)
    y, x = np.mgrid[:height, :width]
    mask = np.clip(25 - np.hypot(x - 45 - 16 * time, y - 48) + 0.5, 0, 1)[..., None]
    return (behind * (1 - mask) + disc * mask).round().astype(np.uint8)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(((found.astype(float) - wanted) ** 2).mean())


def clip(pictures, step=Fraction(1, 10)):
    return [Frame(picture, index * step, step) for index, picture in enumerate(pictures)]


@pytest.mark.parametrize("time", [0.25, 0.5, 0.8])
def test_the_flow_puts_things_where_they_are_at_that_time(time):
    found, blended = dis(moving(0), moving(1), [time])[0], linear(moving(0), moving(1), [time])[0]
    assert found.dtype == np.uint8 and found.shape == (96, 128, 3)
    assert error(found, moving(time)) < 0.3 * error(blended, moving(time))


def test_what_comes_in_at_the_edge_is_taken_from_the_frame_that_shows_it():
    """A pan of 12 pixels: at three quarters of the way, 9 columns are seen in the second frame alone, and 3 in the first one."""
    first, truth, second = (field(3)[:96, left : left + 128].astype(np.uint8) for left in (0, 9, 12))
    found = dis(first, second, [0.75])[0]
    for side in (np.s_[:, -7:], np.s_[:, :2]):  # but for the columns that lie on the edge between
        assert error(found[side], truth[side]) < 0.1 * error(linear(first, second, [0.75])[0][side], truth[side])
    flow, logit = np.split(started(first, second, [0.75])[0], [4])
    np.testing.assert_allclose(flow[:, 20:-20, 20:-20].mean((1, 2)), (9, 0, -3, 0), atol=0.1)
    shares = 1 / (1 + np.exp(-logit[0, 20:-20]))
    assert shares[:, -6:].max() < 0.01 and shares[:, :2].min() > 0.99 and shares[:, 20:-20] == pytest.approx(0.25, abs=1e-3)


def begun():
    """A network that leaves what it is given as it is."""
    torch.manual_seed(0)
    net = IFNet(Layout((16, 8), None, 0, given=True)).requires_grad_(False).eval()
    for place in range(2):
        last = getattr(net, f"block{place}").lastconv[0]
        last.weight.zero_()
        last.bias.zero_()
    return net


@pytest.mark.parametrize(("size", "time"), [((96, 128), 0.25), ((93, 127), 0.5), ((33, 41), 0.8)])
def test_a_network_that_is_given_a_flow_goes_on_from_it(size, time):
    first, truth, second = (moving(moment)[: size[0], -size[1] :] for moment in (0, time, 1))
    found, known = (method(first, second, [time])[0] for method in (by_network(begun(), 1, None), dis))
    assert found.shape == truth.shape and error(found, truth) == pytest.approx(error(known, truth), rel=0.1)
    assert error(found, known) < 0.2 * error(known, truth)


def test_tiles_and_batches_of_it_are_the_whole():
    net = begun()
    for place in range(2):
        getattr(net, f"block{place}").lastconv[0].weight.normal_(std=0.02)
    pair = [np.tile(moving(time), (4, 3, 1)) for time in (0, 1)]  # 384 x 384
    whole, plain = (by_network(one, 1, None)(*pair, [0.3, 0.7]) for one in (net, begun()))
    assert all(error(one, other) > 0.5 for one, other in zip(whole, plain, strict=True))
    for batch, tile in ((2, None), (1, 256)):
        for one, other in zip(whole, by_network(net, batch, tile)(*pair, [0.3, 0.7]), strict=True):
            assert np.abs(one.astype(int) - other).mean() < 0.1


@pytest.mark.parametrize("size", [(1, 1), (7, 50), (33, 31)])
def test_small_frames_and_still_ones_stay_what_they_are(size):
    picture = moving(0)[: size[0], : size[1]]
    for method in (dis, linear):
        found = method(picture, picture, [0.3, 0.6])
        assert len(found) == 2 and all(np.abs(one.astype(int) - picture).max() <= 1 for one in found)


def test_the_network_gets_pictures_and_times_in_batches():
    torch.manual_seed(0)
    net = IFNet(Layout((16, 8, 8), None, 0)).requires_grad_(False).eval()
    for place in range(3):
        last = getattr(net, f"block{place}").lastconv[0]
        last.weight.zero_()
        last.bias.zero_()
    first, second = moving(0), moving(1)
    for batch, tile in ((1, None), (2, None), (4, 64)):
        found = by_network(net, batch, tile)(first, second, [0.2, 0.5, 0.7])
        assert len(found) == 3
        for one in found:  # without flow and mask, half of each
            assert np.abs(one.astype(float) - (first.astype(float) + second) / 2).max() <= 0.51


def test_a_cut_is_never_blended():
    pictures = [moving(0), moving(0.3), moving(0.6), *(255 - np.rot90(moving(time), 2) for time in (0, 0.3, 0.6))]
    cuts = []
    found = list(smooth(clip(pictures), linear, divided(4), 0.2, cuts))
    assert cuts == [Fraction(3, 10)] and len(found) == 24
    for frame in found[8:12]:
        assert (frame.pixels == pictures[2]).all()
    assert (found[12].pixels == pictures[3]).all() and not (found[13].pixels == pictures[3]).all()
    assert len(list(smooth(clip(pictures), linear, divided(4), 1, none := []))) == 24 and not none


def test_times_are_exact_and_the_last_frame_stays():
    source = [Frame(moving(0), Fraction(0), Fraction(1, 30)), Frame(moving(0.1), Fraction(1, 30), Fraction(2, 30))]
    source.append(Frame(moving(0.2), Fraction(3, 30), Fraction(1, 30)))
    found = list(smooth(source, linear, divided(2), 0.2, []))
    assert [frame.time * 60 for frame in found] == [0, 1, 2, 4, 6, 7] and [frame.lasts * 60 for frame in found] == [1, 1, 2, 2, 1, 1]
    assert [(frame.pixels == source[place // 2].pixels).all() for place, frame in enumerate(found)] == [
        True,
        False,
        True,
        False,
        True,
        True,
    ]
    even = list(smooth(source, linear, evenly(Fraction(25)), 0.2, []))
    assert [frame.time * 25 for frame in even] == [0, 1, 2, 3] and even[-1].time < Fraction(4, 30)
    middle = linear(source[1].pixels, source[2].pixels, [0.7])[0]
    assert (even[2].pixels == middle).all()  # at 0.08: seven tenths of the way from 1/30 to 3/30


def test_television_s_rates_are_fractions():
    assert as_rate(59.94) == Fraction(60000, 1001) and as_rate(23.976) == Fraction(24000, 1001) and as_rate(60) == 60
    assert as_rate(12.5) == Fraction(25, 2)


def test_a_video_through_the_command_with_its_sound(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    beeping(tmp_path / "in.mkv", at=1.2)
    for arguments, rate in ((["factor=4"], 40), (["fps=24", "by=linear"], 24)):
        with pytest.raises(SystemExit) as done:
            cli.main(["interpolate", "in.mkv", f"out{rate}.mp4", *arguments])
        assert done.value.code == 0, capsys.readouterr().err
        said = capsys.readouterr().out
        assert f"{2 * rate} frames at {rate} a second, of 20; cuts:" in said and f"Wrote out{rate}.mp4." in said
        times = [frame.time for frame in frames(tmp_path / f"out{rate}.mp4")]
        assert len(times) == 2 * rate and all(b - a == Fraction(1, rate) for a, b in pairwise(times))
        assert loud_at(tmp_path / f"out{rate}.mp4") == pytest.approx(loud_at(tmp_path / "in.mkv"), abs=0.03)
        with av.open(f"out{rate}.mp4") as container:
            assert f"interpolate {arguments[0]}" in container.metadata["comment"]


def test_one_frame_and_television_s_rate_and_frames_in_a_folder(tmp_path):
    make(tmp_path / "one.mp4", [4])
    told = charforgex.interpolate(files=[tmp_path / "one.mp4", tmp_path / "out"], factor=8)
    assert told["frames"] == 8 and told["frames_before"] == 1 and told["cuts"] == []
    assert json.loads((tmp_path / "out" / "frames.json").read_text())["times"][1] == pytest.approx(1001 / 240_000)
    make(tmp_path / "few.mp4", [4, 4, 4])
    interpolate(compose("interpolate", [f"files=[{tmp_path}/few.mp4,{tmp_path}/more.mp4]"]))
    assert clock(tmp_path / "more.mp4").rate == Fraction(60_000, 1001)


@pytest.mark.parametrize("layout", [Layout((16, 8, 8), (8, 4), 8), Layout((16, 8), None, 0, given=True)])
def test_weights_in_a_file_are_used(tmp_path, layout):
    torch.manual_seed(0)
    save_file(IFNet(layout).state_dict(), tmp_path / "net.safetensors")
    make(tmp_path / "in.mp4", [4, 5])
    files = f"files=[{tmp_path}/in.mp4,{tmp_path}/out.mp4]"
    told = interpolate(compose("interpolate", [files, "by=rife", f"weights={tmp_path}/net.safetensors", "scene=1", "device=cpu"]))
    assert told["frames"] == 4 and len(list(frames(tmp_path / "out.mp4"))) == 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["factor=4", "fps=60"], "leave one out"),
        (["tile=512", "batch=2"], "batch and tile would have no effect with by=dis"),
        (["device=cpu"], "device would have no effect"),
        (["codec=vp9"], "holds h264, h265, av1"),
        (["factor=1"], "at least 2"),
        (["by=rife"], r"needs weights=<flownet\.safetensors>"),
        (["seconds=2"], "seconds=2 would have no effect: the files are of a video"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, settings, said):
    make(tmp_path / "in.mp4", [1])
    with pytest.raises(ConfigError, match=said):
        interpolate(compose("interpolate", [f"files=[{tmp_path}/in.mp4,{tmp_path}/out.mp4]", *settings]))


def test_a_quality_for_what_loses_nothing_is_refused(tmp_path):
    make(tmp_path / "in.mp4", [1])
    with pytest.raises(ConfigError, match=r"crf=20 would have no effect: out\.mkv keeps all"):
        interpolate(compose("interpolate", [f"files=[{tmp_path}/in.mp4,{tmp_path}/out.mkv]", "codec=ffv1", "crf=20"]))


def drawn(folder, sizes=((32, 48),) * 3):
    """Pictures of these sizes (H, W), each of one colour: a.png, b.png, ..."""
    for name, level, size in zip("abc", (0, 100, 200), sizes, strict=False):
        Image.new("RGB", size[::-1], (level, 0, 0)).save(folder / f"{name}.png")


def test_from_picture_to_picture_in_so_many_seconds(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn(tmp_path)
    with pytest.raises(SystemExit) as done:
        cli.main(["interpolate", "a.png", "b.png", "c.png", "out.mkv", "seconds=0.5", "fps=8", "by=linear", "codec=ffv1"])
    assert done.value.code == 0 and "9 frames at 8 a second, of 3; cuts: 0" in capsys.readouterr().out
    found = list(frames(tmp_path / "out.mkv"))
    assert [frame.pixels[9, 9, 0] for frame in found] == pytest.approx(range(0, 225, 25), abs=1)
    assert [float(frame.time) for frame in found] == pytest.approx([place / 8 for place in range(9)], abs=0.001)
    told = charforgex.interpolate(files=["a.png", "b.png", "frames"])
    assert told["frames"] == 26 and told["rate"] == 25


@pytest.mark.parametrize(
    ("files", "settings", "said"),
    [
        (["a.png", "b.png"], {"factor": 2}, "factor=2 would have no effect: the files are of pictures"),
        (["a.png", "b.png"], {"scene": 0.3}, "scene=0.3 would have no effect"),
        (["a.png"], {}, "name a video and what becomes of it"),
        (["a.png", "in.mp4"], {}, r"in\.mp4 is none of"),
        (["a.png", "c.png"], {}, r"c\.png is 40 x 32, and a\.png is 48 x 32; resize or cut"),
        (["a.png", "bad.png"], {}, r"files=.*bad\.png is damaged or no picture"),
    ],
)
def test_pictures_that_do_not_go_together_are_refused(tmp_path, files, settings, said):
    drawn(tmp_path, ((32, 48), (32, 48), (32, 40)))
    (tmp_path / "bad.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(CharForgeError, match=said):
        charforgex.interpolate(files=[str(tmp_path / name) for name in (*files, "out.mp4")], **settings)
    assert not (tmp_path / "out.mp4").exists()


def test_nothing_is_overwritten_or_left_half_done(tmp_path):
    data = make(tmp_path / "in.mp4", range(90)).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    for files, said in (
        (["in.mp4", "in.mp4"], "is what is read"),
        (["cut.mp4", "in.mp4"], "exists; say overwrite=true"),
        (["in.mp4"], "name a video and what becomes of it"),
        (["cut.mp4", "new.mp4"], r"cut\.mp4: .*; write what is left of it anew"),
        (["gone.mp4", "new.mp4"], r"gone\.mp4 is no file"),
    ):
        with pytest.raises(CharForgeError, match=said):
            interpolate(compose("interpolate", [f"files=[{','.join(str(tmp_path / name) for name in files)}]", "by=linear"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.mp4", "in.mp4"] and (tmp_path / "in.mp4").read_bytes() == data


def test_one_name_alone_is_not_enough(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["interpolate", "in.mp4"])
    assert done.value.code == 2 and "files=['in.mp4']: name a video and what becomes of it: in.mp4 out.mp4" in capsys.readouterr().err


def test_memory_does_not_grow_with_length():
    """Of two hundred frames no more than a few are alive."""
    alive = 0
    most = 0

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def made(count):
        nonlocal alive, most
        for index in range(count):
            alive += 1
            picture = np.full((8, 8, 3), index % 3, np.uint8).view(Counted)
            most = max(most, alive)
            yield Frame(picture, Fraction(index), Fraction(1))

    assert sum(1 for _ in smooth(made(200), lambda a, b, times: [np.asarray(a)] * len(times), divided(2), 0.2, [])) == 400
    assert most <= 5
