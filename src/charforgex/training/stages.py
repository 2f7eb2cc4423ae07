"""The networks of the embedded base and how each is trained, from nothing, on rendered pictures. See `pretraining.py` for the command.

Every class has `batch(bank, indices, rng)`, which makes a micro-batch, `losses` of one, and `measure(bank)` on a bank that was not
trained on. Pixels are uint8 (B, H, W, 3) in a bank and (B, 3, H, W) in [-1, 1] here.
"""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from charforgex.charworld import models
from charforgex.charworld.assets import ROOT
from charforgex.charworld.judge import Judge
from charforgex.charworld.world import ATTRIBUTES, visible_attributes
from charforgex.data.rendered import RenderedBank
from charforgex.draws import torch_generator
from charforgex.families.base import Family
from charforgex.runs import replace_atomic
from charforgex.training.live import LiveText
from charforgex.training.losses import diffusion_loss
from charforgex.training.module import DenoiserModule, StepModule
from charforgex.types import Batch, Components, Crop

UNSAID = -100  # cross_entropy's ignore_index


def pixels_of(bank: RenderedBank, indices: Sequence[int]) -> Tensor:
    """(B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack([bank.pixels[i] for i in indices])).permute(0, 3, 1, 2).float() / 127.5 - 1


def labels_of(named: Sequence[dict[str, str]]) -> dict[str, Tensor]:
    """Attribute -> (B,) class indices, `UNSAID` where the picture or caption does not show it."""
    return {
        name: torch.tensor([values.index(row[name]) if name in row else UNSAID for row in named])
        for name, values in ATTRIBUTES.items()
    }  # fmt: skip


class AttributeHeads(nn.Module):
    """Reads every attribute off one vector."""

    def __init__(self, width: int):
        super().__init__()
        self.sizes = [len(values) for values in ATTRIBUTES.values()]
        self.net = nn.Linear(width, sum(self.sizes))

    def forward(self, x_BD: Tensor) -> dict[str, Tensor]:
        return dict(zip(ATTRIBUTES, self.net(x_BD).split(self.sizes, -1), strict=True))


def attribute_losses(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """Cross-entropy (B,), averaged over the attributes, each over the rows that name it."""
    terms = []
    for name in ATTRIBUTES:
        loss = F.cross_entropy(logits[name], labels[name], ignore_index=UNSAID, reduction="none")
        terms.append(loss * len(loss) / (labels[name] != UNSAID).sum().clamp(min=1))
    return torch.stack(terms).mean(0)


def attribute_accuracy(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, float]:
    said = {n: labels[n] != UNSAID for n in ATTRIBUTES}
    return {n: (logits[n].argmax(-1) == labels[n])[said[n]].float().mean().item() for n in ATTRIBUTES if said[n].any()}


class Pretraining(StepModule):
    """All parameters of `network`, with micro-batches whose first tensor is the pixels."""

    def __init__(self, network: nn.Module, frozen: Sequence[str] = (), **settings):
        named = (
            {n: p for n, p in network.named_parameters() if not n.startswith(tuple(frozen))} if frozen else dict(network.named_parameters())
        )
        super().__init__(named, **settings)
        self.network = network

    def size(self, micro) -> int:
        return len(micro[0])

    def checkpoint(self) -> dict:
        """What batch norms have seen so far is state, too."""
        found = super().checkpoint()
        found["tensors"] |= {f"buffers/{name}": buffer for name, buffer in self.network.named_buffers()}
        return found

    @torch.no_grad()
    def restore(self, checkpoint: dict, weights_only: bool = False) -> None:
        super().restore(checkpoint, weights_only)
        for name, buffer in self.network.named_buffers():
            if f"buffers/{name}" in checkpoint["tensors"]:  # older checkpoints have none
                buffer.copy_(checkpoint["tensors"][f"buffers/{name}"])


def face_weight(bank: RenderedBank, indices: Sequence[int], size: int) -> Tensor:
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
    """AutoencoderKL by face-weighted squared and absolute error, and a light KL term."""

    kl = 5e-5  # for each latent channel

    def __init__(self, vae: nn.Module, decoder_only: bool = False, **settings):
        super().__init__(vae, ("encoder.", "quant_conv.") if decoder_only else (), **settings)
        self.decoder_only = decoder_only

    @staticmethod
    def batch(bank: RenderedBank, indices: Sequence[int], rng: random.Random) -> tuple[Tensor, Tensor]:
        """Half-size crops: the network is convolutional, so four small pictures teach more than a large one."""
        pixels, weight = pixels_of(bank, indices), face_weight(bank, indices, bank.pixels.shape[1])
        size = bank.pixels.shape[1] // 2
        top, left = rng.choice(range(0, size + 1, 4)), rng.choice(range(0, size + 1, 4))
        return pixels[..., top : top + size, left : left + size], weight[..., top : top + size, left : left + size]

    def losses(self, micro, key: tuple) -> Tensor:
        pixels, weight = micro
        with torch.set_grad_enabled(not self.decoder_only):
            posterior = self.network.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=torch_generator(*key, "posterior"))
        error = self.network.decode(latents).sample - pixels
        losses = (weight * (error.square() + 0.1 * error.abs())).flatten(1).mean(1)
        if self.decoder_only:
            return losses
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar)
        return losses + self.kl * kl.shape[1] * kl.flatten(1).mean(1)

    @torch.no_grad()
    def measure(self, bank: RenderedBank, count: int = 256) -> dict[str, float]:
        """PSNR in dB of decode(mean of encode) over whole pictures: plain, and with the face weighing three times."""
        indices = range(count)
        pixels, weight = pixels_of(bank, indices), face_weight(bank, indices, bank.pixels.shape[1])
        out = torch.cat([self.network.decode(self.network.encode(p).latent_dist.mean).sample for p in pixels.split(32)]).clamp(-1, 1)

        def psnr(w: Tensor) -> float:
            return (10 * torch.log10(4 / ((w * (out - pixels).square()).sum() / (3 * w.sum())))).item()

        return {"psnr": psnr(torch.ones_like(weight)), "psnr_face_weighted": psnr(weight)}

    @torch.no_grad()
    def latent_statistics(self, bank: RenderedBank, count: int = 512) -> tuple[float, float]:
        """Mean and standard deviation over all channels."""
        latents = torch.cat([self.network.encode(p).latent_dist.mean for p in pixels_of(bank, range(count)).split(64)])
        return latents.mean().item(), latents.std().item()


class TextNetworks(nn.Module):
    """CLIP, whose text tower is the base's second encoder, the first encoder, and the heads that teach them."""

    def __init__(self):
        super().__init__()
        self.tokens = models.tokenizer()
        self.clip, self.text_encoder = models.clip(self.tokens), models.text_encoder(self.tokens)
        widths = {"pooled": 128, "penultimate_2": 128, "penultimate_1": 64, "image": 128}
        self.heads = nn.ModuleDict({name: AttributeHeads(width) for name, width in widths.items()})

    def read(self, ids: Tensor) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
        """The projected text vector and every head's reading of the text."""
        length = (ids == self.tokens.eos_token_id).int().argmax(-1)
        mask = (torch.arange(ids.shape[1], device=ids.device) <= length[:, None])[..., None].float()

        def mean(states: Tensor) -> Tensor:
            return (states * mask).sum(1) / mask.sum(1)

        two = self.clip.text_model(ids, output_hidden_states=True)
        pooled = self.clip.text_projection(two.pooler_output)
        one = self.text_encoder(ids, output_hidden_states=True)
        vectors = {"pooled": pooled, "penultimate_2": mean(two.hidden_states[-2]), "penultimate_1": mean(one.hidden_states[-2])}
        return pooled, {name: self.heads[name](vector) for name, vector in vectors.items()}

    def see(self, pixels: Tensor) -> Tensor:
        return self.clip.visual_projection(self.clip.vision_model(pixels).pooler_output)

    def save(self, out: Path, write: Callable[[nn.Module, Path], None]) -> None:
        from transformers import CLIPTextModelWithProjection

        two = CLIPTextModelWithProjection(self.clip.config.text_config)
        two.load_state_dict({name: t for name, t in self.clip.state_dict().items() if name.startswith("text_")})
        for network, folder in ((self.text_encoder, "sdxl/text_encoder"), (two, "sdxl/text_encoder_2"), (self.clip, "clip")):
            write(network, out / folder)
        for folder in ("sdxl/tokenizer", "sdxl/tokenizer_2", "clip"):
            self.tokens.save_pretrained(out / folder)


