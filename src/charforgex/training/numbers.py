"""What the numbers of a training are called, in metrics.csv, events.jsonl, TensorBoard and W&B alike. docs/monitoring.md has this table."""

from __future__ import annotations

import re
from typing import NamedTuple


class Number(NamedTuple):
    """<...> in a name stands for any word. What is not `certain` depends on the machine, and is not in metrics.csv."""

    name: str
    when: str
    meaning: str
    certain: bool = True


STEP, MEASURED, SAVED, LINE = "every step", "every evaluation", "every checkpoint and evaluation", "now and then"
NUMBERS = (
    Number("loss", STEP, "what is minimised, mean over the step's examples"),
    Number("loss/t=<from>-<to>", STEP, "the same for the examples whose noise level lies there, if any do; t = 1 is pure noise"),
    Number("loss/temporal", STEP, "of a motion: the loss of whole clips"),
    Number("loss/spatial", STEP, "of a motion: the loss of single frames, in steps that have it"),
    Number("grad_norm", STEP, "length of the gradient, before it is clipped"),
    Number("grad_norm/<optimizer>", STEP, "where there are several optimizers, of each (temporal, spatial)"),
    Number("lr", STEP, "learning rate of the first group of weights"),
    Number("lr/<optimizer>", STEP, "where there are several optimizers, of each"),
    Number("skipped", STEP, "1 where the loss or a gradient was not finite, and nothing was learnt"),
    Number("weight_norm/<block>", SAVED, "length of all that learns in a block of the network, as one vector"),
    Number("identity/lora", MEASURED, "mean cosine of drawn pictures to held-out ones"),
    Number("identity/base", MEASURED, "the same without the LoRA"),
    Number("identity/floor", MEASURED, "of other characters, if there are any"),
    Number("identity/ceiling", MEASURED, "of real training pictures"),
    Number("identity/gain", MEASURED, "how far the LoRA is on the way from base to ceiling"),
    Number("prompt_following/<who>", MEASURED, "lora, base: share of what is asked for that is shown, or CLIP score"),
    Number("clip_score/<who>", MEASURED, "lora, base: CLIP score, where the follower has one besides"),
    Number("diversity/<who>", MEASURED, "lora, base: mean cosine distance between pictures"),
    Number("nearest_training_picture/lora", MEASURED, "mean cosine to the most similar training picture"),
    Number("validation/<who>", MEASURED, "lora, base: error on held-out pictures or clips, at fixed noise and noise levels"),
    Number("validation/t=<time>", MEASURED, "with the LoRA, at one of these noise levels"),
    Number("motion/<measure>/<who>", MEASURED, "of a motion: strength, flicker, drift and likeness of the drawn clips"),
    Number("value", MEASURED, "what the best checkpoint has most of"),
    Number("speed/steps", LINE, "steps a second, without measuring", False),
    Number("speed/examples", LINE, "pictures or clips a second, of all devices", False),
    Number("speed/waiting", LINE, "share of that time that went into waiting for data", False),
    Number("speed/seconds_left", LINE, "until the last step, measuring included", False),
    Number("memory/process", LINE, "GiB of this program in the computer's memory (Linux)", False),
    Number("memory/swapped", LINE, "GiB of it that lie on the disk (Linux)", False),
    Number("memory/gpu", LINE, "GiB of GPU memory in use", False),
    Number("memory/gpu_peak", LINE, "the most there ever was", False),
    Number("memory/gpu_reserved", LINE, "GiB that are kept from other programs", False),
)


def number_of(name: str) -> Number | None:
    """What a name in a log means; of several that fit, the one with the most letters of its own."""
    for number in sorted(NUMBERS, key=lambda number: -len(re.sub("<.*?>", "", number.name))):
        pattern = "".join(".+" if part.startswith("<") else re.escape(part) for part in re.split(r"(<\w+>)", number.name))
        if re.fullmatch(pattern, name):
            return number
    return None


def table() -> str:
    """As docs/monitoring.md has it."""
    rows = [f"| `{n.name}` | {n.when} | {n.meaning} | {'yes' if n.certain else ''} |" for n in NUMBERS]
    return "\n".join(["| name | when | means | in metrics.csv |", "|---|---|---|---|", *rows])
