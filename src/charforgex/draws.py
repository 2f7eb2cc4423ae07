"""Every random draw is a pure function of its key: (seed, step, purpose, ...). Resuming therefore needs no RNG state."""

from __future__ import annotations

import hashlib
import random


def seed_of(*key: object) -> int:
    """A 63-bit seed from any key of ints and strings, the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "big") >> 1


def python_rng(*key: object) -> random.Random:
    return random.Random(seed_of(*key))


def torch_generator(*key: object):
    """A CPU generator: the same numbers on every device."""
    import torch

    return torch.Generator().manual_seed(seed_of(*key))