class TextModule(Pretraining):
    """CLIP by its contrastive loss (Radford et al. 2021), and both text encoders by reading attributes back from what captions name.

    The read-out acts on the vectors that the base model sees: each encoder's penultimate states, averaged over the tokens, and the
    pooled projection.
    """

    def __init__(self, **settings):
        super().__init__(TextNetworks(), **settings)

    def batch(self, bank: RenderedBank, indices: Sequence[int], rng: random.Random):
        captions, named = zip(*(bank.caption(i, rng) for i in indices), strict=True)
        tokens = self.network.tokens(list(captions), padding="longest", max_length=models.LENGTH, truncation=True, return_tensors="pt")
        shown = [visible_attributes(*bank.scene(i)) for i in indices]
        return pixels_of(bank, indices), tokens.input_ids, labels_of(named), labels_of(shown)

    def losses(self, micro, key: tuple) -> Tensor:
        pixels, ids, said, shown = micro
        text, readings = self.network.read(ids)
        image = self.network.see(pixels)
        scale = self.network.clip.logit_scale.exp().clamp(max=60)
        scores = scale * F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T
        same = torch.arange(len(scores), device=scores.device)
        losses = (F.cross_entropy(scores, same, reduction="none") + F.cross_entropy(scores.T, same, reduction="none")) / 2
        for reading in readings.values():
            losses = losses + attribute_losses(reading, said)
        return losses + 2 * attribute_losses(self.network.heads["image"](image), shown)

    @torch.no_grad()
    def measure(self, bank: RenderedBank, count: int = 256) -> dict[str, float]:
        """Of each head the mean accuracy over the attributes, and how often a caption finds its picture among `count`."""
        pixels, ids, said, shown = self.batch(bank, range(count), random.Random("measure"))
        text, readings = self.network.read(ids)
        image = self.network.see(pixels)
        best = (F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T).argmax(1)
        found = {"caption_finds_picture": (best == torch.arange(count)).float().mean().item()}
        readings = {name: (reading, said) for name, reading in readings.items()} | {"image": (self.network.heads["image"](image), shown)}
        for name, (reading, labels) in readings.items():
            accuracy = attribute_accuracy(reading, labels)
            found[f"{name}_attributes"] = sum(accuracy.values()) / len(accuracy)
        return found


