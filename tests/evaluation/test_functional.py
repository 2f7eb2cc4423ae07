"""On the embedded base: nothing differs from itself, and what has lost everything is as far off as none."""

import pytest
import torch

from charforgex.errors import LoraError
from charforgex.evaluation.functional import check_base, difference
from charforgex.families import bases
from charforgex.lora.formats import open_lora
from charforgex.lora.writing import write_layers
from tests.toolbox.bases_on_disk import lora_for


def test_outputs_of_two_files(tmp_path):
    base = bases.get("charworld_flux")
    path = lora_for("flux", tmp_path / "a.safetensors", pick=lambda name: ".attn.to_q" in name or "self_attn.q_proj" in name)
    with open_lora(path, base.names) as file:
        layers = file.load().layers
    weak = {name: layer.map(lambda factor: factor * 1e-3) for name, layer in layers.items()}
    write_layers(weak.get, list(weak), tmp_path / "b.safetensors", "kohya", base.names, torch.float32)
    assert difference(base, path, path) == {"output_error": 0.0, "effect_error": 0.0}
    lost = difference(base, path, tmp_path / "b.safetensors")
    assert lost["effect_error"] == pytest.approx(1, abs=1e-3) and 0 < lost["output_error"] < 0.5


def test_bases_without_weights_are_refused():
    with pytest.raises(LoraError, match="this LoRA is for flux_dev"):
        check_base(bases.get("flux_dev"))
