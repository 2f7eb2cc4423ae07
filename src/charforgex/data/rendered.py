"""Pictures of charworld as training data, without files: picture `i` of a bank is a function of (seed, i).

Pictures' and clips' pixels are rendered once, by all cores, into one uint8 array that is memory-mapped from then on; captions are made anew
for every draw, so that the same picture is described in many ways.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from charforgex.charworld import clips, drawing, world

CHUNK = 500


def scene_of(seed: int, index: int, variants: int = 1, held_out: bool = False) -> tuple[world.Identity, world.Context]:
    """Who and what picture `index` shows. Each run of `variants` pictures shows one character.

    With variants, every second character is a look-alike of the one before it: the same words describe both, only the
    unnamed traits and one small named one differ. They are the hard negatives of the identity embedder.
    """
    who = index // variants
    rng = random.Random(f"identity/{seed}/{who // 2 if variants > 1 else who}/{held_out}")
    identity = world.draw_identity(rng, held_out)
    if variants > 1 and who % 2:
        unnamed = {name: rng.uniform(-1, 1) for name in world.CONTINUOUS}
        identity = replace(identity, **unnamed, eye_colour=rng.choice(world.EYE_COLOURS))
    return identity, world.draw_context(random.Random(f"context/{seed}/{index}/{held_out}"))


def _render(seed: int, start: int, stop: int, *, size: int, variants: int, held_out: bool) -> np.ndarray:
    return np.stack([drawing.render(*scene_of(seed, i, variants, held_out), size) for i in range(start, stop)])


def _draw_all(path: Path, shape: tuple[int, ...], draw: Callable[[int, int], np.ndarray], chunk: int = CHUNK) -> None:
    """Fills a file with the rows `draw(start, stop)`, by all cores."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    pixels = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
    with ProcessPoolExecutor() as pool:
        starts = range(0, shape[0], chunk)
        jobs = [pool.submit(draw, start, min(start + chunk, shape[0])) for start in starts]
        for start, job in zip(starts, jobs, strict=True):
            pixels[start : start + chunk] = job.result()
    pixels.flush()
    os.replace(temporary, path)


class RenderedBank:
    """`count` pictures, uint8 (size, size, 3), rendered into `root` on first use."""

    def __init__(self, root: Path, count: int, size: int = 64, seed: int = 0, variants: int = 1, held_out: bool = False):
        self.seed, self.variants, self.held_out = seed, variants, held_out
        self.name = f"{'held' if held_out else 'train'}_{seed}_{count}_{variants}_{size}"
        path = Path(root) / f"{self.name}.npy"
        if not path.exists():
            _draw_all(path, (count, size, size, 3), partial(_render, seed, size=size, variants=variants, held_out=held_out))
        self.pixels = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.pixels)

    def scene(self, index: int) -> tuple[world.Identity, world.Context]:
        return scene_of(self.seed, index, self.variants, self.held_out)

    def caption(self, index: int, rng: random.Random) -> tuple[str, dict[str, str]]:
        """A fresh caption: mostly full sentences, some sparse, one in eight with an invented name instead of traits."""
        identity, context = self.scene(index)
        return world.caption(identity, context, rng, **_manner(rng))


def _manner(rng: random.Random) -> dict[str, Any]:
    name = world.invent_name(rng) if rng.random() < 0.125 else None
    return {"name": name, "keep": rng.choice((0.6, 0.85, 1.0))}


def film_of(seed: int, index: int) -> tuple[world.Identity, world.Context, clips.Motion]:
    """Who moves where and how in clip `index`."""
    rng = random.Random(f"clip/{seed}/{index}")
    return world.draw_identity(rng), clips.draw_setting(rng), clips.draw_motion(rng)


def _film(seed: int, start: int, stop: int, *, size: int) -> np.ndarray:
    return np.stack([clips.draw_clip(*film_of(seed, i), size=size) for i in range(start, stop)])


class RenderedClips:
    """`count` clips of moving characters, uint8 (T, size, size, 3), rendered into `root` on first use."""

    def __init__(self, root: Path, count: int, size: int = 64, seed: int = 0):
        self.seed, self.name = seed, f"clips_{seed}_{count}_{size}"
        path = Path(root) / f"{self.name}.npy"
        if not path.exists():
            _draw_all(path, (count, clips.FRAMES, size, size, 3), partial(_film, seed, size=size), CHUNK // clips.FRAMES)
        self.pixels = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.pixels)

    def caption(self, index: int, rng: random.Random) -> str:
        """A fresh caption, which always says the motion."""
        return clips.clip_caption(*film_of(self.seed, index), rng, **_manner(rng))
