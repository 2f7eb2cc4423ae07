"""A plan's numbers against those of the real network: bytes alive at once, multiplications, and what packing takes off."""

import gc

import pytest
import torch
from torch import nn

from charforgex.config import compose
from charforgex.errors import ConfigError
from charforgex.families.quantized import Packing
from charforgex.training.plan_run import described, known, plan, planned, published
from charforgex.training.planning import GIB, Cost, Machine, Plan, candidates, costs, fastest, prepared, run_step
from charforgex.training.run import check, run
from charforgex.training.tally import Tally, held_bytes
from tests.families.rows import PICTURES


def work_of(*overrides: str):
    cfg = compose("train", list(overrides))
    return described(cfg, check(cfg))


def test_what_is_alive_at_once():
    x = torch.zeros(1000, requires_grad=True)
    with Tally() as tally:
        a = x * 2  # 4000 bytes
        b = a.exp()  # keeps its result: 8000
        del a
        assert tally.alive_bytes == 4000
        c = b.view(10, 100)  # a view of b
        assert tally.alive_bytes == 4000
        c.sum().backward()  # a sum, its gradient, and that of b and of a: three at once
    assert tally.alive_bytes == 8000  # b, and x's gradient
    assert 12000 <= tally.peak_bytes <= 16016


def test_multiplications_and_traffic():
    linear, x = nn.Linear(30, 50, bias=False), torch.zeros(7, 30)
    with torch.no_grad(), Tally() as tally:
        y = linear(x)
        assert (tally.flops, tally.moved_bytes, tally.calls) == (2 * 7 * 30 * 50, 0, 1)
        y.add(1)
    assert tally.moved_bytes == 2 * 7 * 50 * 4 and tally.calls == 2
    assert held_bytes(nn.Sequential(linear, linear)) == 30 * 50 * 4


@pytest.mark.parametrize("source", ["tiny", pytest.param("charworld", marks=pytest.mark.slow)])
@pytest.mark.parametrize("row", PICTURES, ids=str)
def test_a_plan_foretells_the_real_step(row, source):
    """To the byte, and to the multiplication. Of packed weights it may foretell more: their unpacking need not meet the peak."""
    small = ["debug=tiny"] if source == "tiny" else []
    work = work_of(*small, f"family={row.family.name}", f"family.source={source}", "data.batch_size=2", "lora.rank=8")
    kind = {"sdxl": "fp8", "flux": "int8", "sd3": "nf4"}[row.family.name]
    plans = [Plan(), Plan(kind, True)]
    found = costs(work, plans)
    for chosen in plans:
        packing = Packing(chosen.quantize) if chosen.quantize else None
        parts = row.family.load(source, ["denoiser", "vae"], packing=packing)
        denoiser = prepared(work, parts.denoiser, chosen)
        gc.collect()
        tally, cost = run_step(work, denoiser), found[chosen]
        parts["vae"].encoder = None
        held = held_bytes(denoiser) + held_bytes(parts["vae"])
        assert cost.held == held
        assert cost.flops == tally.flops
        if chosen.quantize is None:
            assert (cost.step, cost.moved, cost.calls) == (tally.peak_bytes, tally.moved_bytes, tally.calls)
        else:
            assert 1 <= (cost.held + cost.step) / (held + tally.peak_bytes) <= 1.1
            assert cost.moved == pytest.approx(tally.moved_bytes, rel=0.1)
    plain, less = found[plans[0]], found[plans[1]]
    assert less.flops > plain.flops
    assert source == "tiny" or less.step < plain.step  # in so small a base, what unpacking takes is more than what blocks keep
    assert plain.learning == sum(p.numel() for p in denoiser.parameters() if p.requires_grad) * 12  # two averages and the EMA


def test_published_bases_are_planned_from_our_own_configs():
    from charforgex.families import registry

    flux = registry.get("flux")
    assert published(flux, "black-forest-labs/FLUX.1-schnell") == "schnell"
    assert published(registry.get("sd3"), "stabilityai/stable-diffusion-3.5-medium") == "35_medium"
    assert published(flux, "charworld") is None and published(flux, "somebody/else") is None
    base, configs = known(flux, "black-forest-labs/FLUX.1-dev", None)
    assert flux.text_size(base, configs["transformer"]) == (512, 4096, 768)
    assert configs["transformer"]["num_layers"] == 19


