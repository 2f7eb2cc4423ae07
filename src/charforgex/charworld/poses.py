"""Reads how a drawn character and the camera are posed in each frame, and from that which motion a clip shows. For measuring only.

A small network reads a frame's pose; a clip's poses are its trajectory. Trajectories of every motion are known exactly (`clips.contexts`),
so a motion is told by the nearest of them. Shapes: N frames, T frames of one clip, P = len(POSE) numbers of a pose.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from charforgex.charworld import clips, drawing, world
from charforgex.charworld.clips import HELD_OUT_MOTIONS, MOTIONS, Motion
from charforgex.charworld.judge import block
from charforgex.charworld.world import Context, Identity

SIZE = 64  # pixels of a side of what the network sees
POSE = {  # name -> what counts as one unit of error: about what the motions move it by
    "yaw": 0.4, "nod": 0.5, "tilt": 6.0, "dx": 0.06, "dy": 0.05, "blink": 0.4, "talk": 0.4, "raised": 0.4, "hand": 0.25, "pan": 0.06,
    "zoom": 0.15, "roll": 6.0,
}  # fmt: skip
RESTING = ("yaw", "nod", "tilt", "dx", "dy")  # where these are at rest is the setting's, not the motion's
KNOWN = ("still", *MOTIONS, *HELD_OUT_MOTIONS)  # what a clip is told to show
TRAJECTORIES = 96  # of each motion that a clip is compared with


def pose_of(context: Context) -> np.ndarray:
    """float32 (P,): what the network is to read, as `Context` has it, but `zoom` as its logarithm, and of the arm whether it is raised
    and where the hand then is (0.5 where it is not)."""
    values = {name: getattr(context, name) for name in ("yaw", "nod", "tilt", "dx", "dy", "blink", "talk", "pan", "roll")}
    values |= {"raised": float(context.wave > 0), "hand": context.wave or 0.5, "zoom": math.log(context.zoom)}
    return np.array([values[name] for name in POSE], np.float32)


def posed(setting: Context, pose: np.ndarray) -> Context:
    """The inverse: the setting in a pose (P,) that was read, each number within what can be drawn."""
    values = dict(zip(POSE, pose.tolist(), strict=True))
    raised, hand, zoom = (values.pop(name) for name in ("raised", "hand", "zoom"))
    values |= {name: min(1.0, max(0.0, values[name])) for name in ("blink", "talk")}
    return replace(setting, **values, wave=min(1.0, max(0.02, hand)) if raised > 0.5 else 0.0, zoom=max(1.0, math.exp(zoom)))


UNITS = np.array(list(POSE.values()), np.float32)


class PoseReader(nn.Module):
    """Pixels (N, 3, 64, 64) in [-1, 1] to poses (N, P) in the units of `POSE`."""

    def __init__(self, widths=(16, 32, 48, 64, 72), hidden=80):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, 2, 1), nn.SiLU(), *(block(a, b, 1 if a == widths[0] else 2) for a, b in pairwise(widths)),
            nn.Flatten(), nn.Linear(16 * widths[-1], hidden), nn.SiLU(),
        )  # fmt: skip
        self.pose = nn.Linear(hidden, len(POSE))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.pose(self.trunk(pixels))

    @torch.no_grad()
    def read(self, clip: np.ndarray) -> np.ndarray:
        """The trajectory float32 (T, P), in `Context`'s units as `pose_of` has them, of frames uint8 (T, H, W, 3) of any size."""
        return self(pixels_of(clip)).numpy() * UNITS


def pixels_of(frames: np.ndarray) -> Tensor:
    """(T, 3, 64, 64) in [-1, 1]."""
    from PIL import Image

    if frames.shape[1:3] != (SIZE, SIZE):
        frames = np.stack([np.asarray(Image.fromarray(frame).resize((SIZE, SIZE), Image.Resampling.LANCZOS)) for frame in frames])
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---- from trajectories to motions ----


def trajectory_of(context: Context, motion: Motion, frames: int) -> np.ndarray:
    """float32 (T, P): the true one."""
    return np.stack([pose_of(moment) for moment in clips.contexts(context, motion, frames)])


def distances(trajectory: np.ndarray) -> dict[str, float]:
    """Motion -> how far the trajectory (T, P) is from the nearest that this motion can have: root mean square, in the units of `POSE`.

    About 1 is as far as from standing still to moving. What a setting has at rest does not count.
    """
    found = _moving(trajectory)
    return {name: float(np.sqrt(np.square(found - known).mean((1, 2)).min())) for name, known in _trajectories(len(trajectory)).items()}


def recognise(trajectory: np.ndarray) -> str:
    """The motion of `KNOWN` that a trajectory (T, P) is nearest to."""
    found = distances(trajectory)
    return min(found, key=found.__getitem__)


def _moving(trajectory: np.ndarray) -> np.ndarray:
    """In units, without where it rests: `RESTING` around their means."""
    rests = np.array([name in RESTING for name in POSE])
    return (trajectory - trajectory.mean(-2, keepdims=True) * rests) / UNITS


@cache
def _trajectories(frames: int) -> dict[str, np.ndarray]:
    """Motion -> float32 (TRAJECTORIES, T, P), as `_moving` gives them, evenly over phases and both ways."""
    setting = replace(world.draw_context(random.Random(0)), yaw=0.0, tilt=0.0, dx=0.0, dy=0.0)
    found = {}
    for name in KNOWN:
        rng = random.Random(f"trajectories/{name}")
        drawn = [Motion(name, (-1, 1)[k % 2], k / TRAJECTORIES, rng.uniform(0.7, 1.2)) for k in range(TRAJECTORIES)]
        found[name] = np.stack([_moving(trajectory_of(setting, motion, frames)) for motion in drawn])
    return found


# ---- what the network learns on ----


class Moments:
    """`count` frames of clips, each drawn once when it is first needed. `held_out` characters have hair that no model was trained on."""

    def __init__(self, count: int, seed: int, held_out: bool = False):
        self.count, self.seed, self.held_out = count, seed, held_out
        self.picture = cache(self._picture)

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> tuple[Identity, Context]:
        """Every second one is of a motion; in the others everything is moved at once."""
        rng = random.Random(f"moments/{self.seed}/{index}/{self.held_out}")
        identity, setting = world.draw_identity(rng, self.held_out), clips.draw_setting(rng)
        if index % 2:
            return identity, clips.at(setting, clips.draw_motion(rng, rng.choice(KNOWN)), rng.random())
        return identity, jumbled(rng, setting)

    def _picture(self, index: int) -> np.ndarray:
        return drawing.render(*self.scene(index), SIZE)


def jumbled(rng: random.Random, setting: Context) -> Context:
    """Each number of the pose anywhere, or at rest."""

    def moved(rest: float, low: float, high: float, often: float = 0.6) -> float:
        return rng.uniform(low, high) if rng.random() < often else rest

    zoom = moved(1.0, 1.0, 1.8, 0.5)
    room = 0.5 * (1 - 1 / zoom)  # beyond which the camera sees nothing
    return replace(
        setting, yaw=moved(setting.yaw, -1, 1), nod=moved(0, -1.2, 1.2), tilt=moved(setting.tilt, -18, 18),
        dx=moved(setting.dx, -0.16, 0.16), dy=moved(setting.dy, -0.16, 0.06), blink=moved(0, 0, 1), talk=moved(0, 0, 1),
        wave=moved(0, 0.02, 1, 0.5), zoom=zoom, pan=moved(0, -room, room), roll=moved(0, -16, 16) if zoom > 1.25 else 0.0,
    )  # fmt: skip
