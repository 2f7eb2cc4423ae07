"""Adapters inside networks: peft layers in the very diffusers and transformers modules, for training and for generation.

Nothing here is silent: a target that matches no module, a layer of a file that fits none, and an adapter that is not
loaded are all LoraErrors, raised before anything was changed.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import nn

from charforgex.draws import torch_generator
from charforgex.errors import LoraError
from charforgex.lora.state import Lora, LoraLayer, some
from charforgex.types import Components

TRAINED = "default"  # peft's name of the adapter that is being trained
TEXT_PREFIX = "text_model."


def inject(denoiser: nn.Module, targets: Sequence[str], rank: int, alpha: float, seed: int = 0) -> list[str]:
    """Freezes the network and adds a trainable adapter that changes nothing yet. Returns the adapted module paths.

    `targets` are suffixes of module paths, as peft's `target_modules`; one with a * is a pattern of whole paths. Adapter weights are float32 whatever the network's
    dtype. down ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which is kaiming_uniform(a=sqrt 5), drawn from (seed, path); up = 0.
    Raises LoraError if a target matches no linear or convolutional module, or if there is a trained adapter already.
    """
    modules = _adaptable(denoiser)
    if TRAINED in getattr(denoiser, "peft_config", {}):
        raise LoraError(f"{type(denoiser).__name__} has a trained adapter already; load the base model afresh.")
    matches = {target: [path for path in modules if _fits(path, target)] for target in targets}
    unmatched = [target for target, paths in matches.items() if not paths]
    if unmatched or not targets:
        raise LoraError(
            f"lora.targets: {some(unmatched) or 'nothing'} matches no linear or convolutional module of {type(denoiser).__name__}; "
            f"its modules end in {', '.join(sorted({path.rpartition('.')[2] for path in modules if not path[-1].isdigit()}))}."
        )
    wanted = set().union(*matches.values())
    paths = [path for path in modules if path in wanted]  # in the network's order, not the targets'
    layers = {path: _initial(modules[path], path, rank, alpha, seed) for path in paths}
    _insert(denoiser, layers, TRAINED, dtype=torch.float32)
    for parameter in adapter_parameters(denoiser).values():
        parameter.requires_grad_(True)
    return paths


def _fits(path: str, target: str) -> bool:
    return fnmatchcase(path, target) if "*" in target else path == target or path.endswith("." + target)


def _initial(module: nn.Module, path: str, rank: int, alpha: float, seed: int) -> LoraLayer:
    shape = module.weight.shape
    bound = 1 / math.sqrt(shape[1:].numel())
    down = torch.rand(rank, *shape[1:], generator=torch_generator("lora", seed, path)) * (2 * bound) - bound
    return LoraLayer(down, torch.zeros(shape[0], rank, *[1] * (len(shape) - 2)), alpha)


def adapter_parameters(denoiser: nn.Module, name: str = TRAINED) -> dict[str, nn.Parameter]:
    """The live parameters of an adapter: "<module path>.down" and "<module path>.up", in the network's order."""
    found = {}
    for path, layer in _adapted(denoiser, name).items():
        found[f"{path}.down"] = layer.lora_A[_key(name)].weight
        found[f"{path}.up"] = layer.lora_B[_key(name)].weight
    return found


def read_adapter(denoiser: nn.Module, component: str, name: str = TRAINED) -> Lora:
    """A float32 copy on the CPU of the adapter as it stands. Raises LoraError if the network has none of that name."""
    adapted = _adapted(denoiser, name)
    if not adapted:
        raise LoraError(f"{component} has no adapter named {name}; it has {some(_names(denoiser)) or 'none'}.")
    layers = {}
    for path, layer in adapted.items():
        down, up = (factor[_key(name)].weight.detach().to("cpu", torch.float32, copy=True) for factor in (layer.lora_A, layer.lora_B))
        layers[f"{component}.{_spelled(component, path)}"] = LoraLayer(down, up, layer.lora_alpha[_key(name)])
    return Lora(layers)


def read_adapters(networks: Mapping[str, nn.Module], name: str = TRAINED) -> Lora:
    """`read_adapter` of several networks by component, as one."""
    return Lora(
        {path: layer for component, network in networks.items() for path, layer in read_adapter(network, component, name).layers.items()}
    )


def _spelled(component: str, path: str) -> str:
    """A module's path as `Lora` has it: CLIP's always with the prefix that transformers 5 has dropped from one of its classes."""
    is_clip = component.startswith("text_encoder") and path.startswith(("encoder.layers.", TEXT_PREFIX))
    return TEXT_PREFIX + path.removeprefix(TEXT_PREFIX) if is_clip else path


