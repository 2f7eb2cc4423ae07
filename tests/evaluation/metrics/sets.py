"""Galleries whose vectors are given, so that a metric's number can be worked out by hand."""

import numpy as np
import torch
from PIL import Image

from charforgex.evaluation.gallery import Gallery, Shot
from charforgex.evaluation.metric import Case
from charforgex.evaluation.sight import stamp


def gallery(vectors, prompts=None, name="made up"):
    """Grey pictures that the embedded CLIP is known to see as these unit vectors; a prompt each where none are given."""
    vectors = np.asarray(vectors, np.float32)
    prompts = prompts or [f"prompt {i}" for i in range(len(vectors))]
    found = Gallery(name, [Shot(Image.new("RGB", (8, 8), (i % 256,) * 3), prompt) for i, prompt in enumerate(prompts)])
    rows = iter(torch.from_numpy(vectors))
    found.vectors(f"clip {stamp('charworld', 'clip')}", lambda pictures: torch.stack([next(rows) for _ in pictures]))
    return found


def circle(*angles):
    """Unit vectors in a plane, by their angles in radians."""
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def case(references, **more):
    return Case(gallery(references, name="references"), **more)
