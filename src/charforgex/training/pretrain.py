"""Pre-training of the embedded models, one LightningModule each. The denoiser itself is trained by `module.py`.

Pixels arrive as uint8 (B, H, W, 3); captions are made for every draw.
"""

from __future__ import annotations

import random

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from charforgex.charworld import models
from charforgex.charworld.judge import Judge
from charforgex.charworld.world import ATTRIBUTES, visible_attributes
from charforgex.data.rendered import RenderedBank
from charforgex.training.optimizers import Muon, schedule

UNSAID = -100  # cross_entropy's ignore_index


class Draws(IterableDataset):
    """Endless batches of a bank; batch `step` is a function of (seed, step), so a resume begins where it stopped."""

    def __init__(self, bank: RenderedBank, batch_size: int, make, seed: int = 0, first_step: int = 0):
        self.bank, self.batch_size, self.make, self.seed, self.step = bank, batch_size, make, seed, first_step

    def __iter__(self):
        while True:
            rng = random.Random(f"draw/{self.seed}/{self.step}")
            yield self.make(self.bank, rng.sample(range(len(self.bank)), self.batch_size), rng)
            self.step += 1


def pixels_of(bank: RenderedBank, indices) -> Tensor:
    """(B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack([bank.pixels[i] for i in indices])).permute(0, 3, 1, 2).float() / 127.5 - 1


def labels_of(named: list[dict[str, str]]) -> dict[str, Tensor]:
    """Attribute -> (B,) class indices, `UNSAID` where the picture or caption does not show it."""
    return {
        name: torch.tensor([values.index(row[name]) if name in row else UNSAID for row in named])
        for name, values in ATTRIBUTES.items()
    }


class AttributeHeads(nn.Module):
    """Reads every attribute off one vector."""

    def __init__(self, width: int, hidden: int = 0):
        super().__init__()
        self.sizes = [len(values) for values in ATTRIBUTES.values()]
        out = nn.Linear(hidden or width, sum(self.sizes))
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), out) if hidden else out

    def forward(self, x_BD: Tensor) -> dict[str, Tensor]:
        return dict(zip(ATTRIBUTES, self.net(x_BD).split(self.sizes, -1), strict=True))


def attribute_loss(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    terms = [F.cross_entropy(logits[n], labels[n]) for n in ATTRIBUTES if (labels[n] != UNSAID).any()]
    return torch.stack(terms).mean()


def attribute_accuracy(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, float]:
    said = {n: labels[n] != UNSAID for n in ATTRIBUTES}
    return {n: (logits[n].argmax(-1) == labels[n])[said[n]].float().mean().item() for n in ATTRIBUTES if said[n].any()}


class Pretraining(L.LightningModule):
    """A module trained from scratch with Muon and a cosine schedule on a bank of rendered pictures."""

    def __init__(self, lr: float, steps: int, warmup: int = 50):
        super().__init__()
        self.lr, self.steps, self.warmup = lr, steps, warmup

    def configure_optimizers(self):
        optimizer = Muon([p for p in self.parameters() if p.requires_grad], lr=self.lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule("cosine", self.steps, self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def face_weight(bank: RenderedBank, indices, size: int) -> Tensor:
    """(B, 1, H, W): 3 on the head, 1 elsewhere."""
    y, x = torch.meshgrid(*(torch.linspace(0, 1, size),) * 2, indexing="ij")
    weights = []
    for i in indices:
        context = bank.scene(i)[1]
        radius = {"portrait": 0.29, "close-up": 0.38}[context.frame]
        centre = {"portrait": 0.45, "close-up": 0.5}[context.frame]
        weights.append(1 + 2 * (((x - 0.5 - context.dx) ** 2 + (y - centre - context.dy) ** 2) < radius**2).float())
    return torch.stack(weights)[:, None]


class VaeModule(Pretraining):
    """AutoencoderKL by face-weighted squared and absolute error and a light KL term."""

    def __init__(self, lr: float = 2e-3, steps: int = 4000, kl: float = 2e-4):
        super().__init__(lr, steps)
        self.vae, self.kl = models.vae(), kl

    @staticmethod
    def batch(bank, indices, rng):
        """Half-size crops: the network is convolutional, so four small steps teach more than a large one."""
        pixels, weight = pixels_of(bank, indices), face_weight(bank, indices, bank.pixels.shape[1])
        size = bank.pixels.shape[1] // 2
        top, left = rng.choice(range(0, size + 1, 4)), rng.choice(range(0, size + 1, 4))
        return pixels[..., top : top + size, left : left + size], weight[..., top : top + size, left : left + size]

    def training_step(self, batch, _):
        pixels, weight = batch
        posterior = self.vae.encode(pixels).latent_dist
        out = self.vae.decode(posterior.sample()).sample
        error = (weight * ((out - pixels).square() + 0.1 * (out - pixels).abs())).mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        self.log_dict({"error": error, "kl": kl}, prog_bar=True)
        return error + self.kl * kl

    @torch.no_grad()
    def psnr(self, pixels: Tensor, weight: Tensor) -> float:
        """Face-weighted PSNR of decode(mean of encode), in dB over the range [-1, 1]."""
        out = self.vae.decode(self.vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        return (10 * torch.log10(4 / ((weight * (out - pixels).square()).sum() / (3 * weight.sum())))).item()


class ClipModule(Pretraining):
    """CLIP by its contrastive loss, and both text encoders by reading attributes back from what captions name.

    The read-out acts on the vectors that the base model sees: each encoder's penultimate states (mean over the tokens)
    and the pooled projection.
    """

    def __init__(self, lr: float = 2e-3, steps: int = 3000):
        super().__init__(lr, steps)
        self.tokens = models.tokenizer()
        self.clip, self.text_encoder = models.clip(self.tokens), models.text_encoder(self.tokens)
        self.heads = nn.ModuleDict(
            {"pooled": AttributeHeads(128), "penultimate_2": AttributeHeads(128), "penultimate_1": AttributeHeads(64), "image": AttributeHeads(128)}
        )

    def batch(self, bank, indices, rng):
        captions, named = zip(*(bank.caption(i, rng) for i in indices), strict=True)
        ids = self.tokens(list(captions), padding="longest", max_length=models.NAME_LENGTH, truncation=True, return_tensors="pt").input_ids
        return pixels_of(bank, indices), ids, labels_of(named), labels_of([visible_attributes(*bank.scene(i)) for i in indices])

    def read(self, ids: Tensor) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
        """The projected text vector and every head's reading of the text."""
        length = (ids == self.tokens.eos_token_id).int().argmax(-1)
        mask = (torch.arange(ids.shape[1]) <= length[:, None])[..., None].float()
        mean = lambda states: (states * mask).sum(1) / mask.sum(1)  # noqa: E731
        two = self.clip.text_model(ids, output_hidden_states=True)
        pooled = self.clip.text_projection(two.pooler_output)
        one = self.text_encoder(ids, output_hidden_states=True)
        vectors = {"pooled": pooled, "penultimate_2": mean(two.hidden_states[-2]), "penultimate_1": mean(one.hidden_states[-2])}
        return pooled, {name: self.heads[name](vector) for name, vector in vectors.items()}

    def see(self, pixels: Tensor) -> Tensor:
        return self.clip.visual_projection(self.clip.vision_model(pixels).pooler_output)

    def training_step(self, batch, _):
        pixels, ids, said, shown = batch
        text, readings = self.read(ids)
        image = self.see(pixels)
        scores = self.clip.logit_scale.exp().clamp(max=60) * F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T
        same = torch.arange(len(scores))
        contrast = (F.cross_entropy(scores, same) + F.cross_entropy(scores.T, same)) / 2
        text_loss = sum(attribute_loss(r, said) for r in readings.values())
        image_loss = attribute_loss(self.heads["image"](image), shown)
        self.log_dict({"contrast": contrast, "text": text_loss, "image": image_loss}, prog_bar=True)
        return contrast + text_loss + 2 * image_loss


