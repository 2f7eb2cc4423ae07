"""Base models from disk or hub: found, recognised, and every weight accounted for."""

from __future__ import annotations

from charforgex.types import Components


def finish(parts: Components, device: str = "cpu") -> Components:
    """What all parts of a frozen base share: eval mode, no gradients, one device."""
    for network in parts.networks().values():
        network.eval().requires_grad_(False).to(device)
    return parts
