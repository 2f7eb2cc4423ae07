"""Lines as both tools print them, and files as they leave them."""

import json
import math

import pytest

from charforgex.backends import ai_toolkit, kohya
from charforgex.backends.common import Said, Step
from charforgex.backends.process import Lines

AI_TOOLKIT = {
    "my_lora:  12%|█▏        | 250/2000 [05:10<36:12,  1.24s/it, lr: 1.0e-04 loss: 3.421e-01]": Step(
        250, 2000, {"lr": 1e-4, "loss": 0.3421}
    ),
    "my_lora:   0%|          | 0/2000 [00:00<?, ?it/s]": Step(0, 2000, {}),
    "Generating Images:  50%|█████     | 1/2 [00:01<00:01,  1.00s/it]": None,
    "Saving at step 250": Said("saving", "Saving at step 250"),
    "Saved optimizer to /out/optimizer.pt": Said("saved", "Saved optimizer to /out/optimizer.pt"),
    "Error running job: no such file": Said("error", "no such file"),
    "torch.OutOfMemoryError: CUDA out of memory.": Said("out of memory", "torch.OutOfMemoryError: CUDA out of memory."),
}
KOHYA = {
    "steps:  13%|██▋        | 440/3300 [21:33<2:20:06,  2.94s/it, avr_loss=0.332]": Step(440, 3300, {"loss": 0.332}),
    "steps:   1%|▏ | 9/900 [00:33<20:06,  2.94s/it, Keys Scaled=12, Average key norm=0.4, avr_loss=1e-05]": Step(9, 900, {"loss": 1e-5}),
    "steps:   0%|          | 0/900 [00:00<?, ?it/s]": Step(0, 900, {}),
    "\x1b[2;36mINFO\x1b[0m caching latents...   train_util.py:1143": Said("phase", "caching latents...   train_util.py:1143"),
    "saving checkpoint: /out/a-step00000250.safetensors": Said("saving", "saving checkpoint: /out/a-step00000250.safetensors"),
    "ERROR    No data found. Please verify arguments": Said("error", "it found no pictures in the dataset"),
    "epoch 2/15": None,
}


@pytest.mark.parametrize("line", AI_TOOLKIT)
def test_ai_toolkits_lines(line):
    assert ai_toolkit.event(line, "my_lora") == AI_TOOLKIT[line]


@pytest.mark.parametrize("line", KOHYA)
def test_kohyas_lines(line):
    assert kohya.event(line, "a") == KOHYA[line]


def test_a_loss_that_is_no_number_is_one_of_the_values():
    line = "steps:  13%|██ | 440/3300 [21:33<2:20:06,  2.94s/it, avr_loss=nan]"
    assert math.isnan(kohya.event(line, "a").numbers["loss"])
    line = "a:  12%|█▏ | 250/2000 [05:10<36:12,  1.24s/it, lr: 1.0e-04 loss: nan]"
    assert math.isnan(ai_toolkit.event(line, "a").numbers["loss"])


def test_lines_end_where_a_bar_draws_itself_again():
    lines = Lines()
    assert lines.feed(b"\rsteps: 1\rsteps: 2\nnext ") == ["steps: 1", "steps: 2"]
    half = "é".encode()
    assert lines.feed(half[:1]) == [] and lines.feed(half[1:] + b"\r") == ["next é"]
    assert lines.feed(b"no end") == [] and lines.rest() == ["no end"] and lines.rest() == []


def test_kohya_goes_on_from_the_newest_whole_state(tmp_path):
    """States of two sittings, the newest of which was not finished."""
    for sitting, step, whole in ((0, 250, True), (0, 500, True), (500, 250, True), (500, 500, False)):
        state = tmp_path / "output" / f"from-{sitting:08d}" / f"a-step{step:08d}-state"
        state.mkdir(parents=True)
        (state / "train_state.json").write_text(json.dumps({"current_epoch": 2, "current_step": step}))
        if whole:
            (state / "random_states_0.pkl").touch()
        (state.parent / f"a-step{step:08d}.safetensors").touch()
    session = kohya.session(tmp_path, "a")
    assert (session.offset, session.out.name, session.state.parent.name) == (750, "from-00000750", "from-00000500")
    assert sorted(kohya.saved(tmp_path, "a")) == [250, 500, 750, 1000]