class JudgeModule(Pretraining):
    """The judge by supervised contrast (Khosla et al. 2020) among look-alikes, and cross-entropy on shown attributes.

    A batch holds `group` pictures of each of its characters, and every character's look-alike.
    """

    group = 4

    def __init__(self, lr: float = 1e-3, steps: int = 4000, temperature: float = 0.08):
        super().__init__(lr, steps)
        self.judge, self.temperature = Judge(), temperature

    @classmethod
    def batch(cls, bank, indices, rng):
        """`indices` are taken as seeds of pairs of characters: a character and its look-alike, `group` pictures each."""
        v = bank.variants
        pairs = rng.sample(range(len(bank) // (2 * v)), len(indices) // (2 * cls.group))
        chosen = [(2 * pair + twin) * v + k for pair in pairs for twin in (0, 1) for k in rng.sample(range(v), cls.group)]
        pixels = pixels_of(bank, chosen)
        gain = torch.tensor([[rng.uniform(0.9, 1.1) for _ in range(3)] for _ in chosen])[:, :, None, None]
        pixels = pixels * gain + 0.04 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
        shown = [visible_attributes(*bank.scene(i)) for i in chosen]
        return pixels, torch.tensor([i // v for i in chosen]), labels_of(shown)

    def training_step(self, batch, _):
        pixels, who, shown = batch
        embedding, logits = self.judge(pixels)
        scores = (embedding @ embedding.T / self.temperature).fill_diagonal_(-1e9)
        same = (who[:, None] == who).float().fill_diagonal_(0)
        contrast = -(F.log_softmax(scores, dim=-1) * same).sum(1).div(same.sum(1)).mean()
        attributes = attribute_loss(logits, shown)
        self.log_dict({"contrast": contrast, "attributes": attributes}, prog_bar=True)
        return contrast + 2 * attributes
