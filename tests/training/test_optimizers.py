"""Every optimizer by its effect and its state, and the learning rate's schedules."""

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from charforgex.config import compose
from charforgex.errors import ConfigError
from charforgex.training.checkpoints import SafeCheckpointIO
from charforgex.training.loop import fit
from charforgex.training.module import StepModule
from charforgex.training.optimizers import Muon, build_optimizer, check_optimizer, orthogonalise, schedule
from charforgex.training.run import check
from charforgex.training.settings import OptimizerSettings, TrainerSettings

PACKAGES = {"prodigy": "prodigyopt", "schedule_free": "schedulefree"}
LR = {"prodigy": 1.0}


def test_orthogonalise_brings_all_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((6, 20), (20, 6), (8, 8)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.3 and values.max() < 1.3, values  # Jordan's quintic: within about 0.3 of one, not exactly one


def test_muon_moves_a_matrix_by_a_step_of_known_size():
    """The update is 0.2 sqrt(max(out, in)) times an orthogonal matrix: its RMS is about 0.2 of the rate, as AdamW's is."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(16, 64))
    weight.grad = torch.randn(16, 64)
    Muon([weight], lr=0.1).step()
    rms = weight.detach().square().mean().sqrt().item()
    assert rms == pytest.approx(0.1 * 0.2, rel=0.3)


def test_muon_is_adamw_for_vectors():
    torch.manual_seed(0)
    start = torch.randn(5)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    muon = Muon([ours], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    adamw = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(4):
        gradient = torch.randn(5, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        muon.step()
        adamw.step()
    assert torch.allclose(ours, theirs, atol=1e-7)


@pytest.mark.parametrize(("name", "expected"), [("constant", [1, 1, 1]), ("linear", [1, 0.5, 0]), ("cosine", [1, 0.5, 0])])
def test_schedules_by_hand(name, expected):
    factor = schedule(name, steps=10)
    assert [factor(step) for step in (0, 5, 10)] == pytest.approx(expected)


def test_warmup_rises_in_equal_steps():
    factor = schedule("constant", steps=10, warmup=4)
    assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="schedule=step"):
        schedule("step", 10)


# ---- each by its name ----


class Fitting(StepModule):
    """Fits A @ B to a matrix: loss |A @ B - M|^2, with A zero at first, as a LoRA's up is."""

    def __init__(self, name, steps, rate=lambda name: 1.0, ema=0.0):
        generator = torch.Generator().manual_seed(0)
        factors = {"b.down": torch.randn(3, 8, generator=generator), "a.up": torch.zeros(6, 3)}
        self_parameters = {key: nn.Parameter(value) for key, value in factors.items()}
        settings = OptimizerSettings(name=name, lr=LR.get(name, 0.05), schedule="constant")
        super().__init__(
            self_parameters, lambda trainable: build_optimizer(settings, trainable, rate), schedule("constant", steps, 2), grad_clip=0.0,
            ema_decay=ema,
            make_loader=lambda first: DataLoader([[torch.ones(1)]] * (steps - first), batch_size=None, collate_fn=list),
        )  # fmt: skip
        self.down, self.up = self_parameters.values()
        self.goal = torch.randn(6, 8, generator=generator)

    def losses(self, micro, key):
        return (self.up @ self.down - self.goal).square().sum().view(1)

    def value(self):
        with torch.no_grad(), self.averaged():
            return self.losses(None, ()).item()


def learnt(name, steps):
    """Plain steps of the optimizer, without a trainer around them."""
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    module = Fitting(name, steps)
    for _ in range(steps):
        module.losses(None, ()).sum().backward()
        module.solvers[""].step()
        module.solvers[""].zero_grad()
    return module


def trained(name, steps, tmp_path, module=None, total=None, **settings):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    module = module or Fitting(name, total or steps, **settings)
    stop = TrainerSettings(steps=steps, ema=0.0, checkpoint_every=1000, accelerator="cpu")
    fit(module, tmp_path / "checkpoints", stop, [], Console(quiet=True), lambda step: None, 10000, set)
    return module


@pytest.mark.parametrize("name", ["adamw", "prodigy", "schedule_free", "adafactor", "muon"])
def test_each_optimizer_learns(name):
    module = learnt(name, 150)
    start = module.goal.square().sum().item()
    best = torch.linalg.svdvals(module.goal)[3:].square().sum().item()  # of rank 3
    assert (module.value() - best) / (start - best) < 0.1


@pytest.mark.parametrize("name", ["adamw", "prodigy", "schedule_free", "adafactor", "muon"])
def test_each_optimizer_is_resumed_bit_by_bit(name, tmp_path):
    """Six steps, and three plus three with a checkpoint on disk between them and a measurement in one of the two."""
    whole = trained(name, 6, tmp_path / "whole")
    half = trained(name, 3, tmp_path / "half", total=6)
    half.value()
    path = tmp_path / "half" / "kept"
    SafeCheckpointIO().save_checkpoint(half.checkpoint(), path)
    again = Fitting(name, 6)
    again.restore(SafeCheckpointIO().load_checkpoint(path))
    trained(name, 6, tmp_path / "again", module=again)
    expected, found = whole.checkpoint(), again.checkpoint()
    assert expected["tensors"].keys() == found["tensors"].keys() and len(found["tensors"]) > 3
    assert all(torch.equal(expected["tensors"][key], found["tensors"][key]) for key in found["tensors"])
    assert expected["optimizer"] == found["optimizer"]
    types = [
        {key: type(value) for key, value in group.items()} for group in (*whole.solvers[""].param_groups, *again.solvers[""].param_groups)
    ]
    assert types[: len(types) // 2] == types[len(types) // 2 :]  # an int that comes back as a tensor computes otherwise


def test_a_roll_back_to_the_first_step_forgets_the_optimizers_state(tmp_path):
    module = Fitting("adamw", 3)
    start = {key: value.clone() if key == "tensors" else value for key, value in module.checkpoint().items() if key != "tensors"}
    start["tensors"] = {key: value.clone() for key, value in module.checkpoint()["tensors"].items()}
    trained("adamw", 3, tmp_path, module=module)
    module.restore(start)
    assert not module.solvers[""].state and module.step == 0


def test_prodigy_finds_the_rate():
    """d grows from 1e-6 by orders of magnitude, and is what a resumed run goes on with (above)."""
    found = learnt("prodigy", 60).solvers[""].param_groups[0]["d"]
    assert 1e-3 < found < 1


def test_schedule_free_is_measured_at_its_average_and_trains_on_where_it_was(tmp_path):
    """x, the average, is between y, where gradients are taken, and beyond z: y = (1 - beta) z + beta x."""
    module = trained("schedule_free", 5, tmp_path)
    before = {name: p.detach().clone() for name, p in module.trainable.items()}
    z = {name: module.solvers[""].state[p]["z"] for name, p in module.trainable.items()}
    with module.averaged():
        for name, x in module.trainable.items():
            torch.testing.assert_close(0.1 * z[name] + 0.9 * x.detach(), before[name])
            assert not torch.equal(x, before[name])
    assert all(torch.equal(p, before[name]) for name, p in module.trainable.items())
    assert module.solvers[""].param_groups[0]["train_mode"]


def test_adafactor_keeps_rows_and_columns_only(tmp_path):
    module = trained("adafactor", 2, tmp_path)
    shapes = {key: tuple(value.shape) for key, value in module.solvers[""].state[module.down].items() if torch.is_tensor(value)}
    assert shapes["exp_avg_sq_row"] == (3,) and shapes["exp_avg_sq_col"] == (8,) and "exp_avg_sq" not in shapes


def test_rates_by_name_make_groups_that_move_by_their_own_steps(tmp_path):
    """LoRA+: AdamW's first step is the rate itself in every weight, here sixteen times as large in up."""
    module = Fitting("adamw", 1, rate=lambda name: 16.0 if name.endswith(".up") else 1.0)
    down = module.down.detach().clone()
    trained("adamw", 1, tmp_path, module=module)
    warm = 1 / 3  # of two warm-up steps
    assert [group["lr"] for group in module.solvers[""].param_groups] == pytest.approx([0.05 * warm, 0.8 * warm])
    assert module.up.abs().max().item() == pytest.approx(0.8 * warm, rel=1e-4)
    assert (module.down - down).abs().max().item() < 0.05 * warm


# ---- what is refused, and when ----


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer=muon"], "thin factors"),
        (["optimizer=schedule_free"], "trainer.ema=0"),
        (["optimizer=schedule_free", "trainer.ema=0", "optimizer.schedule=cosine"], "optimizer.schedule=constant"),
        (["optimizer.name=prodigy"], "choose optimizer=prodigy"),
        (["optimizer=prodigy", "optimizer.name=adamw", "optimizer.d_coef=2"], "d_coef=2"),
        (["optimizer=prodigy", "lora.up_ratio=16"], r"one rate.*lora\.up_ratio=1,"),
        (["optimizer=prodigy", "text_encoder.lr=1e-4"], r"one rate.*text_encoder\.lr=1,"),
        (["lora.kind=dora", "lora.init=pissa"], r"lora\.init=pissa.*lora\.kind=dora"),
        (["lora.kind=loha", "lora.rslora=true"], r"lora\.rslora=true.*lora\.kind=loha"),
        (["lora.kind=lokr", "lora.up_ratio=16"], r"lora\.up_ratio=16.*lora\.kind=lokr"),
        (["lora.factor=4"], r"lora\.factor=4.*lokr only"),
        (["lora.targets=['re:to_(q']"], r"lora\.targets: re:to_\(q is no regular expression"),
    ],
)
def test_what_excludes_each_other_is_refused_by_name(overrides, words):
    with pytest.raises(ConfigError, match=words):
        check(compose("train", overrides))


def test_an_optimizer_that_cannot_run_here_is_refused_before_anything_is_loaded(monkeypatch):
    with pytest.raises(ConfigError, match=r"NVIDIA GPUs only.*cpu.*optimizer=adamw or adafactor"):
        check_optimizer("adamw8bit", "cpu")
    monkeypatch.setattr("charforgex.training.optimizers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'prodigyopt: pip install "charforgex\[optimizers\]"'):
        check_optimizer("prodigy", "cpu")
    check_optimizer("adamw", "cpu")