def test_the_sizes_of_texts_are_those_that_encoders_give():
    for row in PICTURES:
        parts = row.family.tiny()
        text = row.family.encode_text(parts, ["a man"])
        assert row.family.text_size(parts, parts.denoiser.config) == (*text.tokens_BLD.shape[1:], text.pooled_BD.shape[1])


def cost(memory: float, flops: int) -> Cost:
    return Cost(held=int((memory - 0.6) * GIB / 1.05), learning=0, step=0, drawing=0, flops=flops, moved=0, calls=0)


def test_the_choice_is_the_quickest_of_the_most_exact_that_fit():
    found = {
        Plan(): cost(24, 2), Plan(None, True): cost(18, 3), Plan("int8"): cost(14, 2), Plan("int8", True): cost(9, 3),
        Plan("nf4", True): cost(6, 3),
    }  # fmt: skip
    chosen = {memory: fastest(found, memory * GIB) for memory in (5, 7, 10, 15, 20, 30)}
    assert chosen == {5: None, 7: Plan("nf4", True), 10: Plan("int8", True), 15: Plan("int8"), 20: Plan(None, True), 30: Plan()}
    assert Machine(flops=4, moved=10, calls=2).seconds(Cost(0, 0, 0, 0, 8, 5, 1)) == 3.0


def test_what_was_set_stays():
    assert len(candidates(None, False)) == 6
    assert candidates("fp8", False) == [Plan("fp8", False), Plan("fp8", True)]
    assert candidates("nf4", 3) == [Plan("nf4", 3)]


def test_the_command(capsys):
    found = plan(
        compose(
            "train", ["debug=tiny", "family=sd3", "family.source=tiny", "trainer.memory=100", "data.batch_size=1", "trainer.quantize=int8"]
        )
    )
    assert found["chosen"] == "trainer.quantize=int8 trainer.gradient_checkpointing=false"
    assert all(row["step_seconds"] > 0 and row["memory_bytes"] > 0.6 * GIB for row in found["plans"].values())
    told = capsys.readouterr().out
    assert found["chosen"] in told and "Predicted, not measured" in told
    with pytest.raises(ConfigError, match="encoders that learn are not counted"):
        plan(compose("train", ["text_encoder.lr=1e-5"]))
    with pytest.raises(ConfigError, match="Plans are of a character's training"):
        plan(compose("train", ["experiment=charworld_pretrain", "pretrain.stage=base"]))


def test_a_training_takes_the_plan_that_fits():
    """It is in the config in the plan's place; with less memory the base is packed and blocks are computed twice."""
    tiny = ["debug=tiny", "family=flux", "family.source=tiny", "trainer.plan=auto"]

    def settled(memory: float, *more: str):
        cfg = compose("train", [*tiny, f"trainer.memory={memory}", *more])
        return planned(cfg, check(cfg)).trainer

    roomy = settled(8)
    assert (roomy.quantize, roomy.gradient_checkpointing, roomy.plan, roomy.memory) == (None, False, None, None)
    found = plan(compose("train", [*tiny, "trainer.memory=8"]))["plans"]
    bytes_of = {name: row["memory_bytes"] for name, row in found.items()}
    least = min(bytes_of.values())
    with pytest.raises(ConfigError, match=r"nothing fits 0\.6 GiB"):
        settled(0.6)
    assert f"trainer.quantize={settled(least / GIB + 1e-9).quantize or 'null'}" in min(bytes_of, key=bytes_of.get)
    with pytest.raises(ConfigError, match=r"set trainer\.memory"):
        planned(cfg := compose("train", tiny), check(cfg))
    with pytest.raises(ConfigError, match=r"trainer\.memory=3 changes nothing without"):
        run(compose("train", ["debug=tiny", "trainer.memory=3"]))
