"""Adapters inside networks: peft layers in the very diffusers and transformers modules, for training and for generation.

Nothing here is silent: a target that matches no module, a layer of a file that fits none, and an adapter that is not
loaded are all LoraErrors, raised before anything was changed.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch
from torch import nn

from charforgex.draws import torch_generator
from charforgex.errors import LoraError
from charforgex.lora import tuners
from charforgex.lora.start import first_layer, principal, together
from charforgex.lora.state import Layer, Lora, some
from charforgex.lora.targets import chosen, each
from charforgex.types import Components

TRAINED = "default"  # peft's name of the adapter that is being trained
START = "start of default"  # beside it, what it began with, to be subtracted
TEXT_PREFIX = "text_model."


def inject(
    denoiser: nn.Module, targets: Sequence[str], rank: int, alpha: float, seed: int = 0, *, kind: str = "lora", init: str = "zero",
    rslora: bool = False, factor: int | None = None, ranks: Mapping[str, int] | None = None, alphas: Mapping[str, float] | None = None,
) -> list[str]:  # fmt: skip
    """Freezes the network and adds a trainable adapter that changes nothing yet. Returns the adapted module paths.

    `targets`, and the keys of `ranks` and `alphas` with what differs from `rank` and `alpha`, are patterns (`lora.targets`). `kind` is
    lora, dora, loha or lokr; first weights are `lora.start`'s, float32 whatever the network's dtype. `rslora` scales by alpha / sqrt(rank)
    (Kalajdzievski 2023): the layers have that alpha which says so by the common rule, in every file and tool. With `init` pissa a lora
    begins with the weight's own largest directions; what it began with stays beside it, frozen, and is subtracted: that is training on
    what is left of the weight, but the base itself is not touched.
    Raises LoraError if a pattern matches no linear or convolutional module, or if there is a trained adapter already.
    """
    modules = _adaptable(denoiser)
    if TRAINED in getattr(denoiser, "peft_config", {}):
        raise LoraError(f"{type(denoiser).__name__} has a trained adapter already; load the base model afresh.")
    paths = chosen("lora.targets", targets, list(modules))
    ranks, alphas = each("lora.ranks", ranks, rank, paths), each("lora.alphas", alphas, alpha, paths)
    if rslora:
        alphas = {path: value * ranks[path] ** 0.5 for path, value in alphas.items()}
    if init == "pissa":
        layers = {path: principal(modules[path].weight, path, ranks[path], alphas[path], seed) for path in paths}
        _insert(denoiser, {path: layer.map(torch.clone) for path, layer in layers.items()}, TRAINED, dtype=torch.float32)
        _insert(denoiser, {path: replace(layer, up=-layer.up) for path, layer in layers.items()}, START, dtype=torch.float32)
    else:
        layers = {path: first_layer(kind, modules[path].weight, path, ranks[path], alphas[path], seed, factor) for path in paths}
        _insert(denoiser, layers, TRAINED, dtype=torch.float32)
    for parameter in adapter_parameters(denoiser).values():
        parameter.requires_grad_(True)
    return paths


def adapter_parameters(denoiser: nn.Module, name: str = TRAINED) -> dict[str, nn.Parameter]:
    """The live parameters of an adapter, such as "<module path>.down" and "<module path>.up", in the network's order."""
    return {
        f"{path}.{part}": parameter
        for path, tuner in _adapted(denoiser, name).items()
        for part, parameter in tuners.parameters(tuner, _key(name)).items()
    }


def read_adapter(denoiser: nn.Module, component: str, name: str = TRAINED) -> Lora:
    """A float32 copy on the CPU of the adapter as it stands. Raises LoraError if the network has none of that name."""
    adapted = _adapted(denoiser, name)
    if not adapted:
        raise LoraError(f"{component} has no adapter named {name}; it has {some(_names(denoiser)) or 'none'}.")
    starts = _adapted(denoiser, START) if name == TRAINED else {}
    layers = {}
    for path, tuner in adapted.items():
        layer = tuners.read(tuner, _key(name))
        if path in starts:
            layer = together(layer, tuners.read(starts[path], _key(START)))
        layers[f"{component}.{canonical(component, path)}"] = layer
    return Lora(layers)


def read_adapters(networks: Mapping[str, nn.Module], name: str = TRAINED) -> Lora:
    """`read_adapter` of several networks by component, as one."""
    return Lora(
        {path: layer for component, network in networks.items() for path, layer in read_adapter(network, component, name).layers.items()}
    )


def canonical(component: str, path: str) -> str:
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
    if by_input := [name for name, layer in lora.layers.items() if getattr(layer, "is_by_input", False)]:
        raise LoraError(
            f"{len(by_input)} layers are DoRA by inputs, as OneTrainer has it, which peft does not: {some(by_input)}. "
            "Convert it to LoRA first: charforgex lora convert <file> out=<file.safetensors> kind=lora rank=64 base_weights=<its base>"
        )
    plan: dict[str, dict[str, Layer]] = {}
    left_over, misfits = [], []
    for component in lora.components():
        modules = _adaptable(parts[component])
        plan[component] = {}
        for path, layer in lora.of(component).items():
            here = path if path in modules else path.removeprefix(TEXT_PREFIX)
            if here not in modules:
                left_over.append(f"{component}.{path}")
            elif not layer.fits(modules[here].weight.shape):
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
            for part in (name, START) if name == TRAINED else (name,):
                for layer in _adapted(network, part).values():
                    layer.set_scale(_key(part), scale)


