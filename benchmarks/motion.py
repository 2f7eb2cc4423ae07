"""What a motion LoRA learns, on characters that its clips do not show. Writes into docs/motion.md.

    python benchmarks/motion.py             trains a LoRA of each held-out motion on the embedded base, then draws and reads clips
    python benchmarks/motion.py --quick     two steps on one motion and two clips, nothing written: a look
    python benchmarks/motion.py --seen      no training: what the base makes of the motions that it was shown
    python benchmarks/motion.py --rendered  no training and no base: what real clips are read as, and clips that are spoilt in known ways

The embedded base was never shown the held-out motions. Clips are drawn of the same prompts and noise by the base and with the LoRA's
temporal half, its spatial half, and both, and read by the embedded reader of poses and by `charforgex.evaluation.motion`. Trainings in
--runs that are finished are taken as they are, others are gone on with. The last line is one JSON object; its ratios, smaller is better:

error_vs_base.<motion>          how far trajectories are from the motion's nearest, of the LoRA's clips against the base's
appearance_temporal_vs_spatial  how much the temporal half changes who is seen, against how much the spatial half does
motion_spatial_vs_temporal      how much the spatial half changes the poses, against how much the temporal half does
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean

import numpy as np

from charforgex.charworld import clips, drawing, world
from charforgex.charworld.clips import FPS, FRAMES, HELD_OUT_MOTIONS, MOTIONS, Motion

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/motion.md"
MARKS = "<!-- {}: written by benchmarks/motion.py -->", "<!-- end of {} -->"  # around what is written into the page
REFERENCES = 16  # clips of a motion that others are compared with
WIDER = 3  # pixels around the figure that do not count as background


@dataclass(frozen=True)
class Scene:
    """What a clip is asked to show: a character, somewhere, moving."""

    who: world.Identity
    setting: world.Context
    motion: Motion

    @property
    def prompt(self) -> str:
        return clips.clip_caption(self.who, self.setting, self.motion)

    def rendered(self) -> np.ndarray:
        return clips.draw_clip(self.who, self.setting, self.motion)


def scenes(name: str, count: int, purpose: str, held_out: bool = True) -> list[Scene]:
    """The characters are the same for every motion; `held_out` ones have hair that no model was trained on."""
    found = []
    for number in range(count):
        rng = random.Random(f"benchmarks/motion {purpose} {number}")
        who, setting = world.draw_identity(rng, held_out), clips.draw_setting(rng)
        found.append(Scene(who, setting, clips.draw_motion(rng, name)))
    return found


class Reading:
    """Reads clips with the embedded models."""

    def __init__(self):
        from charforgex.charworld.assets import load_judge, load_pose_reader
        from charforgex.embedders import CharworldEmbedder

        self.poses, self.judge, self.embedder = load_pose_reader(), load_judge(), CharworldEmbedder()
        self.references = cache(self._references)

    def _references(self, name: str) -> list[np.ndarray]:
        from charforgex.evaluation import motion

        return [motion.history(scene.rendered()) for scene in scenes(name, REFERENCES, "reference")]

    def __call__(self, clip: np.ndarray, scene: Scene, wanted: str, measures: Sequence[str] | None = None) -> dict[str, float]:
        """Of one clip, what is asked of the motion `wanted` and of the scene's character; all of it, or these `measures` alone."""
        from charforgex.charworld import poses
        from charforgex.evaluation import motion

        trajectory = self.poses.read(clip)
        apart, flow = poses.distances(trajectory), cache(lambda: motion.flow_of(clip))
        known = {
            "recognised": lambda: float(min(apart, key=apart.__getitem__) == wanted),
            "error": lambda: apart[wanted],
            "alike": lambda: motion.alike(motion.history(clip, flow()), self.references(wanted)),
            "strength": lambda: motion.strength(clip, FPS, flow()),
            "flicker": lambda: motion.flicker(clip, flow()),
            "drift": lambda: motion.drift(clip, self.embedder),
            "background": lambda: motion.background(clip, figure(scene, trajectory), flow()),
            "traits": lambda: self._traits(clip, scene),
        }
        return {name: known[name]() for name in measures or known}

    def _traits(self, clip: np.ndarray, scene: Scene) -> float:
        """The share of what the prompt says of the character and its setting that is seen, over frames."""
        from charforgex.charworld.poses import pixels_of

        asked = world.visible_attributes(scene.who, scene.setting)
        return mean(float(frame[name] == value) for frame in self.judge.read(pixels_of(clip)) for name, value in asked.items())

    def changes(self, clip: np.ndarray, before: np.ndarray) -> dict[str, float]:
        """How far the poses (root mean square, in units) and who is seen (cosine distance of mean vectors) are from the base's."""
        from PIL import Image

        from charforgex.charworld.poses import UNITS

        moved = (self.poses.read(clip) - self.poses.read(before)) / UNITS
        who = [np.mean(self.embedder([Image.fromarray(frame) for frame in one]).numpy(), 0) for one in (clip, before)]
        cosine = float(who[0] @ who[1] / np.linalg.norm(who[0]) / np.linalg.norm(who[1]))
        return {"motion_change": float(np.sqrt(np.square(moved).mean())), "appearance_change": 1 - cosine}


