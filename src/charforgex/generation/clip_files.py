"""A clip on disk: the video with its recipe, a preview from its middle, and a strip of its frames. No more than a few frames are held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from charforgex import filming
from charforgex.filming import Codec, Output
from charforgex.generation import interpolate
from charforgex.generation.metadata import ClipRecipe, Recipe, comment, save_png
from charforgex.generation.sheets import contact_sheet
from charforgex.runs import replace_atomic
from charforgex.videos import Frame

SHOWN = 8  # frames of a strip


def write_clip(
    frames: Iterable[np.ndarray], path: Path, recipe: Recipe, codec: Codec | None = None, crf: int | None = None, strip: bool = True,
    sound: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Writes uint8 frames (H, W, 3) to a path whose suffix is the format, and pictures beside it. Returns the paths, frames and fps.

    The recipe says how many frames there are, how fast they pass, and how many are put between them. `sound` is a video that has it.
    """
    clip = recipe.clip
    rate = interpolate.as_rate(clip.fps)
    places = sorted({round(place * (clip.frames - 1) / (SHOWN - 1)) for place in range(SHOWN)})
    kept: dict[int, Image.Image] = {}

    def timed() -> Iterator[Frame]:
        for number, pixels in enumerate(frames):
            if number in places or number == clip.frames // 2:
                kept[number] = Image.fromarray(pixels)
            yield Frame(pixels, number / rate, 1 / rate)

    faster = rate * (clip.interpolate or 1)
    count = 0
    with filming.writing(Output(path, faster, faster.numerator, codec, crf, sound, clip.frames / rate, comment(recipe))) as out:
        for pixels, time, lasts in smoothed(timed(), clip, rate) if clip.interpolate else timed():
            out.write(pixels, time, lasts)
            count += 1
    stem = path.with_suffix("")
    preview = save_png(kept[clip.frames // 2], stem.with_name(f"{stem.name}_preview.png"), recipe)
    told = {"file": str(path), "preview": str(preview), "strip": None, "frames": count, "fps": float(faster)}
    if strip:
        told["strip"] = str(_write_strip(stem.with_name(f"{stem.name}_strip.png"), {place: kept[place] for place in places}, recipe, rate))
    return told


def smoothed(frames: Iterable[Frame], clip: ClipRecipe, rate: Fraction) -> Iterator[Frame]:
    """With frames between them, as `charforgex interpolate` makes them; in a loop also between the last and the first."""
    how = interpolate.Settings(files=[Path("in.mp4"), Path("out.mp4")], factor=clip.interpolate)
    end = clip.frames / rate

    def closed() -> Iterator[Frame]:
        first = None
        for frame in frames:
            first = first or frame
            yield frame
        if clip.loop:
            yield first._replace(time=end)

    made = interpolate.smooth(closed(), interpolate.method_of(how), interpolate.divided(clip.interpolate), interpolate.SCENE, [])
    return (frame for frame in made if frame.time < end)


def _write_strip(path: Path, pictures: dict[int, Image.Image], recipe: Recipe, rate: Fraction) -> Path:
    labels = [f"{float(place / rate):.2f} s" for place in pictures]
    prompts = list((recipe.clip.travel or {"0": recipe.prompt}).values())
    loras = [f"{use.name} {use.scale:g}" for use in recipe.loras]
    facts = [
        *loras,
        f"seed {recipe.seed}",
        f"{recipe.clip.frames} frames, {recipe.clip.fps:g} a second",
        f"{recipe.width} x {recipe.height}",
    ]
    sheet = contact_sheet([list(pictures.values())], column_labels=labels, title=" / ".join(prompts), subtitle=" · ".join(facts))
    with replace_atomic(path) as temporary:
        sheet.save(temporary, "PNG")
    return path
