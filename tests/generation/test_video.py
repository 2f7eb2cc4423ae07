"""mode=video from end to end on a tiny base: LoRAs of both kinds, every format with its recipe, beginnings, and what is refused first."""

from __future__ import annotations

import json
import weakref
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

import charforgex
from charforgex import filming, videos
from charforgex.config import compose
from charforgex.errors import CharForgeError, ConfigError, DataError, LoraError, ModelError
from charforgex.families.animatediff import AnimateDiff
from charforgex.families.animatediff_sdxl import AnimateDiffSdxl
from charforgex.families.sdxl import Sdxl
from charforgex.families.spelled import Sd15
from charforgex.filming import Output
from charforgex.generation import beginnings, clip_files
from charforgex.generation.clips import decode_frames, encode_frames
from charforgex.generation.metadata import ClipRecipe, Recipe, read_recipe
from charforgex.generation.run import generate
from charforgex.lora import metadata, writing
from charforgex.lora.state import Lora, LoraLayer
from charforgex.videos import Frame
from tests.test_filming import beeping, loud_at

av = pytest.importorskip("av")
FAMILY = AnimateDiff()
QUICK = {"mode": "video", "steps": 2, "width": 32, "height": 32, "sheet": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny-clips"
    FAMILY.pipeline(FAMILY.tiny()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weightless(base, tmp_path_factory):
    import shutil

    folder = tmp_path_factory.mktemp("weightless") / "tiny-clips"
    shutil.copytree(base, folder)
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(b"")
    return folder


def layers(place: str, family=FAMILY, seed=0):
    draw = torch.Generator().manual_seed(seed)
    found = {
        f"unet.{name}": LoraLayer(
            torch.randn(2, module.in_features, generator=draw), torch.randn(module.out_features, 2, generator=draw), alpha=2.0
        )
        for name, module in family.tiny().denoiser.named_modules()
        if place in name and name.endswith(("to_q", "to_v"))
    }
    assert found
    return Lora(found)


@pytest.fixture(scope="module")
def motion(base, tmp_path_factory):
    """A motion LoRA as it is trained here."""
    lora, path = layers("motion_modules"), tmp_path_factory.mktemp("lora") / "nodding.safetensors"
    header = metadata.build(lora, FAMILY, title="nodding", base=str(base)) | {"charforgex.fps": "12.5"}
    return writing.write(lora, path, "diffusers", FAMILY, FAMILY.tiny().denoiser.config, torch.float32, header)


@pytest.fixture(scope="module")
def character(tmp_path_factory):
    """A character's LoRA as sd-scripts writes it, for Stable Diffusion 1.5, with its own name for the trigger."""
    lora, path = layers(".attentions.", seed=1), tmp_path_factory.mktemp("lora") / "anna.safetensors"
    writing.write(lora, path, "kohya", FAMILY, FAMILY.tiny().denoiser.config, torch.float32, {})
    from safetensors.torch import load_file

    save_file(load_file(path), path, {"ss_base_model_version": "sd_v1", "modelspec.trigger_phrase": "anna"})
    return path


def shown(path) -> np.ndarray:
    return np.stack([frame.pixels for frame in videos.frames(Path(path))]).astype(int)


@cache
def composed(*overrides):
    return compose("generate", overrides)


def make(base, out, *overrides, **more):
    """`charforgex.generate`, whose config is composed once for all tests."""
    asked = QUICK | {"base": str(base), "prompt": "a cat", "count": 1, "out": str(out), "frames": 4} | more
    cfg = OmegaConf.create(OmegaConf.to_container(composed(*overrides)))
    for name, value in asked.items():
        cfg[name] = str(value) if isinstance(value, Path) else value
    return generate(cfg)


def test_a_characters_and_a_motions_lora_together(base, motion, character, tmp_path):
    """Each strength by itself; at 0 the clip is the base's own, bit for bit. The base is the motion LoRA's, the trigger the character's."""
    scales = [[0, 0], [1, 0], [0, 1], [1, 1]]
    ask = QUICK | {"prompt": "a portrait of {trigger}", "seeds": [5], "frames": 4, "format": "mkv", "codec": "ffv1"}
    run = charforgex.generate(lora=[character, motion], scales=scales, out=tmp_path / "both", **ask)
    assert [list(clip["scales"].values()) for clip in run["clips"]] == scales
    assert (run["base"], run["clips"][0]["prompts"]) == (str(base), ["a portrait of anna"])
    own = charforgex.generate(**ask | {"prompt": "a portrait of anna"}, base=base, out=tmp_path / "own")
    assert {clip["fps"] for clip in run["clips"]} == {12.5} and run["warnings"] == []  # as the motion was learnt
    made = [shown(clip["file"]) for clip in run["clips"]]
    assert np.array_equal(made[0], shown(own["clips"][0]["file"]))
    assert all(np.abs(one - other).max() > 1 for number, one in enumerate(made) for other in made[number + 1 :])
    recipe = read_recipe(run["clips"][1]["file"])
    assert [(use.name, use.scale) for use in recipe.loras] == [("anna", 1.0), ("nodding", 0.0)]
    assert recipe.loras[1].autov3 == metadata.hashes(motion)["autov3"]
    assert run == json.loads((tmp_path / "both" / "result.json").read_text())
    slow = charforgex.generate(**ask | {"frames": 1}, lora=motion, trigger="anna", fps=8, out=tmp_path / "slow")
    assert slow["warnings"] == ["nodding.safetensors was trained at 12.5 frames a second, and these clips have 8: its motion is slower."]


def test_a_clip_is_its_prompts_and_seeds_alone(base, tmp_path):
    ask = {"prompt": ["a {red|blue} cat", "a dog"], "format": "mkv", "codec": "ffv1"}
    run = make(base, tmp_path / "all", seeds=[5, 9], **ask)
    made = [(clip["templates"], clip["seed"]) for clip in run["clips"]]
    assert made == [([prompt], seed) for prompt in ask["prompt"] for seed in (5, 9)]
    alone = make(base, tmp_path / "one", seeds=[9], **ask)["clips"]
    for clip, same in zip(alone, run["clips"][1::2], strict=True):
        assert clip["prompts"] == same["prompts"] and Path(clip["file"]).name[3:] == Path(same["file"]).name[3:]
        assert np.array_equal(shown(clip["file"]), shown(same["file"]))
    assert not np.array_equal(shown(run["clips"][0]["file"]), shown(run["clips"][1]["file"]))
    again = make(base, tmp_path / "again", seeds=[9], **ask)["clips"]
    assert [Path(clip["file"]).read_bytes() for clip in again] == [Path(clip["file"]).read_bytes() for clip in alone]


@pytest.mark.parametrize("format", ["mp4", "webm", "gif", "frames"])
def test_every_format_carries_its_recipe(base, tmp_path, format):
    run = make(base, tmp_path / "out", format=format, fps=12.5, negative="a dog", guidance=4, sheet=True)
    (clip,) = run["clips"]
    assert clip["file"].endswith(f".{format}") or format == "frames"
    recipe = read_recipe(clip["file"])
    assert (recipe.prompt, recipe.negative, recipe.seed, recipe.guidance, recipe.steps) == ("a cat", "a dog", 0, 4.0, 2)
    assert (recipe.family, recipe.scheduler_class, recipe.width, recipe.base) == ("animatediff", "DDIMScheduler", 32, "tiny-clips")
    assert (recipe.clip.frames, recipe.clip.fps) == (4, 12.5) and len(recipe.base_sha256) == 64
    assert read_recipe(clip["preview"]) == recipe
    assert Image.open(clip["preview"]).size == (32, 32) and Image.open(clip["strip"]).width > 4 * 192
    if format == "frames":
        assert len(list(Path(clip["file"]).glob("*.png"))) == 4 and read_recipe(Path(clip["file"]) / "000002.png") == recipe
    elif format == "gif":
        assert Image.open(clip["file"]).n_frames == 4
    else:
        found = list(videos.frames(Path(clip["file"])))
        assert [float(frame.time) for frame in found] == pytest.approx([0, 0.08, 0.16, 0.24], abs=1e-3)


def test_a_long_loop_that_travels(base, tmp_path):
    run = make(
        base, tmp_path / "out", prompt=None, travel={0: "a {red|blue} cat", 10: "a dog"}, frames=20, loop=True, overlap=4, interpolate=2
    )
    (clip,) = run["clips"]
    assert (clip["frames"], clip["fps"]) == (40, 16.0)
    times = [frame.time for frame in videos.frames(Path(clip["file"]))]
    assert len(times) == 40 and {later - time for time, later in pairwise(times)} == {Fraction(1, 16)}
    recipe = read_recipe(clip["file"])
    assert recipe.clip.travel == {"0": clip["prompts"][0], "10": "a dog"} and recipe.prompt in ("a red cat", "a blue cat")
    assert (recipe.clip.window, recipe.clip.overlap, recipe.clip.blend, recipe.clip.noise) == (8, 4, "pyramid", "shuffled")
    assert clip["templates"] == ["a {red|blue} cat", "a dog"]
    assert run == json.loads((tmp_path / "out" / "result.json").read_text())


def movie(path, count, rate=Fraction(8), size=(48, 64)):
    """A video whose frame k is all of the grey 10 k."""
    with filming.writing(Output(path, rate, rate.numerator, "ffv1")) as out:
        for number in range(count):
            out.write(np.full((*size, 3), 10 * number, np.uint8), number / rate, 1 / rate)
    return path


def test_clips_from_pictures_and_videos(base, tmp_path):
    Image.new("RGB", (60, 40), (250, 10, 10)).save(tmp_path / "red.png")
    video = movie(tmp_path / "grey.mkv", 7)
    run = make(base, tmp_path / "video", init=video, frames=None)
    assert run["clips"][0]["frames"] == 7 and run["settings"]["strength"] == 0.6
    clip = read_recipe(run["clips"][0]["file"]).clip
    assert (clip.init, clip.strength, clip.keep_first) == ("grey.mkv", 0.6, False) and len(clip.init_sha256) == 64
    run = make(base, tmp_path / "picture", init=tmp_path / "red.png", keep_first=True, format="mkv", codec="ffv1")
    assert run["clips"][0]["frames"] == 4 and run["settings"]["strength"] == 0.6 and run["settings"]["keep_first"]
    first, *others = shown(run["clips"][0]["file"])
    parts = FAMILY.tiny()
    latents = encode_frames(FAMILY, parts, [np.full((32, 32, 3), (250, 10, 10), np.uint8)])
    (through,) = decode_frames(FAMILY, parts, latents)
    assert np.abs(first - through).max() <= 1 < 5 < np.abs(others[0] - through).mean()
    with pytest.raises(DataError, match=r"grey\.mkv has 7 frames at 8 a second; say frames=7, or leave frames out"):
        make(base, tmp_path / "long", init=video, frames=9)


def test_clips_from_a_video_have_its_sound(base, tmp_path):
    """In sync, and no longer than the clip; also with frames between."""
    video = beeping(tmp_path / "beeping.mkv", at=0.6, seconds=2, offset=0.5)
    run = make(base, tmp_path / "a", init=video, frames=6, fps=8, interpolate=2)
    assert loud_at(run["clips"][0]["file"]) == pytest.approx(loud_at(video), abs=0.03) == pytest.approx(0.1, abs=0.06)
    with av.open(run["clips"][0]["file"]) as container:
        audio = container.streams.audio[0]
        assert float(audio.duration * audio.time_base) == pytest.approx(6 / 8, abs=0.03)
    for more in ({"sound": False}, {"format": "gif"}):
        run = make(base, tmp_path / "-".join(more), init=video, frames=2, **more)
        with av.open(run["clips"][0]["file"]) as container:
            assert not container.streams.audio
    run = make(base, tmp_path / "of a gif", init=run["clips"][0]["file"], frames=None)
    assert run["clips"][0]["frames"] == 2


def test_frames_at_another_rate():
    """The nearest ones in time, of frames that come unevenly: at 0, 1, 4 and 5 tenths of a second, the last for two of them."""
    frames = [
        Frame(number, Fraction(time, 10), Fraction(lasts, 10)) for number, (time, lasts) in enumerate([(0, 1), (1, 3), (4, 1), (5, 2)])
    ]
    assert list(beginnings.at_rate(frames, Fraction(10))) == [0, 1, 1, 2, 2, 3, 3]
    assert list(beginnings.at_rate(frames, Fraction(5))) == [0, 1, 2, 3]
    assert list(beginnings.at_rate(frames[:1], Fraction(30))) == [0, 0, 0]


def test_pictures_are_cut_in_the_middle(tmp_path):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = (0, 200, 0)
    assert (beginnings.fitted(wide, (40, 40))[:, 1:-1] == (0, 200, 0)).all()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (beginnings.picture(tmp_path / "clear.png") == 255).all()


def recipe_of(count, **more):
    clip = {"loop": False, "window": 8, "overlap": 2, "blend": "pyramid", "noise": "shuffled", "travel": None, "init": None}
    clip |= {"init_sha256": None, "strength": None, "keep_first": False, "interpolate": None} | more
    return Recipe(
        prompt="a", template="a", negative="", seed=1, width=16, height=16, steps=1, guidance=1.0, guidance_rescale=0.0, scheduler="ddim",
        scheduler_class="DDIMScheduler", schedule_type=None, family="animatediff", base="b", base_sha256="0" * 64, base_is_file=False,
        dtype="float32", loras=(), versions={"charforgex": "1"}, clip=ClipRecipe(frames=count, fps=8.0, **clip),
    )  # fmt: skip


@pytest.mark.parametrize(("suffix", "factor"), [(".mp4", None), (".gif", None), (".mp4", 2)])
def test_of_a_long_clip_a_few_frames_are_held(tmp_path, suffix, factor):
    alive, most = [], 0

    def frames():
        nonlocal most
        for number in range(40):
            pixels = np.full((48, 48, 3), number, np.uint8)
            alive.append(weakref.ref(pixels))
            most = max(most, sum(one() is not None for one in alive))
            yield pixels
            del pixels

    told = clip_files.write_clip(frames(), tmp_path / f"a{suffix}", recipe_of(40, interpolate=factor))
    assert told["frames"] == 40 * (factor or 1)
    assert most <= clip_files.SHOWN + 5
    assert np.asarray(Image.open(told["preview"])).mean() == 20


def test_a_loop_is_smooth_over_its_end(tmp_path):
    """A light that turns: between the last and the first frame, as between any others, it is on its way."""
    rows, columns = np.mgrid[:64, :64]

    def light(turn):
        y, x = 32 + 16 * np.sin(turn), 32 + 16 * np.cos(turn)
        return (40 + 200 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 60))[..., None].repeat(3, -1).round().astype(np.uint8)

    still = [light(number / 12 * 2 * np.pi) for number in range(12)]
    for loop, near in ((True, 1.5), (False, None)):
        recipe = recipe_of(12, loop=loop, interpolate=2)
        timed = [Frame(pixels, Fraction(number, 8), Fraction(1, 8)) for number, pixels in enumerate(still)]
        made = list(clip_files.smoothed(timed, recipe.clip, Fraction(8)))
        assert len(made) == 24 and made[-1].time == Fraction(23, 16)
        last, between = made[-1].pixels.astype(float), light(11.5 / 12 * 2 * np.pi)
        if loop:
            assert np.abs(last - between).mean() < near
        else:
            assert np.array_equal(made[-1].pixels, still[-1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "picture"}, r"frames=4: of no effect with mode=picture; say mode=video"),
        ({"window": 16}, r"window=16: the motion modules of .* know 8 frames at once"),
        ({"overlap": 8, "window": 8, "frames": 20}, r"overlap=8: windows of 8 frames share fewer .* at most 7"),
        ({"overlap": 2}, r"overlap=2 has no effect: 4 frames are one window of 8"),
        ({"loop": True, "noise": "own"}, r"noise=own has no effect: 4 frames are one window of 8"),
        ({"travel": {0: "a", 2: "b"}}, r"travel and a prompt are both given"),
        ({"prompt": None, "travel": {0: "a", 4: "b"}}, r"travel has a prompt at frame 4, and the clip ends with frame 3"),
        ({"prompt": None, "travel": {2: "a", 0: "b"}}, r"travel has the frames \[2, 0\]; name them in order"),
        ({"prompt": None, "travel": {0: "a {trigger}"}}, r"asks for \{trigger\}, and no LoRA"),
        ({"prompt": None}, r"no prompt is given"),
        ({"strength": 0.5}, r"strength=0.5 has no effect without init"),
        ({"keep_first": True}, r"keep_first=true has no effect without init"),
        ({"init": "nothing.png"}, r"init=nothing.png is no file"),
        ({"sound": False}, r"sound=false has no effect without init=<a video>"),
        (
            {"init": "beeping.mkv", "format": "webm"},
            r"clip.webm cannot hold the sound of beeping.mkv \(aac\); choose .mkv",
        ),
        ({"guidance_rescale": 0.7}, r"guidance_rescale=0.7 is for pictures"),
        ({"true_guidance": 2}, r"true_guidance=2 has no meaning for animatediff"),
        ({"guidance": 1, "negative": "dark"}, r"negative=dark has no effect with guidance=1"),
        ({"codec": "vp9"}, r"codec=vp9: clip.mp4 holds h264, h265, av1"),
        ({"format": "gif", "crf": 20}, r"crf=20 would have no effect: gif keeps all"),
        ({"width": 40}, r"width=40: 40 is not a multiple of 16"),
        ({"steps": 1001}, r"steps=1001 is out of range"),
    ],
)
def test_refused_before_weights_load(weightless, tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    if settings.get("init") == "beeping.mkv":
        beeping(Path("beeping.mkv"), at=0.1, seconds=1)
    with pytest.raises(ConfigError, match=message):
        make(weightless, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_the_check_of_the_check(weightless, tmp_path):
    with pytest.raises(ModelError, match="is not a whole"):
        make(weightless, tmp_path / "out")


def test_loras_and_bases_of_other_families(base, weightless, motion, tmp_path):
    lora = layers("attentions", Sdxl())
    header = metadata.build(lora, Sdxl(), title="xl", base="charworld")
    xl = writing.write(lora, tmp_path / "xl.safetensors", "kohya", Sdxl(), Sdxl().tiny().denoiser.config, torch.float32, header)
    with pytest.raises(ModelError, match=r"source=charworld: no base for animatediff_sdxl is embedded"):
        make("charworld", tmp_path / "out", lora=str(xl))
    with pytest.raises(LoraError, match=r"different families: .*nodding\.safetensors for animatediff, .*xl\.safetensors for sdxl"):
        make(weightless, tmp_path / "out", lora=[str(motion), str(xl)])
    other = tmp_path / "flux.safetensors"
    save_file({"x.lora_A.weight": torch.ones(1, 1)}, other, {"charforgex.family": "flux"})
    with pytest.raises(
        ConfigError, match=r"mode=video: .*flux\.safetensors is for flux, which makes pictures; clips take LoRAs of sd15 and sdxl and anim"
    ):
        make(weightless, tmp_path / "out", lora=str(other))
    with pytest.raises(ConfigError, match=r"family=sdxl makes pictures; say family=animatediff or animatediff_sdxl, or mode=picture"):
        make(weightless, tmp_path / "out", "family=sdxl")
    with pytest.raises(LoraError, match=r"xl\.safetensors is for sdxl and not for animatediff"):
        make(weightless, tmp_path / "out", "family=animatediff", lora=str(xl))
    Sdxl().pipeline(Sdxl().tiny()).save_pretrained(tmp_path / "sdxl")
    with pytest.raises(ModelError, match=r"StableDiffusionXLPipeline makes clips with family=animatediff_sdxl and not with animatediff"):
        make(tmp_path / "sdxl", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"family=animatediff makes clips.* say mode=video"):
        make(base, tmp_path / "out", "family=animatediff", mode="picture", frames=None)


@pytest.mark.slow
def test_a_characters_lora_of_sdxl_makes_clips_of_sdxl(tmp_path):
    """The file alone says of which family, its base and its trigger; and its strength counts."""
    family, base = AnimateDiffSdxl(), tmp_path / "tiny-xl"
    parts = family.tiny()
    family.pipeline(parts).save_pretrained(base)
    lora = layers(".attentions.", family)
    header = metadata.build(lora, Sdxl(), title="anna", base=str(base), trigger="anna")
    path = writing.write(lora, tmp_path / "anna.safetensors", "kohya", family, parts.denoiser.config, torch.float32, header)
    run = charforgex.generate(
        lora=path, scales=[[0], [1]], prompt="a portrait of {trigger}", seeds=[5], frames=2, format="mkv", codec="ffv1",
        out=tmp_path / "out", **QUICK,
    )  # fmt: skip
    assert (run["family"], run["base"], run["clips"][0]["prompts"]) == ("animatediff_sdxl", str(base), ["a portrait of anna"])
    without, with_anna = (shown(clip["file"]) for clip in run["clips"])
    assert without.shape == (2, 32, 32, 3) and np.abs(without - with_anna).max() > 1
    assert read_recipe(run["clips"][1]["file"]).scheduler_class == "EulerDiscreteScheduler"


def test_sd15_is_known_by_its_metadata(base, character, tmp_path):
    from charforgex.generation.stack import family_of
    from charforgex.lora.formats import read_header

    assert family_of(read_header(character)[0]) == Sd15.name
    with pytest.raises(LoraError, match=r"anna\.safetensors is for sd15, of which no base makes pictures here; mode=video takes it"):
        make(base, tmp_path / "out", mode="picture", frames=None, lora=character)


def test_what_is_there_is_not_overwritten(base, tmp_path):
    make(base, tmp_path / "out", format="frames")
    with pytest.raises(ConfigError, match="holds the pictures of an earlier run"):
        make(base, tmp_path / "out")
    with pytest.raises(ConfigError, match="exists, and folders of frames are never replaced"):
        make(base, tmp_path / "out", format="frames", overwrite=True)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for name in ("broken.mp4", "broken.png"):
        with pytest.raises(CharForgeError, match=rf"{name}.* damaged"):
            make(base, tmp_path / "new", init=tmp_path / name)
    assert not (tmp_path / "new").exists()
