"""The demo's characters, whom no model saw: what a folder of somebody's pictures is elsewhere. They and their pictures have numbers."""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from charforgex.charworld import clips, drawing, world
from charforgex.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

DEMO = "charworld:"  # `charworld:N` is the Nth of them wherever a folder of pictures can be named
UNSEEN_SCENES = ("space", "sunset", "underwater")  # never in a demo character's pictures, so that prompts can ask for something new
TRIGGER = "zatoki"
NEVER_WRITTEN = 100_000  # from here on, a character's pictures are in nobody's folder


def held_out_character(number: int) -> world.Identity:
    """The demo's characters: no model has seen their hair, nor them."""
    return world.draw_identity(random.Random(f"held-out character {number}"), held_out=True)


def trigger_of(number: int) -> str:
    """The demo character's name and class word, as captions and prompts say them."""
    return f"{TRIGGER} {held_out_character(number).kind}"


def number_of(source: str, setting: str) -> int:
    """The N of `charworld:N`. Raises ConfigError."""
    number = source.removeprefix(DEMO)
    if not number.isdigit():
        raise ConfigError(f"{setting}={source} must be {DEMO} and a number, such as {DEMO}0.")
    return int(number)


def picture_of(number: int, index: int, size: int) -> tuple[Image, str]:
    """Picture `index` of a demo character, and its caption, which calls it by its name."""
    from PIL import Image

    identity, rng = held_out_character(number), random.Random(f"held-out character {number} picture {index}")
    context = world.draw_context(rng)
    while context.scene in UNSEEN_SCENES:
        context = world.draw_context(rng)
    text, _ = world.caption(identity, context, name=TRIGGER)
    return Image.fromarray(drawing.render(identity, context, size)), text


def write_character(folder: Path, number: int, count: int = 30, size: int = 192) -> Path:
    """A folder of `count` raw pictures of a held-out character: PNG beside .txt, like anybody's. Returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        picture, text = picture_of(number, index, size)
        picture.save(folder / f"{index:03d}.png")
        (folder / f"{index:03d}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


def references_of(number: int, count: int = 20, size: int = 64) -> list[tuple[Image, str]]:
    """Pictures with captions that are in no folder of `write_character`."""
    return [picture_of(number, NEVER_WRITTEN + index, size) for index in range(count)]


def other_characters(number: int, count: int = 20, size: int = 64) -> list[Image]:
    """A picture of each of `count` other held-out characters: what identity scores of strangers look like."""
    from PIL import Image

    pictures = []
    for other in range(count + 1):
        if other != number:
            context = world.draw_context(random.Random(f"other character {other}"))
            pictures.append(Image.fromarray(drawing.render(held_out_character(other), context, size)))
    return pictures[:count]


# ---- motion ----


def motion_of(source: str, setting: str) -> str:
    """The motion of `charworld:<motion>`. Raises ConfigError."""
    name = source.removeprefix(DEMO)
    if name not in clips.MOTION_WORDS:
        raise ConfigError(f"{setting}={source} must be {DEMO} and a motion: {', '.join(clips.HELD_OUT_MOTIONS)}, which no base has seen.")
    return name


def moving_character(number: int) -> world.Identity:
    """One that moves: the base can draw it from its description."""
    return world.draw_identity(random.Random(f"moving character {number}"))


def write_motion(folder: Path, motion: str, frames: int, fps: float, size: int = 64, count: int = 16, characters: int = 4) -> Path:
    """A folder of videos of the first few moving characters, each of one second: .mkv beside .txt, like anybody's. Returns `folder`."""
    from charforgex.filming import Output, writing

    folder.mkdir(parents=True, exist_ok=True)
    rate = Fraction(str(fps))
    for index in range(count):
        rng = random.Random(f"motion {motion} clip {index}")
        identity, setting, moved = moving_character(index % characters), clips.draw_setting(rng), clips.draw_motion(rng, motion)
        (folder / f"{index:03d}.txt").write_text(clips.clip_caption(identity, setting, moved) + "\n", encoding="utf-8")
        with writing(Output(folder / f"{index:03d}.mkv", rate, rate.numerator, "ffv1")) as out:
            for number, pixels in enumerate(clips.draw_clip(identity, setting, moved, frames, size)):
                out.write(pixels, number / rate, 1 / rate)
    return folder


def motion_prompts(motion: str, count: int = 4) -> list[str]:
    """The motion, asked of characters that `write_motion` does not show."""
    prompts = []
    for index in range(count):
        rng = random.Random(f"motion {motion} prompt {index}")
        identity = moving_character(NEVER_WRITTEN + index)
        prompts.append(clips.clip_caption(identity, clips.draw_setting(rng), clips.draw_motion(rng, motion)))
    return prompts