class T5Networks(nn.Module):
    """Flux's and SD3's T5, with the heads that teach it. Their CLIPs are SDXL's."""

    def __init__(self):
        super().__init__()
        self.tokens = models.t5_tokenizer()
        self.t5, self.heads = models.t5(self.tokens), AttributeHeads(192)

    def read(self, ids: Tensor) -> dict[str, Tensor]:
        """The heads' reading. Padding is attended to and averaged over as any token: so the transformers see it."""
        return self.heads(self.t5(ids).last_hidden_state.mean(1))

    def save(self, out: Path, write: Callable[[nn.Module, Path], None]) -> None:
        for folder in ("flux/text_encoder_2", "sd3/text_encoder_3"):
            write(self.t5, out / folder)
        for folder in ("flux/tokenizer_2", "sd3/tokenizer_3"):
            self.tokens.save_pretrained(out / folder)
        copy_clips(out, write)


def copy_clips(out: Path, write: Callable[[nn.Module, Path], None]) -> None:
    """SDXL's CLIPs as Flux (its second) and SD3 (both) have them: shorter, since no caption is longer, and SD3's with projections."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    load = {"dtype": torch.float32, "use_safetensors": True}
    small = CLIPTextModelWithProjection.from_pretrained(ROOT / "sdxl/text_encoder", **load)  # without its projection
    nn.init.eye_(small.text_projection.weight)
    write(small, out / "sd3/text_encoder")
    write(CLIPTextModel.from_pretrained(ROOT / "sdxl/text_encoder_2", **load), out / "flux/text_encoder")
    shutil.copytree(ROOT / "sdxl/text_encoder_2", out / "sd3/text_encoder_2", dirs_exist_ok=True)
    tokens = models.tokenizer()
    tokens.model_max_length = models.SHORT
    for folder in ("flux/tokenizer", "sd3/tokenizer", "sd3/tokenizer_2"):
        tokens.save_pretrained(out / folder)
    origins = {"sd3/text_encoder": "text_encoder", "flux/text_encoder": "text_encoder_2"}
    origins |= dict.fromkeys(("flux/tokenizer", "sd3/tokenizer", "sd3/tokenizer_2"), "tokenizer")
    for copied, source in origins.items():
        for name in ("provenance.json", "LICENSE"):
            shutil.copyfile(ROOT / "sdxl" / source / name, out / copied / name)


class T5Module(Pretraining):
    """T5 by reading attributes back from what captions name, off the mean of the states that the transformers see."""

    def __init__(self, **settings):
        super().__init__(T5Networks(), **settings)

    def batch(self, bank: RenderedBank, indices: Sequence[int], rng: random.Random):
        captions, named = zip(*(bank.caption(i, rng) for i in indices), strict=True)
        fixed = {"padding": "max_length", "max_length": models.SHORT, "truncation": True, "return_tensors": "pt"}
        return self.network.tokens(list(captions), **fixed).input_ids, labels_of(named)

    def losses(self, micro, key: tuple) -> Tensor:
        ids, said = micro
        return attribute_losses(self.network.read(ids), said)

    @torch.no_grad()
    def measure(self, bank: RenderedBank, count: int = 256) -> dict[str, float]:
        """Mean accuracy over the attributes."""
        ids, said = self.batch(bank, range(count), random.Random("measure"))
        accuracy = attribute_accuracy(self.network.read(ids), said)
        return {"t5_attributes": sum(accuracy.values()) / len(accuracy)}


class JudgeModule(Pretraining):
    """The judge by supervised contrast (Khosla et al. 2020) among look-alikes, and cross-entropy on what pictures show."""

    group = 4  # pictures of each character in a batch
    temperature = 0.08

    def __init__(self, **settings):
        super().__init__(Judge(), **settings)

    @classmethod
    def batch(cls, bank: RenderedBank, indices: Sequence[int], rng: random.Random):
        """As many pictures as `indices`, of pairs of characters that look alike, `group` of each, with colours and noise jittered."""
        v = bank.variants
        pairs = rng.sample(range(len(bank) // (2 * v)), len(indices) // (2 * cls.group))
        chosen = [(2 * pair + twin) * v + k for pair in pairs for twin in (0, 1) for k in rng.sample(range(v), cls.group)]
        pixels = pixels_of(bank, chosen)
        gain = torch.tensor([[rng.uniform(0.9, 1.1) for _ in range(3)] for _ in chosen])[:, :, None, None]
        pixels = pixels * gain + 0.04 * torch.randn(pixels.shape, generator=torch_generator(rng.random()))
        return pixels, torch.tensor([i // v for i in chosen]), labels_of([visible_attributes(*bank.scene(i)) for i in chosen])

    def losses(self, micro, key: tuple) -> Tensor:
        pixels, who, shown = micro
        embedding, logits = self.network(pixels)
        itself = torch.eye(len(who), dtype=torch.bool, device=who.device)
        scores = (embedding @ embedding.T / self.temperature).masked_fill(itself, -1e9)
        same = ((who[:, None] == who) & ~itself).float()
        contrast = -(F.log_softmax(scores, dim=-1) * same).sum(1) / same.sum(1)
        return contrast + 2 * attribute_losses(logits, shown)

    @torch.no_grad()
    def measure(self, bank: RenderedBank, characters: int = 100, gallery: int = 4) -> dict[str, float]:
        """Rank-1 among `characters`, every second a look-alike of the one before, from `gallery` pictures each; attribute accuracy."""
        v = bank.variants
        indices = range(characters * v)
        readings = [self.network(p) for p in pixels_of(bank, indices).split(200)]
        embedding = torch.cat([e for e, _ in readings]).view(characters, v, -1)
        known = F.normalize(embedding[:, :gallery].mean(1), dim=-1)
        scores = embedding[:, gallery:].flatten(0, 1) @ known.T
        who = torch.arange(characters).repeat_interleave(v - gallery)
        logits = {name: torch.cat([found[name] for _, found in readings]) for name in ATTRIBUTES}
        accuracy = attribute_accuracy(logits, labels_of([visible_attributes(*bank.scene(i)) for i in indices]))
        measures = {"rank_1": (scores.argmax(1) == who).float().mean().item(), "attributes": sum(accuracy.values()) / len(accuracy)}
        return measures | {f"attributes/{name}": value for name, value in accuracy.items()}


class BaseModule(DenoiserModule):
    """The whole denoiser, on a bank's latents and fresh captions; both encoders are frozen.

    One picture in eight carries an invented name, one in ten no caption at all.
    """

    dropout = 0.1

    def __init__(self, family: Family, parts: Components, latents: np.ndarray, **settings):
        trainable, frozen = dict(parts.denoiser.named_parameters()), LiveText(family, Components(parts.source, parts.denoiser_name))
        super().__init__(family, parts.denoiser, family.process(parts), trainable=trainable, live=frozen, **settings)
        self.base, self.latents = parts, latents

    def batch(self, bank: RenderedBank, indices: Sequence[int], rng: random.Random) -> Batch:
        captions = ["" if rng.random() < self.dropout else bank.caption(i, rng)[0] for i in indices]
        posterior = torch.from_numpy(np.stack([self.latents[i] for i in indices])).float()
        side = bank.pixels.shape[1]
        return Batch(posterior[:, 0], posterior[:, 1], self.family.encode_text(self.base, captions), Crop.whole(len(indices), side, side))


class GuidanceModule(BaseModule):
    """Distils classifier-free guidance into the guidance vector, as Flux.1-dev was (Meng et al. 2023).

    The network, told a guidance g, learns what its own weights at the start give by unsaid + g (said - unsaid); at g = 1 it stays.
    """

    most = 6.0

    def __init__(self, family: Family, parts: Components, latents: np.ndarray, **settings):
        super().__init__(family, parts, latents, **settings)
        self.teacher = copy.deepcopy(parts.denoiser).requires_grad_(False)
        self.unsaid = family.encode_text(parts, [""])

    def losses(self, micro: Batch, key: tuple) -> Tensor:
        clean, noise, t_B = self.objective.draw(self.process, micro, *key)
        noisy = self.process.add_noise(clean, noise, t_B)
        share_B = micro.drawn(lambda count: torch.rand(count, generator=torch_generator(*key, "guidance")))
        guidance_B = 1 + (self.most - 1) * share_B
        with torch.no_grad():
            said = self.family.denoise(self.teacher, noisy, t_B, micro.text, micro.crop)
            unsaid = self.family.denoise(self.teacher, noisy, t_B, self.unsaid[[0] * len(micro)], micro.crop)
        guided = unsaid + guidance_B[:, None, None, None] * (said - unsaid)
        prediction = self.family.denoise(self.denoiser, noisy, t_B, micro.text, micro.crop, guidance_B=guidance_B)
        return diffusion_loss(prediction, guided, torch.ones(len(micro)))


def encode_bank(family: Family, parts: Components, bank, path: Path, pixels: Callable = pixels_of, batch_size: int = 250) -> np.ndarray:
    """Posterior means and standard deviations of a whole bank, float16 (N, 2, C, h, w), kept in `path` and memory-mapped.

    `pixels(bank, rows)` are what the family encodes: of clips there is a T between C and h.
    """
    if not path.exists():
        rows = []
        for start in track(range(0, len(bank), batch_size), "encoding pictures", console=Console(stderr=True)):
            mean, std = family.encode_pixels(parts, pixels(bank, range(start, min(start + batch_size, len(bank)))))
            rows.append(torch.stack([mean, std], 1).half().numpy())
        with replace_atomic(path) as temporary:
            np.save(temporary, np.concatenate(rows))
    return np.load(path, mmap_mode="r")