def load_adapter(parts: Components, lora: Lora, name: str, scale: float = 1.0, dtype: torch.dtype | None = None) -> int:
    """Adds a frozen adapter to loaded parts, beside any that are there. Returns the number of adapted layers.

    `dtype` is that of the adapter's weights, None for the dtype of each adapted layer. Every layer must find its module:
    otherwise LoraError names what is left over, and the parts are unchanged. An adapter of that name must not exist.
    """
    lora.check()
    if name in _all_names(parts):
        raise LoraError(f"An adapter named {name} is loaded already; choose another name.")
    missing = [component for component in lora.components() if component not in parts]
    if missing:
        raise LoraError(f"The adapter changes {some(missing)}, which {parts.source} has not loaded; it has {', '.join(parts.networks())}.")
    plan: dict[str, dict[str, LoraLayer]] = {}
    left_over, misfits = [], []
    for component in lora.components():
        modules = _adaptable(parts[component])
        plan[component] = {}
        for path, layer in lora.of(component).items():
            here = path if path in modules else path.removeprefix(TEXT_PREFIX)
            if here not in modules:
                left_over.append(f"{component}.{path}")
            elif tuple(modules[here].weight.shape) != layer.weight_shape:
                misfits.append(f"{component}.{path} {layer.weight_shape} for a weight of {tuple(modules[here].weight.shape)}")
            else:
                plan[component][here] = layer
    if left_over:
        raise LoraError(f"{len(left_over)} of {len(lora)} layers of the adapter fit no module of {parts.source}: {some(left_over)}.")
    if misfits:
        raise LoraError(f"{len(misfits)} of {len(lora)} layers have another size than {parts.source}: {some(misfits)}.")

    for component, layers in plan.items():
        _insert(parts[component], layers, name, dtype)
    count = sum(len(_adapted(parts[component], name)) for component in plan)
    assert count == len(lora), f"{count} modules were adapted by {len(lora)} layers"
    set_scales(parts, {name: scale})
    return count


def set_scales(parts: Components, scales: Mapping[str, float]) -> None:
    """How strongly loaded adapters act: 0 is off, 1 is as trained. Adapters that are not named keep their scale."""
    unknown = [name for name in scales if name not in _all_names(parts)]
    if unknown:
        raise LoraError(f"No adapter named {some(unknown)} is loaded; loaded are {some(_all_names(parts)) or 'none'}.")
    for network in parts.networks().values():
        for name, scale in scales.items():
            for layer in _adapted(network, name).values():
                layer.set_scale(_key(name), scale)


@contextmanager
def without_adapter(*networks: nn.Module) -> Iterator[None]:
    """Inside, the networks compute exactly what the base model does, whatever adapters they hold."""
    layers = [layer for network in networks for layer in _tuner_layers(network).values()]
    before = [layer.disable_adapters for layer in layers]
    with _keeping_gradients(layers):
        for layer in layers:
            layer.enable_adapters(False)
    try:
        yield
    finally:
        with _keeping_gradients(layers):
            for layer, disabled in zip(layers, before, strict=True):
                layer.enable_adapters(not disabled)


@torch.no_grad()
def same_output(network: nn.Module, component: str, expected: Lora, reloaded: Lora) -> list[str]:
    """Paths at which the two adapters do not give equal outputs, bit for bit, for a fixed input to each adapted module.

    `expected` runs in the network's own trained peft layers with its alpha and its dtypes, `reloaded` goes through
    `load_adapter` into a second tree of peft layers around the same base modules. The network is not touched.
    """
    live = _adapted(network, TRAINED)
    wanted, named = expected.of(component), {_spelled(component, path): path for path in live}
    if set(named) != set(wanted):
        different = some(sorted(set(named) ^ set(wanted)))
        raise LoraError(f"The adapter to save and the one in {component} differ in their layers: {different}.")
    shell = nn.Module()
    with _keeping_gradients(live.values()):
        for path, layer in live.items():
            _place(shell, path, layer.get_base_layer())
        parts = Components(f"the trained {component}", component, {component: shell})
        load_adapter(
            parts, Lora({f"{component}.{path}": layer for path, layer in reloaded.of(component).items()}), TRAINED, dtype=torch.float32
        )
        copies = _adapted(shell, TRAINED)
        return [name for name, path in named.items() if not _agree(live[path], wanted[name], copies[path], path)]