def unload_adapter(parts: Components, name: str) -> None:
    """Takes a loaded adapter out of all parts, which then compute what they did before it came, bit for bit: layers of it alone are the
    base's own modules again. Raises LoraError if there is none of that name."""
    if name not in _all_names(parts):
        raise LoraError(f"No adapter named {name} is loaded; loaded are {some(_all_names(parts)) or 'none'}.")
    key = _key(name)
    for network in parts.networks().values():
        layers = {path: layer for path, layer in _by_path(network).items() if key in layer.scaling}
        with _keeping_gradients(layers.values()):
            for path, layer in reversed(layers.items()):  # what is inside another first
                if len(layer.scaling) > 1:
                    stay = [other for other in layer.active_adapters if other != key]
                    layer.set_adapter(stay)  # else peft would choose another one and switch it on
                    layer.delete_adapter(key)
                    continue
                above, _, last = path.rpartition(".")
                setattr(network.get_submodule(above), last, layer.base_layer)
        getattr(network, "peft_config", {}).pop(key, None)
        if layers and not _tuner_layers(network):
            del network.peft_config
            if hasattr(network, "_hf_peft_config_loaded"):
                network._hf_peft_config_loaded = False


@contextmanager
def without_adapter(*networks: nn.Module) -> Iterator[None]:
    """Inside, the networks compute exactly what the base model does, whatever adapters they hold."""
    layers = [layer for network in networks for layer in _tuner_layers(network)]
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


def acting(*networks: nn.Module) -> Callable[[Sequence[str]], AbstractContextManager]:
    """A context that takes names of adapters: inside, of all that the networks hold these alone act, and others cost nothing.

    Made once, as below, because looking for the layers takes long; layers that come later are not among them.
    """
    layers = [layer for network in networks for layer in _tuner_layers(network)]

    @contextmanager
    def context(names: Sequence[str]) -> Iterator[None]:
        before = [layer._active_adapter for layer in layers]  # set_adapter would switch gradients, too
        for layer in layers:
            layer._active_adapter = [key for key in map(_key, names) if key in layer.scaling]
        try:
            yield
        finally:
            for layer, names_before in zip(layers, before, strict=True):
                layer._active_adapter = names_before

    return context


def leaving_casts_to_autocast(*networks: nn.Module) -> Callable[[], AbstractContextManager]:
    """A context for whole steps, backward pass included, under autocast: in it, peft hands its layers' inputs on as they are.

    Otherwise it casts them to the adapter's float32 and autocast casts them back, which changes no bit and keeps a copy of the input of
    every adapted layer until the backward pass. Made once: looking for the layers takes longer than a step should wait. Plain LoRA
    alone: DoRA takes the precision of its norms from its input.
    """
    from peft.tuners.lora import LoraLayer

    tuners = [layer for network in networks for layer in _tuner_layers(network)]
    layers = [layer for layer in tuners if isinstance(layer, LoraLayer) and not layer.lora_variant]

    @contextmanager
    def context() -> Iterator[None]:
        for layer in layers:
            layer.cast_input_dtype_enabled = False
        try:
            yield
        finally:
            for layer in layers:
                layer.cast_input_dtype_enabled = True

    return context


@torch.no_grad()
def same_output(network: nn.Module, component: str, expected: Lora, reloaded: Lora) -> list[str]:
    """Paths at which the two adapters do not give equal outputs, bit for bit, for a fixed input to each adapted module.

    `expected` runs in the network's own trained peft layers with its alpha and its dtypes, `reloaded` goes through
    `load_adapter` into a second tree of peft layers around the same base modules. The network is not touched.
    """
    live = _adapted(network, TRAINED)
    wanted, named = expected.of(component), {canonical(component, path): path for path in live}
    if set(named) != set(wanted):
        different = some(sorted(set(named) ^ set(wanted)))
        raise LoraError(f"The adapter to save and the one in {component} differ in their layers: {different}.")
    shell = nn.Module()
    bases = {path: _whole(layer.get_base_layer(), path) for path, layer in live.items()}
    with _keeping_gradients(live.values()):
        for path, base in bases.items():
            _place(shell, path, base)
        parts = Components(f"the trained {component}", component, {component: shell})
        load_adapter(
            parts, Lora({f"{component}.{path}": layer for path, layer in reloaded.of(component).items()}), TRAINED, dtype=torch.float32
        )
        copies = _adapted(shell, TRAINED)
        return [name for name, path in named.items() if not _agree(live[path], bases[path], wanted[name], copies[path], path)]