def figure(scene: Scene, trajectory: np.ndarray) -> np.ndarray:
    """bool (T, H, W): where the character is, drawn in the poses that were read, and a little around it."""
    import cv2

    from charforgex.charworld.poses import posed

    found = []
    for pose in trajectory:
        alpha = drawing.cut_out(scene.who, posed(scene.setting, pose))[..., 3]
        found.append(cv2.dilate(alpha, np.ones((2 * WIDER + 1,) * 2, np.uint8)) > 0)
    return np.stack(found)


def average(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.nanmean([row[name] for row in rows])) for name in rows[0]}


SPOILS = {  # measure -> by what it is spoilt, and in words
    "recognised": ("shuffled", "frames in another order"),
    "error": ("shuffled", "frames in another order"),
    "alike": ("another motion", "another motion"),
    "flicker": ("noisy", "noise of a standard deviation of 20 of 255 in every frame"),
    "drift": ("another one in every frame", "another character in every frame"),
    "background": ("another place in every frame", "another scene behind in every frame"),
}

# ---- what is known of rendered clips ----


def spoilt(how: str, scene: Scene, number: int) -> np.ndarray:
    """A real clip, worse in one known way."""
    rng, clip = random.Random(f"{how} {number}"), scene.rendered()
    moments = clips.contexts(scene.setting, scene.motion)
    match how:
        case "shuffled":
            return clip[rng.sample(range(FRAMES), FRAMES)]
        case "noisy":
            noise = np.random.default_rng(number).normal(0, 20, clip.shape)
            return np.clip(clip + noise, 0, 255).round().astype(np.uint8)
        case "another one in every frame":
            return np.stack([drawing.render(world.draw_identity(rng, held_out=True), moment) for moment in moments])
        case "another place in every frame":
            places = [world.draw_context(rng) for _ in moments]
            told = [{"scene": place.scene, "scene_colour": place.scene_colour} for place in places]
            return np.stack([drawing.render(scene.who, replace(moment, **at)) for moment, at in zip(moments, told, strict=True)])
        case "another motion":
            others = [name for name in MOTIONS if name != scene.motion.name]
            return replace(scene, motion=clips.draw_motion(rng, rng.choice(others))).rendered()
    raise ValueError(how)


@cache
def through_vae():
    """Clips as a decoder draws them: by the embedded VAE, there and back."""
    import torch
    from diffusers import AutoencoderKL

    from charforgex.charworld.assets import ROOT as EMBEDDED
    from charforgex.charworld.poses import pixels_of

    vae = AutoencoderKL.from_pretrained(EMBEDDED / "sdxl/vae", torch_dtype=torch.float32, use_safetensors=True)

    @torch.no_grad()
    def back(clip: np.ndarray) -> np.ndarray:
        pixels = vae.decode(vae.encode(pixels_of(clip)).latent_dist.mean).sample
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()

    return back


