"""IFNet: the frame between two frames, at any time between them (Huang et al. 2022, "Real-Time Intermediate Flow Estimation for Video Frame
Interpolation"), in the forms that RIFE 4.6 and 4.13 to 4.25 have, with their parameters' names.

B frames, C channels, H and W pixels. Pictures are in [0, 1], as these networks know them. A flow has four channels: how far away a pixel is
in the first frame (x, y), and in the second one, in pixels. Blocks refine it from coarse to fine; a mask says which frame is to be seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from charforgex.errors import ModelError

TRAINING = ("teacher.", "caltime.")  # parts of published files that only training uses
LEAK = 0.2


@dataclass(frozen=True)
class Layout:
    """`widths`: channels of each block. `head`: hidden and outgoing channels of the network that looks at each frame first, if any.
    `passed`: channels that blocks hand on to the next besides flow and mask. `given`: whether the first block goes on from a flow and a
    mask as the others do, rather than finding them.
    """

    widths: tuple[int, ...] = (192, 128, 96, 64, 32)
    head: tuple[int, int] | None = (16, 4)
    passed: int = 8
    given: bool = False

    @property
    def scales(self) -> tuple[int, ...]:
        """How many times smaller each block sees the frames."""
        return tuple(2**place for place in reversed(range(len(self.widths))))

    @property
    def multiple(self) -> int:
        """What the sizes of frames are padded to: two halvings within the coarsest block."""
        return 4 * self.scales[0]

    def inputs(self, block: int) -> int:
        """Two frames and their features and the time; later also mask, flow and what is passed on."""
        features = 2 * self.head[1] if self.head else 0
        if block == 0:
            return features + (12 if self.given else 7)
        return 12 + features + self.passed


# RIFE 4.6; 4.13 to 4.18; 4.20; 4.25. Others of the same parts are read off their files' shapes.
LAYOUTS = {
    "4.6": Layout((192, 128, 96, 64), None, 0), "4.15": Layout((192, 128, 96, 64), (32, 8), 0),
    "4.20": Layout((384, 192, 96, 48), (32, 8), 0), "4.25": Layout(),
}  # fmt: skip


def warped(pictures_BChw: Tensor, flow_B2hw: Tensor, between: str = "bilinear") -> Tensor:
    """What lies where the flow points to, `between` pixels bilinearly or by "bicubic"; beyond the edge, the edge."""
    height, width = flow_B2hw.shape[2:]
    x = torch.arange(width, device=flow_B2hw.device, dtype=flow_B2hw.dtype) + flow_B2hw[:, 0]
    y = torch.arange(height, device=flow_B2hw.device, dtype=flow_B2hw.dtype)[:, None] + flow_B2hw[:, 1]
    grid = torch.stack([x * (2 / max(1, width - 1)) - 1, y * (2 / max(1, height - 1)) - 1], dim=-1)
    return F.grid_sample(pictures_BChw, grid, mode=between, padding_mode="border", align_corners=True)


def along(pairs: list[Tensor], flow: Tensor, between: str = "bilinear") -> list[Tensor]:
    """The first and the second of each pair (pictures, features) along its half of the flow."""
    return [warped(one, flow[:, :2] if side % 2 == 0 else flow[:, 2:], between) for side, one in enumerate(pairs)]


def resized(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else F.interpolate(tensor, scale_factor=factor, mode="bilinear", align_corners=False)


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    """At half the size."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.LeakyReLU(LEAK))


class Head(nn.Module):
    """Features of one frame, at its size."""

    def __init__(self, hidden: int, outputs: int):
        super().__init__()
        self.cnn0 = nn.Conv2d(3, hidden, 3, 2, 1)
        self.cnn1 = nn.Conv2d(hidden, hidden, 3, 1, 1)
        self.cnn2 = nn.Conv2d(hidden, hidden, 3, 1, 1)
        self.cnn3 = nn.ConvTranspose2d(hidden, outputs, 4, 2, 1)

    def forward(self, pictures_B3hw: Tensor) -> Tensor:
        hidden = pictures_B3hw
        for layer in (self.cnn0, self.cnn1, self.cnn2):
            hidden = F.leaky_relu(layer(hidden), LEAK)
        return self.cnn3(hidden)


class ResConv(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1)
        self.beta = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(x) * self.beta + x, LEAK)


