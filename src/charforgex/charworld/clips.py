"""Charworld in motion: what its characters and its camera do in a second, how it is drawn and how a sentence says so.

A `Motion` says where everything is at each moment, so that the pose in any frame, also between two frames, is known exactly.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import numpy as np

from charforgex.charworld import drawing, world
from charforgex.charworld.world import Context, Identity

FRAMES, FPS = 8, 8.0  # of the embedded base's clips
MOTION_WORDS = {
    "still": "standing still", "blink": "blinking", "talk": "talking", "nod": "nodding", "turn": "turning the head to the {side}",
    "wave": "waving a hand", "walk": "walking to the {side}", "pan": "the camera pans to the {side}", "zoom": "the camera zooms {way}",
    "roll": "the camera rolls to the {side}", "shake": "shaking the head", "jump": "jumping", "sway": "swaying",
}  # fmt: skip
MOTIONS = ("blink", "talk", "nod", "turn", "wave", "walk", "pan", "zoom", "roll")
HELD_OUT_MOTIONS = ("shake", "jump", "sway")  # never in pre-training


@dataclass(frozen=True)
class Motion:
    """One of `MOTION_WORDS`. `direction` is 1 for right or in, -1 for left or out; `phase` is in [0, 1); `strength` about 1."""

    name: str
    direction: int = 1
    phase: float = 0.0
    strength: float = 1.0

    @property
    def words(self) -> str:
        right = self.direction > 0
        return MOTION_WORDS[self.name].format(side="right" if right else "left", way="in" if right else "out")


def draw_motion(rng: random.Random, name: str | None = None) -> Motion:
    """A motion of that name, or one of those that pre-training shows, one in ten times none."""
    name = name or (rng.choice(MOTIONS) if rng.random() < 0.9 else "still")
    return Motion(name, rng.choice((-1, 1)), rng.random(), rng.uniform(0.8, 1.2))


def at(context: Context, motion: Motion, u: float) -> Context:
    """The moment `u` in [0, 1] of a clip that begins as `context` would be at rest."""
    d, s = motion.direction, motion.strength

    def swing(cycles: float) -> float:
        return math.sin(2 * math.pi * (cycles * u + motion.phase))

    ahead = d * (2 * u - 1) * s  # from one side to the other
    match motion.name:
        case "still":
            return context
        case "blink":
            return replace(context, blink=max(0.0, min(1.0, 1.6 - abs(u - 0.3 - 0.4 * motion.phase) / 0.16)))
        case "talk":
            return replace(context, talk=max(0.0, 0.55 + 0.5 * s * swing(2)))
        case "nod":
            return replace(context, nod=s * swing(1.5))
        case "turn":
            return replace(context, yaw=0.9 * ahead)
        case "wave":
            return replace(context, wave=min(1.0, max(0.02, 0.5 + 0.42 * s * swing(1.5))))
        case "walk":
            step = math.pi * (3 * u + motion.phase)
            return replace(context, dx=context.dx + 0.13 * ahead, dy=context.dy - 0.035 * abs(math.sin(step)), tilt=2.5 * math.cos(step))
        case "pan":
            return replace(context, zoom=1.45, pan=0.12 * ahead)
        case "zoom":
            return replace(context, zoom=1.4 * 1.28**ahead)
        case "roll":
            return replace(context, zoom=1.35, roll=13 * ahead)
        case "shake":
            return replace(context, yaw=0.75 * s * swing(1.5))
        case "jump":
            hop = (1.5 * u + motion.phase) % 1
            return replace(context, dy=context.dy + 0.05 - 0.17 * s * 4 * hop * (1 - hop))
        case "sway":
            return replace(context, tilt=15 * s * swing(1), dx=context.dx + 0.05 * s * swing(1))
    raise ValueError(f"motion {motion.name!r} is none of {', '.join(MOTION_WORDS)}")


def contexts(context: Context, motion: Motion, frames: int = FRAMES) -> list[Context]:
    """Of each frame; the last one shows the clip's end."""
    return [at(context, motion, f / max(1, frames - 1)) for f in range(frames)]


def draw_clip(identity: Identity, context: Context, motion: Motion, frames: int = FRAMES, size: int = 64) -> np.ndarray:
    """uint8 (T, size, size, 3)."""
    return np.stack([drawing.render(identity, moment, size) for moment in contexts(context, motion, frames)])


def draw_setting(rng: random.Random) -> Context:
    """What a clip shows besides who moves and how: a context with the face seen from the front, and eyes that can blink."""
    context = world.draw_context(rng)
    while context.expression in ("sleeping", "winking", "surprised"):
        context = world.draw_context(rng)
    return replace(context, yaw=0.4 * context.yaw, frame="portrait")


def clip_caption(
    identity: Identity, context: Context, motion: Motion, rng: random.Random | None = None, name: str | None = None, keep: float = 1.0
) -> str:
    """A sentence about the clip: a picture's, and the motion behind who is seen."""
    text, _ = world.caption(identity, context, rng, name=name, keep=keep)
    who, comma, rest = text.partition(", ")
    return f"{who}, {motion.words}{comma}{rest}"
