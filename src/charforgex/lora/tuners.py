"""peft's layers by their kind: which settings make them, where they keep the factors, and how strongly DoRA acts."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from charforgex.lora.state import Layer, LohaLayer, LokrLayer, LoraLayer

PLACES = {"down": "lora_A.{}.weight", "up": "lora_B.{}.weight", "magnitude": "lora_magnitude_vector.{}.weight"}
LYCORIS = {"hada": LohaLayer, "lokr": LokrLayer}  # how the names of their factors begin


def settings(layers: Mapping[str, Layer]) -> Any:
    """The peft config of layers of one kind by module path."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    (kind,) = {layer.kind for layer in layers.values()}
    rank, rank_pattern = _most_common({path: layer.rank for path, layer in layers.items()})
    alpha, alpha_pattern = _most_common({path: layer.scale * layer.rank for path, layer in layers.items()})
    common = {"r": rank, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern, "target_modules": _pattern(layers)}
    if kind in ("lora", "dora"):
        return LoraConfig(lora_alpha=alpha, use_dora=kind == "dora", **common)
    return {"loha": LoHaConfig, "lokr": LoKrConfig}[kind](alpha=alpha, **common)


def put(tuner: nn.Module, key: str, layer: Layer, dtype: torch.dtype | None) -> None:
    """Gives peft's layer copies of the factors, frozen, in `dtype`, or that of the weight they change. Magnitudes stay float32."""
    weight = tuner.get_base_layer().weight
    assert math.isclose(tuner.scaling[key], layer.scale), f"peft scales by {tuner.scaling[key]}, not {layer.scale}"
    if not isinstance(layer, LoraLayer):
        for name in tuner.adapter_layer_names:  # peft's own guess of which factors there are
            if key in getattr(tuner, name):
                del getattr(tuner, name)[key]
    for name, value in layer.tensors().items():
        value = value.to(weight.device, torch.float32 if name == "magnitude" else dtype or weight.dtype, copy=True)
        value = value.view(1, -1, 1, 1) if name == "magnitude" and weight.ndim == 4 else value
        parameter = nn.Parameter(value, requires_grad=False)
        holder = getattr(tuner, place(layer, name, key).partition(".")[0])
        if isinstance(layer, LoraLayer):
            holder[key].weight = parameter
        else:
            holder[key] = parameter
    if layer.kind == "dora":
        tuner.lora_variant[key] = _dora()


def _lycoris(tuner: nn.Module) -> str | None:
    return next((prefix for prefix in LYCORIS if hasattr(tuner, prefix + "_w1_a")), None)


def parameters(tuner: nn.Module, key: str) -> dict[str, nn.Parameter]:
    """The live factors of an adapter in peft's layer, by our names."""
    if prefix := _lycoris(tuner):
        factors = {name.removeprefix(prefix + "_"): getattr(tuner, name) for name in tuner.adapter_layer_names}
        return {name: factors[name][key] for name in factors if key in factors[name]}
    found = {"down": tuner.lora_A[key].weight, "up": tuner.lora_B[key].weight}
    return found | ({"magnitude": tuner.lora_magnitude_vector[key].weight} if key in tuner.lora_magnitude_vector else {})


def read(tuner: nn.Module, key: str) -> Layer:
    """A float32 copy on the CPU of what peft's layer holds."""
    values = {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in parameters(tuner, key).items()}
    if prefix := _lycoris(tuner):
        return LYCORIS[prefix](alpha=tuner.alpha[key], **values)
    if "magnitude" in values:
        values["magnitude"] = values["magnitude"].flatten()
    return LoraLayer(alpha=tuner.lora_alpha[key], **values)


def place(layer: Layer, name: str, key: str) -> str:
    """The parameter's name in peft's layer."""
    prefix = {"loha": "hada", "lokr": "lokr"}.get(layer.kind)
    return f"{prefix}_{name}.{key}" if prefix else PLACES[name].format(key)


@functools.cache
def _dora() -> Any:
    """peft's DoRA, but of a strength: 0 is the base's own output and 1 the trained one, on the straight line between them.

    peft's own scale turns the weight and leaves the magnitude at full strength; and beside other adapters it scales theirs as well.
    """
    from peft.tuners.lora.variants import DoraLinearVariant

    class Dora(DoraLinearVariant):
        @staticmethod
        def forward(module: nn.Module, active_adapter: str, x: Tensor, result: Tensor, **_) -> Tensor:
            base, down, up = module.get_base_layer(), module.lora_A[active_adapter], module.lora_B[active_adapter]
            scale = module.lora_alpha[active_adapter] / module.r[active_adapter]
            weight = base.weight  # once: a packed one is unpacked here
            shape = (1, -1, 1, 1) if weight.ndim == 4 else (-1,)
            with torch.no_grad():  # the norm counts as a constant (section 4.3 of the paper)
                moved = weight.float().flatten(1) + scale * (up.weight.flatten(1) @ down.weight.flatten(1))
                norm = torch.linalg.norm(moved, dim=1)
            gain = (module.lora_magnitude_vector[active_adapter].weight.flatten() / norm).view(shape)
            alone = module.base_layer is base and list(module.active_adapters) == [active_adapter]
            plain = result if alone else base(x.to(weight.dtype))
            plain = plain if base.bias is None else plain - base.bias.view(shape)
            change = (gain - 1) * plain + gain * scale * up(down(x))
            return result + change * (module.scaling[active_adapter] / scale)

    return Dora()


def _most_common(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """peft's way to say it: one value for most modules, and a pattern for each of the others.

    One pattern a value, not one a module: peft tries every pattern on every module, and Python forgets compiled
    patterns beyond 512.
    """
    common = Counter(values.values()).most_common(1)[0][0]
    others = defaultdict(list)
    for path, value in values.items():
        if value != common:
            others[value].append(path)
    return common, {_pattern(paths): value for value, paths in others.items()}


def _pattern(paths) -> str:
    return f"^(?:{'|'.join(map(re.escape, paths))})$"