def rendered(read: Reading, names: Sequence[str], count: int) -> tuple[str, dict]:
    """What is told of rendered clips, for the page, and the numbers: recognition of every motion, and each measure's ends."""
    asked = {how: [measure for measure, (spoilt_by, _) in SPOILS.items() if spoilt_by == how] for how, _ in SPOILS.values()}
    told: dict[str, dict[str, float]] = {}
    ends: dict[str, list[dict[str, float]]] = {how: [] for how in ("real", *asked)}
    for name in names:
        wanted = scenes(name, count, "asked")
        real = [scene.rendered() for scene in wanted]
        judged = {"real": (real, None), "through the VAE": ([through_vae()(clip) for clip in real], ["recognised"])}
        judged |= {how: ([spoilt(how, scene, k) for k, scene in enumerate(wanted)], measures) for how, measures in asked.items()}
        found = {
            how: average([read(*pair, name, measures) for pair in zip(some, wanted, strict=True)])
            for how, (some, measures) in judged.items()
        }  # fmt: skip
        told[name] = {how: found[how]["recognised"] for how in ("real", "through the VAE", "shuffled")}
        if name != "still":
            for how, rows in ends.items():
                rows.append(found[how])
    sides = list(next(iter(told.values())))
    lines = [f"| motion | {' | '.join(sides)} |", f"|---|{'---|' * len(sides)}"]
    lines += [f"| {name} | {' | '.join(f'{share:.0%}' for share in row.values())} |" for name, row in told.items()]
    lines.append(f"| mean | {' | '.join(f'{mean(row[side] for row in told.values()):.0%}' for side in sides)} |")
    means = {how: {key: mean(row[key] for row in rows) for key in rows[0]} for how, rows in ends.items()}
    spoils = ["| measure | spoilt | real | how it is spoilt |", "|---|---|---|---|"]
    for key, (how, words) in SPOILS.items():
        label, number = DETAILS[key]
        spoils.append(f"| {label} | {number.format(means[how][key])} | {number.format(means['real'][key])} | {words} |")
    text = f"""The share of clips whose motion is recognised, {count} of each motion by characters with hair that no model was trained on.

{chr(10).join(lines)}

Each measure on real clips of every motion, and on such that are spoilt in the way it is there to see.

{chr(10).join(spoils)}"""
    return text, {"recognised": told, "measures": means}


# ---- training and drawing ----


def trained(name: str, folder: Path, options: argparse.Namespace) -> Path:
    """The run of `python train.py experiment=animatediff_motion` on clips of that motion. A finished one is taken as it is."""
    import charforgex

    run_dir = folder / name
    if not (run_dir / "result.json").exists():
        settings = {"trainer": {"steps": 2}, "evaluation": {"every": 2}, "sampling": {"steps": 2}} if options.quick else {}
        charforgex.train(
            experiment="animatediff_motion", data={"source": f"charworld:{name}"}, family={"source": options.source}, run_dir=str(run_dir),
            cache_dir=str(folder / "cache"), name=name, **settings,
        )  # fmt: skip
    return run_dir


# what draws: files of a run, and which noise
VARIANTS = {
    "base": ((), 0), "other noise": ((), 5000), "temporal": (("lora",), 0), "spatial": (("look",), 0), "both": (("lora", "look"), 0),
}  # fmt: skip


class Base:
    """Draws clips, with halves of a LoRA or without."""

    def __init__(self, source: str, steps: int | None):
        from charforgex.config import compose
        from charforgex.families import registry
        from charforgex.quiet import quiet

        recipe = compose("train", ["family=animatediff"]).family.recipe
        self.family = registry.get("animatediff")
        self.steps, self.guidance = steps or recipe.sampling_steps, recipe.guidance
        with quiet():
            self.parts = self.family.load(source)

    def draw(self, wanted: list[Scene], told: dict, variant: str) -> list[np.ndarray]:
        """A clip of each scene by what a run's result.json tells of."""
        from charforgex.generation.clips import decode_frames, sample_clip
        from charforgex.lora.formats import read
        from charforgex.lora.inject import load_adapter, unload_adapter

        files, noise = VARIANTS[variant]
        for file in files:
            load_adapter(self.parts, read(told[file], self.family, self.parts.denoiser.config), file)
        found, side = [], self.family.default_size(self.parts)
        negative = self.family.encode_text(self.parts, [""])
        for number, scene in enumerate(wanted):
            latents = sample_clip(
                self.family, self.parts, self.family.encode_text(self.parts, [scene.prompt]), noise + number, frames=FRAMES,
                size=(side, side), steps=self.steps, guidance=self.guidance, negative_text=negative,
            )  # fmt: skip
            found.append(np.stack(list(decode_frames(self.family, self.parts, latents))))
        for file in files:
            unload_adapter(self.parts, file)
        return found