class Block(nn.Module):
    """One step of refinement at one scale."""

    def __init__(self, inputs: int, width: int, passed: int):
        super().__init__()
        self.conv0 = nn.Sequential(convolution(inputs, width // 2), convolution(width // 2, width))
        self.convblock = nn.Sequential(*(ResConv(width) for _ in range(8)))
        # Without anything to pass on, one channel more than flow and mask need: published files have it
        self.lastconv = nn.Sequential(nn.ConvTranspose2d(width, 4 * (5 + (passed or 1)), 4, 2, 1), nn.PixelShuffle(2))

    def forward(self, seen: Tensor, flow: Tensor | None, scale: int) -> tuple[Tensor, Tensor, Tensor]:
        """Change of the flow (4 channels), mask before the sigmoid (1), and what is passed on."""
        seen = resized(seen, 1 / scale)
        if flow is not None:
            seen = torch.cat([seen, resized(flow, 1 / scale) / scale], 1)
        found = resized(self.lastconv(self.convblock(self.conv0(seen))), scale)
        return found[:, :4] * scale, found[:, 4:5], found[:, 5:]


class IFNet(nn.Module):
    def __init__(self, layout: Layout = LAYOUTS["4.25"]):
        super().__init__()
        self.layout = layout
        for place, width in enumerate(layout.widths):
            self.add_module(f"block{place}", Block(layout.inputs(place), width, layout.passed))
        if layout.head:
            self.encode = Head(*layout.head)

    def refined(self, first: Tensor, second: Tensor, time_B: Tensor, start_B5hw: Tensor | None = None) -> Iterator[tuple[Tensor, ...]]:
        """After each block the flow (B, 4, H, W), the mask (B, 1, H, W) in [0, 1], 1 where the first frame is to be seen, and the frame
        (B, 3, H, W) between. Sizes are multiples of `layout.multiple`. `start_B5hw` where `layout.given`: a flow, and the mask's logit.
        """
        frames, time = [first, second], time_B.to(first).view(-1, 1, 1, 1).expand(len(first), 1, *first.shape[2:])
        if self.layout.head:
            frames += [self.encode(first), self.encode(second)]
        flow, mask, passed, moved = None, None, [], frames
        if self.layout.given:
            flow, mask = start_B5hw[:, :4], start_B5hw[:, 4:]
            moved = along(frames, flow)
        for place, scale in enumerate(self.layout.scales):
            seen = torch.cat([*moved, time, *([] if mask is None else [mask]), *passed], 1)
            change, new, left = getattr(self, f"block{place}")(seen, flow, scale)
            flow = change if flow is None else flow + change
            mask = mask + new if mask is not None and not self.layout.head else new  # with a head, each block's mask is whole
            last = place + 1 == len(self.layout.scales)
            between = "bicubic" if last and self.layout.given else "bilinear"  # as `by=dis` does; RIFE's weights know bilinear frames
            moved = along(frames[:2] if last else frames, flow, between)
            passed, share = [left] if self.layout.passed else [], torch.sigmoid(mask)
            yield flow, share, moved[0] * share + moved[1] * (1 - share)

    def forward(self, first: Tensor, second: Tensor, time_B: Tensor, start_B5hw: Tensor | None = None) -> Tensor:
        """The frames (B, 3, H, W) at times in (0, 1) between `first` and `second`, of any size."""
        height, width = first.shape[2:]
        below, beside = -height % self.layout.multiple, -width % self.layout.multiple
        padded = [one if one is None else F.pad(one, (0, beside, 0, below), mode="replicate") for one in (first, second, start_B5hw)]
        *_, (_, _, between) = self.refined(*padded[:2], time_B, padded[2])
        return between[:, :, :height, :width].clamp(0, 1)

    def tiled(self, first: Tensor, second: Tensor, time_B: Tensor, tile: int, overlap: int, start: Tensor | None = None) -> Tensor:
        """As `forward`, in tiles of at most `tile` pixels a side, for frames that do not fit into memory whole.

        Tiles lie on multiples of `layout.multiple`, so that each samples where the whole would; where they overlap, one fades into the
        next. What moves further than about half the `overlap` is not found at their edges.
        """
        height, width = first.shape[2:]
        overlap = -(-overlap // self.layout.multiple) * self.layout.multiple
        rows, columns = (places(size, tile, overlap, self.layout.multiple) for size in (height, width))
        if len(rows) == len(columns) == 1:
            return self(first, second, time_B, start)
        total, weights = torch.zeros_like(first), first.new_zeros(1, 1, height, width)
        for top, bottom in rows:
            for left, right in columns:
                part = (slice(None), slice(None), slice(top, bottom), slice(left, right))
                weight = ramp(top, bottom, height, overlap)[:, None] * ramp(left, right, width, overlap)
                weight = weight.to(first)
                total[part] += self(first[part], second[part], time_B, start if start is None else start[part]) * weight
                weights[part] += weight
        return total / weights


def places(size: int, tile: int, overlap: int, multiple: int) -> list[tuple[int, int]]:
    """Where tiles begin and end along one side; `tile` is rounded up to a multiple, and to twice the overlap, which is one."""
    tile = max(-(-tile // multiple) * multiple, 2 * overlap)
    if size <= tile:
        return [(0, size)]
    return [(start, min(start + tile, size)) for start in range(0, size - overlap, tile - overlap)]


def ramp(start: int, end: int, size: int, overlap: int) -> Tensor:
    """Weights of a tile along one side. Where it meets a neighbour, the outer quarter of the overlap counts nothing, as it sees too little
    around it; from there it rises to 1 over half the overlap, while the neighbour falls.
    """
    position = torch.arange(end - start) + 0.5
    whole = torch.full((end - start,), torch.inf)
    near = torch.minimum(whole if start == 0 else position, whole if end == size else position.flip(0))
    return ((near - overlap / 4) / max(1, overlap / 2)).clamp(0, 1)


# ---- files ----


def load(path: Path, device: torch.device | str = "cpu") -> IFNet:
    """The network of a .safetensors file with the published names, with or without `module.` before them.

    Raises ModelError for other files, with the command that converts a published .pkl.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ModelError(f"weights={path} is no file; name a .safetensors of RIFE 4.6 or 4.13 to 4.25.")
    if path.suffix != ".safetensors":
        raise ModelError(
            f"weights={path} is no .safetensors; other files can hold programs and are never opened here. One you trust is converted by: "
            f"python -c \"import torch, safetensors.torch as s; s.save_file({{k: v.contiguous() for k, v in torch.load('{path.name}', "
            f"map_location='cpu', weights_only=True).items()}}, '{path.stem}.safetensors')\""
        )
    try:
        found = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"weights={path} cannot be read: {error}; take another copy.") from error
    found = {key.removeprefix("module."): tensor for key, tensor in found.items()}
    found = {key: tensor for key, tensor in found.items() if not key.startswith(TRAINING)}
    layout = layout_of({key: tuple(tensor.shape) for key, tensor in found.items()}, path)
    with torch.device("meta"):
        net = IFNet(layout)
    wanted = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    wrong = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != (tuple(found[key].shape) if key in found else None))
    if wrong:
        raise ModelError(
            f"weights={path}: {len(wrong)} tensors are missing, left over or of another shape than IFNet's, such as {wrong[0]}; take "
            "flownet of RIFE 4.6 or 4.13 to 4.25."
        )
    net.load_state_dict({key: tensor.float() for key, tensor in found.items()}, assign=True)
    return net.requires_grad_(False).eval().to(device)


def layout_of(shapes: Mapping[str, tuple[int, ...]], path: Path) -> Layout:
    """Read off the shapes of a file. Raises ModelError if it is none of this network's."""
    last = {int(match[1]): shape for key, shape in shapes.items() if (match := re.fullmatch(r"block(\d)\.lastconv\.0\.weight", key))}
    whole = list(last) and sorted(last) == list(range(len(last))) and all(len(shape) == 4 for shape in last.values())
    if not whole or "encode.0.weight" in shapes:
        why = "its encoder is of RIFE 4.7 to 4.12" if "encode.0.weight" in shapes else "it has no block0.lastconv.0.weight and the like"
        raise ModelError(f"weights={path} is no IFNet that can be read here: {why}; take flownet of RIFE 4.6 or 4.13 to 4.25.")
    head = shapes.get("encode.cnn3.weight")
    widths = tuple(last[place][0] for place in range(len(last)))
    layout = Layout(widths, tuple(head[:2]) if head and len(head) == 4 else None, passed if (passed := last[0][1] // 4 - 5) > 1 else 0)
    return replace(layout, given=shapes.get("block0.conv0.0.0.weight", (0, 0))[1:2] == (replace(layout, given=True).inputs(0),))
