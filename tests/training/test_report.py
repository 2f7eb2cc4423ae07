"""What is said before the first step, of each family."""

import pytest
import torch

from charforgex.config import bind, compose
from charforgex.families import registry
from charforgex.training.losses import Objective
from charforgex.training.report import BARS, cut_off, histogram, objective_lines
from charforgex.training.run import check
from charforgex.types import Components

LONG = "a woman with red hair, " * 40


def plan(name: str, *overrides: str, grid=(64, 64), config=None) -> dict[str, str]:
    cfg = compose("train", [f"family={name}", *overrides])
    family, settings = registry.get(name), check(cfg)
    parts = family.tiny()
    parts = Components(parts.source, parts.denoiser_name, parts.modules, parts.config | (config or {}))
    lines = objective_lines(
        family, parts, family.process(parts), bind(Objective, cfg.loss, "loss"), settings.lora, ["a.b", "c.d"], settings.optimizer,
        settings.trainer, 12345, grid,
    )  # fmt: skip
    return dict(lines)


def test_flux():
    """512 px are 32 x 32 tokens, whose shift is e^0.63 = 1.878."""
    said = plan("flux")
    assert said["target"] == "rectified flow, velocity, guidance vector 1"
    assert said["loss"] == "mse, weighting none"
    assert said["noise levels"].endswith("t = 1 noise, logit_normal, shifted by 1.878 for the largest picture")
    assert said["adapter"] == "LoRA, rank 16, alpha 16, scale alpha/rank 1"
    assert said["trains"] == "0.0123 M parameters, 2 layers such as a.b"
    assert plan("flux", config={"guidance_embeds": False})["target"] == "rectified flow, velocity"
    assert "shifted by 3.158 for" in plan("flux", grid=(128, 128))["noise levels"]


def test_sd3():
    said = plan("sd3", "loss.shift=3", "loss.weighting=cosmap")
    assert said["target"] == "rectified flow, velocity"
    assert said["noise levels"].endswith("logit_normal, shifted by 3")
    assert said["loss"].startswith("mse, weighting cosmap: 0.6") and said["loss"].endswith(" to 1.273")


def test_sdxl():
    said = plan("sdxl", "lora.alpha=8")
    assert said["target"] == "DDPM epsilon, scaled_linear betas"
    assert said["loss"].startswith("mse, weighting min-SNR 5: 0.0") and said["loss"].endswith(" to 1.000")
    assert said["noise levels"].endswith("t = 1 noise, uniform")
    assert said["adapter"].startswith("LoRA, rank 16, alpha 8, scale alpha/rank 0.5")


def test_the_histogram_is_of_the_times():
    assert histogram(torch.tensor([0.05, 0.95, 0.95]), bins=2) == "\u2584\u2588"
    bars = plan("flux", grid=(256, 256))["noise levels"].removeprefix("t = 0 clean ")[:10]
    heights = [BARS.index(bar) for bar in bars]
    assert heights[0] == 0 and max(heights) in heights[7:], "2048 px: most of the times are noisy"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sdxl", "1 of 2 are cut off by tokenizer, up to {} tokens; 1 of 2 are cut off by tokenizer_2, up to {} tokens"),
        ("flux", "1 of 2 are cut off by tokenizer, up to {} tokens; 1 of 2 are cut off by tokenizer_2, up to {} tokens"),
        ("sd3", "1 of 2 are cut off by tokenizer, up to {} tokens; 1 of 2 are cut off by tokenizer_2, up to {} tokens; "
                "1 of 2 are cut off by tokenizer_3, up to {} tokens"),
    ],
)  # fmt: skip
def test_each_encoder_says_what_it_cuts_off(name, said):
    family = registry.get(name)
    parts = family.tiny()
    cuts = [cut for _, cut in family.seen_text(parts, LONG)]
    assert cut_off(family, parts, [LONG, "a dog"]) == said.format(*cuts)
    assert cut_off(family, parts, ["a dog"] * 3) == "0 of 3 are cut off"


def test_the_adapter_as_it_is():
    said = plan("sdxl", "lora.kind=dora", "lora.rslora=true", "lora.up_ratio=4", "lora.ranks={b:4}", "lora.alphas={d:8}")["adapter"]
    assert said == (
        "DoRA, rank 4 (16 on 1 layers), alpha 16 (8 on 1 layers), scale alpha/sqrt(rank) 8 (2 on 1 layers), "
        "up learns 4 times as fast (LoRA+)"
    )
    assert plan("sdxl", "lora.init=pissa")["adapter"].startswith("LoRA, from the weights' largest directions (PiSSA), rank 16")