def _agree(live: nn.Module, values: LoraLayer, copy: nn.Module, path: str) -> bool:
    weight = live.get_base_layer().weight
    size = (2, weight.shape[1], 8, 8) if weight.ndim == 4 else (2, weight.shape[1])
    x = torch.randn(size, generator=torch_generator("same output", path)).to(weight.device, weight.dtype)
    factors = {f"lora_A.{TRAINED}.weight": values.down, f"lora_B.{TRAINED}.weight": values.up}
    factors = {key: factor.to(weight.device) for key, factor in factors.items()}
    active, scaling, disabled = live._active_adapter, live.scaling[TRAINED], live.disable_adapters
    try:  # as trained: previews may have left it off, scaled, or beside other adapters
        live.set_adapter([TRAINED])
        live.enable_adapters(True)
        live.set_scale(TRAINED, 1.0)
        return torch.equal(torch.func.functional_call(live, factors, (x,)), copy(x))
    finally:
        live.scaling[TRAINED] = scaling
        live.enable_adapters(not disabled)
        live._active_adapter = active


# ---- peft ----


def _insert(network: nn.Module, layers: Mapping[str, LoraLayer], name: str, dtype: torch.dtype | None) -> None:
    """Puts peft layers holding `layers` around modules of `network`, active beside the adapters that are there, frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    before = {path: list(layer.active_adapters) for path, layer in _tuner_layers(network).items()}
    ranks, alphas = ({path: value(layer) for path, layer in layers.items()} for value in (lambda l: l.rank, lambda l: l.alpha))
    (rank, rank_pattern), (alpha, alpha_pattern) = _most_common(ranks), _most_common(alphas)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern, target_modules=_pattern(layers),
    )  # fmt: skip
    with _keeping_gradients(_tuner_layers(network).values()):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are what we want
            # meta weights: peft's own draws would come from, and move, the global random state
            inject_adapter_in_model(config, network, _key(name), low_cpu_mem_usage=True)
        if hasattr(network, "_hf_peft_config_loaded"):
            network._hf_peft_config_loaded = True  # so that diffusers' and transformers' own adapter methods see it
        for path, layer in _adapted(network, name).items():
            factors = layers[path]
            assert math.isclose(layer.scaling[_key(name)], factors.scale), f"peft scales {path} by {layer.scaling[_key(name)]}"
            weight = layer.get_base_layer().weight
            for side, value in ((layer.lora_A, factors.down), (layer.lora_B, factors.up)):
                value = value.to(weight.device, dtype or weight.dtype, copy=True)
                side[_key(name)].weight = nn.Parameter(value, requires_grad=False)
        for path, layer in _tuner_layers(network).items():  # peft has switched all others off, in every layer
            layer.set_adapter([*before.get(path, []), *([_key(name)] if path in layers else [])])
    for parameter in adapter_parameters(network, name).values():
        parameter.requires_grad_(False)


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


def _key(name: str) -> str:
    """An adapter's name as the key of a ModuleDict, where dots are forbidden and some words, such as "type", are taken."""
    return name if name == TRAINED else "adapter:" + name.replace("%", "%25").replace(".", "%2E")


def _name(key: str) -> str:
    return key.removeprefix("adapter:").replace("%2E", ".").replace("%25", "%")


def _tuner_layers(network: nn.Module) -> dict[str, nn.Module]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: module for path, module in network.named_modules() if isinstance(module, BaseTunerLayer)}


def _adapted(network: nn.Module, name: str) -> dict[str, nn.Module]:
    """peft's layers that hold the adapter, by module path."""
    return {path: layer for path, layer in _tuner_layers(network).items() if _key(name) in layer.lora_A}


def _names(network: nn.Module) -> list[str]:
    return list(dict.fromkeys(_name(key) for layer in _tuner_layers(network).values() for key in layer.lora_A))


def _all_names(parts: Components) -> list[str]:
    return list(dict.fromkeys(name for network in parts.networks().values() for name in _names(network)))


def _adaptable(network: nn.Module) -> dict[str, nn.Module]:
    """The network's own linear and convolutional modules by path, as if it held no adapters."""
    tuned = _tuner_layers(network)
    inner = tuple(path + "." for path in tuned)
    found = {}
    for path, module in network.named_modules():
        if path in tuned:
            module = module.get_base_layer()
        elif path.startswith(inner):
            continue
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            found[path] = module
    return found


@contextmanager
def _keeping_gradients(layers) -> Iterator[None]:
    """peft switches gradients on and off whenever adapters are switched; what was trainable before stays so."""
    before = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    *above, last = path.split(".")
    for name in above:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]
    root.add_module(last, module)