def _whole(base: nn.Module, path: str) -> nn.Module:
    """The module; of one whose weights are split among devices a copy with drawn ones: adapters around it differ there as they do here."""
    if not any(hasattr(parameter, "full_tensor") for parameter in base.parameters()):  # a DTensor, whose import takes its time
        return base
    whole, generator = copy.copy(base), torch_generator("whole", path)
    drawn = {name: torch.randn(split.shape, generator=generator).to(split.device, split.dtype) for name, split in base.named_parameters()}
    whole._parameters = base._parameters | {name: nn.Parameter(value, requires_grad=False) for name, value in drawn.items()}
    return whole


def _agree(live: nn.Module, base: nn.Module, values: Layer, reloaded: nn.Module, path: str) -> bool:
    weight = base.weight
    size = (2, weight.shape[1], 8, 8) if weight.ndim == 4 else (2, weight.shape[1])
    x = torch.randn(size, generator=torch_generator("same output", path)).to(weight.device, weight.dtype)
    factors = {tuners.place(values, name, TRAINED): factor.to(weight.device) for name, factor in values.tensors().items()}
    active, scaling, disabled = live._active_adapter, live.scaling[TRAINED], live.disable_adapters
    try:  # as trained: previews may have left it off, scaled, or beside other adapters
        live.set_adapter([TRAINED])
        live.enable_adapters(True)
        live.set_scale(TRAINED, 1.0)
        if not math.isclose(live.scaling[TRAINED], values.scale):
            return False
        live.scaling[TRAINED] = values.scale
        own = {f"base_layer.{name}": parameter for name, parameter in base.named_parameters()} if base is not live.get_base_layer() else {}
        return torch.equal(torch.func.functional_call(live, factors | own, (x,)), reloaded(x))
    finally:
        live.scaling[TRAINED] = scaling
        live.enable_adapters(not disabled)
        live._active_adapter = active


# ---- peft ----


def _insert(network: nn.Module, layers: Mapping[str, Layer], name: str, dtype: torch.dtype | None) -> None:
    """Puts peft layers holding `layers` around modules of `network`, active beside the adapters that are there, frozen."""
    from peft import inject_adapter_in_model

    before = {tuner: list(tuner.active_adapters) for tuner in _tuner_layers(network)}
    with _keeping_gradients(before):
        for kind in sorted({layer.kind for layer in layers.values()}):
            config = tuners.settings({path: layer for path, layer in layers.items() if layer.kind == kind})
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are what we want
                # meta weights: peft's own draws would come from, and move, the global random state
                inject_adapter_in_model(config, network, _key(name), low_cpu_mem_usage=True)
        if hasattr(network, "_hf_peft_config_loaded"):
            network._hf_peft_config_loaded = True  # so that diffusers' and transformers' own adapter methods see it
        for path, tuner in _adapted(network, name).items():
            tuners.put(tuner, _key(name), layers[path], dtype)
            if ".motion_modules." in path and _input_first not in tuner._forward_pre_hooks.values():
                tuner.register_forward_pre_hook(_input_first, with_kwargs=True)
        for tuner in _tuner_layers(network):  # peft has switched all others off, in every layer
            tuner.set_adapter([*before.get(tuner, []), *([_key(name)] if _key(name) in tuner.scaling else [])])
            tuner.eval()  # LoHa and LoKr draw from the global random state in training mode
    for parameter in adapter_parameters(network, name).values():
        parameter.requires_grad_(False)


def _input_first(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """diffusers 0.42 calls a motion module's `proj_in(input=...)`; peft's layers have another name for their first argument."""
    return (kwargs.pop("input"), *args) if "input" in kwargs else args, kwargs


def _key(name: str) -> str:
    """An adapter's name as the key of a ModuleDict, where dots are forbidden and some words, such as "type", are taken."""
    return name if name == TRAINED else "adapter:" + name.replace("%", "%25").replace(".", "%2E")


def _name(key: str) -> str:
    return key.removeprefix("adapter:").replace("%2E", ".").replace("%25", "%")


def _tuner_layers(network: nn.Module) -> list[nn.Module]:
    return list(_by_path(network).values())


def _by_path(network: nn.Module) -> dict[str, nn.Module]:
    """peft's layers; where kinds differ on one module, the later wraps the earlier, which is its `base_layer`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: module for path, module in network.named_modules() if isinstance(module, BaseTunerLayer)}


def _adapted(network: nn.Module, name: str) -> dict[str, nn.Module]:
    """peft's layers that hold the adapter, by the path of the module that they adapt."""
    return {path.replace(".base_layer", ""): layer for path, layer in _by_path(network).items() if _key(name) in layer.scaling}


def _names(network: nn.Module) -> list[str]:
    return [name for name in dict.fromkeys(_name(key) for layer in _tuner_layers(network) for key in layer.scaling) if name != START]


def _all_names(parts: Components) -> list[str]:
    return list(dict.fromkeys(name for network in parts.networks().values() for name in _names(network)))


def _adaptable(network: nn.Module) -> dict[str, nn.Module]:
    """The network's own linear and convolutional modules by path, as if it held no adapters."""
    tuned = _by_path(network)
    inner = tuple(path + "." for path in tuned)
    found = {}
    for path, module in network.named_modules():
        if inner and path.startswith(inner):
            continue
        module = module.get_base_layer() if path in tuned else module
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