# ---- telling ----

MEASURES = {  # what the table of motions has of a clip: its words, and how a number is written
    "recognised": ("recognised", "{:.0%}"), "error": ("error", "{:.2f}"), "alike": ("similarity", "{:.2f}"),
}  # fmt: skip
DETAILS = MEASURES | {
    "strength": ("strength", "{:.2f}"), "flicker": ("flicker", "{:.3f}"), "drift": ("drift", "{:.2f}"),
    "background": ("background", "{:.3f}"), "traits": ("traits", "{:.2f}"), "motion_change": ("poses moved", "{:.2f}"),
    "appearance_change": ("looks moved", "{:.2f}"),
}  # fmt: skip


def motions_table(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    sides = [side for side in next(iter(rows.values())) if side != "other noise"]
    lines = [f"| motion | | {' | '.join(sides)} |", f"|---|---|{'---|' * len(sides)}"]
    for name, found in rows.items():
        for number, (key, (words, how)) in enumerate(MEASURES.items()):
            lines.append(f"| {'' if number else name} | {words} | {' | '.join(how.format(found[side][key]) for side in sides)} |")
    return "\n".join(lines)


def halves_table(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    """Means over the motions."""
    lines = [f"| | {' | '.join(words for words, _ in DETAILS.values())} |", f"|---|{'---|' * len(DETAILS)}"]
    for side in ("real", *VARIANTS):
        mean_of = {key: [found[side][key] for found in rows.values() if key in found[side]] for key in DETAILS}
        cells = [how.format(mean(mean_of[key])) if mean_of[key] else "-" for key, (_, how) in DETAILS.items()]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    return "\n".join(lines)


def section(rows: dict, count: int, seconds: dict[str, float]) -> str:
    from charforgex.charworld.poses import KNOWN

    minutes = ", ".join(f"{name} {value / 60:.0f}" for name, value in seconds.items())
    return f"""## What motion LoRAs learn

A motion LoRA on the embedded base for each motion that its training never showed, by the default recipe (minutes on two
cores: {minutes}). Each of {count} characters, none of which the LoRA's clips show, is asked for by a full description and the motion's
words.

{motions_table(rows)}

*Recognised*: the share of clips whose trajectory is nearest to that motion's, of {len(KNOWN)} motions. *Error*: how far it is from the
nearest trajectory that the motion can have, in units of about what motions move a pose by. *Other motions* are real clips, *real* ones of
the motion the ceiling.

What each half of the LoRA does, means over the motions. *Traits*: the share of what the prompt says of the character and its setting that
is seen in each frame. *Poses moved*, *looks moved*: how far poses (in those units) and the character's identity (cosine distance) are from
those of the base's clip of the same noise, for which *other noise* is the measure.

{halves_table(rows)}

![base, the LoRA, and real ones](images/motion.png)"""


def write(part: str, text: str) -> None:
    begin, end = (mark.format(part) for mark in MARKS)
    before, rest = PAGE.read_text(encoding="utf-8").split(begin)
    PAGE.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def seen_section(rows: dict[str, dict[str, dict[str, float]]], count: int) -> str:
    """What the base itself has learnt: of each motion, and on average."""
    keys = [key for key in DETAILS if key in next(iter(rows.values()))["base"]]
    lines = [f"| motion | {' | '.join(DETAILS[key][0] for key in keys)} |", f"|---|{'---|' * len(keys)}"]
    told = {name: found["base"] for name, found in rows.items()}
    for side in ("base", "real"):
        found = {key: mean(row[side][key] for row in rows.values()) for key in keys}
        told["mean" if side == "base" else "mean of real clips"] = found
    lines += [f"| {name} | {' | '.join(DETAILS[key][1].format(row[key]) for key in keys)} |" for name, row in told.items()]
    return f"""## What the embedded base knows

{count} clips of each motion that it was shown, of characters that it was not.

{chr(10).join(lines)}
"""


def strips(pictures: dict[str, list[np.ndarray]], path: Path) -> None:
    """Each clip's frames side by side, one below the other, twice as large."""
    from PIL import Image

    rows = np.concatenate([np.concatenate(list(clip), 1) for found in pictures.values() for clip in found])
    Image.fromarray(np.repeat(np.repeat(rows, 2, 0), 2, 1)).quantize(128).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rendered", action="store_true")
    parser.add_argument("--seen", action="store_true")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/motion")
    parser.add_argument("--source", default="charworld", help="the base: a folder, or charworld for the embedded one")
    parser.add_argument("--motions", nargs="+", choices=HELD_OUT_MOTIONS, default=HELD_OUT_MOTIONS)
    parser.add_argument("--count", type=int, default=8, help="clips of each motion")
    options = parser.parse_args()
    if options.quick:
        options.motions, options.count = options.motions[:1], 2
    from charforgex.charworld.poses import KNOWN
    from charforgex.runs import versions

    read = Reading()
    ratios, shown, seconds = {}, {}, {}
    if options.rendered:
        text, values = rendered(read, options.motions if options.quick else KNOWN, options.count)
        print(text)
        if not options.quick:
            write("rendered", text)
    elif options.seen:
        base, rows = Base(options.source, 3 if options.quick else None), {}
        for name in options.motions if options.quick else ("still", *MOTIONS):
            wanted = scenes(name, options.count, "drawn", held_out=False)
            drawn = {"base": base.draw(wanted, {}, "base"), "real": [scene.rendered() for scene in wanted]}
            rows[name] = {side: average([read(*pair, name) for pair in zip(some, wanted, strict=True)]) for side, some in drawn.items()}
        values = rows
        print(text := seen_section(rows, options.count))
        if not options.quick:
            write("seen", text)
    else:
        rows: dict[str, dict] = {name: {} for name in options.motions}
        base = Base(options.source, 3 if options.quick else None)
        for name in options.motions:
            run_dir, wanted = trained(name, options.runs, options), scenes(name, options.count, "drawn", held_out=False)
            result = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
            seconds[name] = result["seconds"]
            drawn = {variant: base.draw(wanted, result, variant) for variant in VARIANTS}
            drawn |= {"other motions": [spoilt("another motion", *one) for one in zip(wanted, range(len(wanted)), strict=True)]}
            drawn |= {"real": [scene.rendered() for scene in wanted]}
            for variant, found in drawn.items():
                judged = [read(*pair, name) for pair in zip(found, wanted, strict=True)]
                moved = [read.changes(*pair) if variant in tuple(VARIANTS)[1:] else {} for pair in zip(found, drawn["base"], strict=True)]
                rows[name][variant] = average([one | more for one, more in zip(judged, moved, strict=True)])
            ratios[f"error_vs_base.{name}"] = rows[name]["both"]["error"] / rows[name]["base"]["error"]
            shown[name] = [drawn[side][0] for side in ("base", "both", "real")]
        of = {half: {key: mean(rows[name][half][key] for name in rows) for key in ("motion_change", "appearance_change")}
              for half in ("temporal", "spatial")}  # fmt: skip
        ratios["appearance_temporal_vs_spatial"] = of["temporal"]["appearance_change"] / of["spatial"]["appearance_change"]
        ratios["motion_spatial_vs_temporal"] = of["spatial"]["motion_change"] / of["temporal"]["motion_change"]
        values = {"clips": rows, "seconds": seconds}
        print(motions_table(rows))
        if not options.quick:
            strips(shown, ROOT / "docs/images/motion.png")
            write("motions", section(rows, options.count, seconds))
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.platform()}"
    print(json.dumps({"benchmark": "motion", "ratios": ratios, "values": values, "machine": machine, "versions": versions()}))


if __name__ == "__main__":
    main()
