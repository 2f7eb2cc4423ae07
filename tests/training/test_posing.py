"""The stage `pose` of pre-training."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import charforgex
from charforgex.charworld import poses
from charforgex.charworld.assets import load_pose_reader
from charforgex.training.posing import PoseModule, right_share


def test_a_batch_has_the_frames_and_their_poses():
    moments = poses.Moments(12, seed=1)
    pixels, wanted = PoseModule.batch(moments, [3, 8, 5], random.Random(2))
    assert pixels.shape == (3, 3, 64, 64) and wanted.shape == (3, len(poses.POSE))
    assert wanted[1].numpy() * poses.UNITS == pytest.approx(poses.pose_of(moments.scene(8)[1]), abs=1e-6)
    clean = poses.pixels_of(np.stack([moments.picture(index) for index in (3, 8, 5)]))
    distance = [[(one - other).square().mean().item() for other in clean] for one in pixels]
    assert np.argmin(distance, 1).tolist() == [0, 1, 2] and np.diag(distance).max() < 0.1, "the same, a little changed"
    again = PoseModule.batch(moments, [3, 8, 5], random.Random(2))
    assert torch.equal(again[0], pixels)


def test_the_stage_goes_on_from_the_embedded_reader_which_tells_motions(tmp_path):
    result = charforgex.train(
        experiment="charworld_pretrain", pretrain={"stage": "pose", "start": "embedded", "pictures": 16, "batch_size": 8},
        trainer={"steps": 2, "threads": 1}, optimizer={"lr": 1e-5}, runs_dir=str(tmp_path / "runs"), cache_dir=str(tmp_path / "cache"),
        run_dir=str(tmp_path / "pose"),
    )  # fmt: skip
    assert result["measures"]["motions"] >= 0.85 and result["measures"]["error"] < 0.5
    told = json.loads((Path(result["weights"]) / "pose/provenance.json").read_text())
    assert told["pictures_seen"] == 16 and told["before"]["steps"] > 100
    trained, embedded = load_pose_reader(tmp_path / "pose/weights"), load_pose_reader()
    differences = [(a - b).abs().max().item() for a, b in zip(trained.parameters(), embedded.parameters(), strict=True)]
    assert 0 < max(differences) < 0.1


def test_what_batch_norms_have_seen_is_taken_up_again():
    def fresh():
        torch.manual_seed(0)
        return PoseModule(make_optimizer=lambda trainable: torch.optim.SGD(trainable.values()), learning_rate=lambda step: 1.0)

    module, pixels = fresh(), torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    module.network(pixels)
    after = fresh()
    after.restore(module.checkpoint())
    assert torch.equal(after.network.eval()(pixels), module.network.eval()(pixels))
    assert not torch.equal(fresh().network.eval()(pixels), module.network(pixels))


def test_an_untrained_reader_tells_nothing():
    torch.manual_seed(0)
    assert right_share(poses.PoseReader().eval(), "wave", 3) <= 1 / 3
