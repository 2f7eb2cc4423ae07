"""Base models as LoRA files know them, without their weights and without diffusers: the names and shapes of the modules to be adapted.

`bases.json` lists the published bases and the embedded ones; `python -m charforgex.families.bases` writes it anew from the networks
themselves, and a test holds it to them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

from charforgex.errors import LoraError
from charforgex.families import registry
from charforgex.lora import identify, lycoris
from charforgex.lora.formats import LoraFile, opened, shapes_of
from charforgex.lora.names import Names, Spelling
from charforgex.lora.state import shown

LISTING = Path(__file__).with_name("bases.json")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Base:
    """One base: `flux_dev`, `sd35_large`; `charworld_sdxl` is embedded. `config` is its denoiser's; `shapes` the weights' by our names."""

    name: str
    family: str
    config: Mapping[str, Any]
    shapes: Mapping[str, Shape]

    @cached_property
    def spelling(self) -> Spelling:
        return registry.spelling(self.family)

    @cached_property
    def names(self) -> Names:
        return Names(self.spelling, self.config)


def names() -> list[str]:
    """All bases, the published ones first, of each family the one that most LoRAs are for first."""
    return list(_listing())


@cache
def get(name: str) -> Base:
    """Raises LoraError for a name that is none."""
    listing = _listing()
    if name not in listing:
        raise LoraError(f"base={name} is no base that is listed; there are {', '.join(listing)}.")
    row = listing[name]
    shapes = {path: tuple(map(int, shape.split("x"))) for shape, paths in row["modules"].items() for path in paths}
    return Base(name, row["family"], row["config"], shapes)


@cache
def _listing() -> dict[str, Any]:
    return json.loads(LISTING.read_text(encoding="utf-8"))


def listed(config: Mapping[str, Any]) -> Mapping[str, Shape] | None:
    """The denoiser's modules of a config that is listed, by path; None for any other."""
    config = json.loads(json.dumps(dict(config), default=str))
    for name, row in _listing().items():
        if row["config"] == config:
            start = registry.spelling(row["family"]).denoiser_name + "."
            return {path.removeprefix(start): shape for path, shape in get(name).shapes.items() if path.startswith(start)}
    return None


def base_of(file_shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str], said: str | None = None) -> Base:
    """The first listed base on which every key of a LoRA file is a module, and every shape fits; of those, the one that is `said`.

    Raises LoraError.
    """
    looks = identify.family_of(file_shapes) or metadata.get("charforgex.family")
    complaints: list[tuple[int, str]] = []
    for base in [get(said)] if said else map(get, names()):
        name = base.name
        if said or looks in (None, base.family, base.spelling.pictures):  # embedded clips have no base of pictures that is listed
            try:
                misfits = list(_misfits(base, file_shapes, metadata))
            except LoraError as error:
                complaints.append((len(file_shapes), str(error)))
                continue
            if not misfits:
                return base
            complaints.append((len(misfits), f"{len(misfits)} layers do not fit {name}, such as {misfits[0]}."))
    family = f"It looks like a LoRA of {shown(looks)}. " if looks else ""
    none = f"No base of it is listed; if it is for one of {', '.join(names())}, say base=<name>."
    raise LoraError(f"{family}{min(complaints, key=itemgetter(0))[1] if complaints else none}")


def _misfits(base: Base, file_shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]) -> Iterator[str]:
    """Modules of the file whose factors are not of the base's size. Raises LoraError for keys that are none of the base's."""
    file = LoraFile({key: tuple(shape) for key, shape in file_shapes.items()}, metadata, base.names, _unread)
    for module, sides in file.sides.items():
        parts = [base.shapes.get(name) for name, _ in file.parts[module]]
        if None in parts:
            continue
        wanted = (sum(shape[0] for shape in parts), *parts[0][1:])
        found = lycoris.weight_shape({side: file.shapes[key] for side, key in sides.items()})
        if found not in (wanted, (wanted[0], math.prod(wanted[1:]))):
            yield f"{module}: factors of a weight {found} for one of {wanted}"


def _unread(key: str) -> Any:
    """Keys alone are looked at; what is zero and changes nothing is for the reader to say."""
    raise LoraError(f"{key} belongs to no module.")


def base_of_file(path: str | Path, said: str | None = None) -> Base:
    """`base_of` a file, of which no tensor is read."""
    with opened(Path(path)) as file:
        shapes, metadata = shapes_of(file), dict(file.metadata() or {})
    try:
        return base_of(shapes, metadata, said)
    except LoraError as error:
        raise LoraError(f"{path}: {error}") from error


# ---- written from the networks ----

# name -> family, and the folder of the denoiser's config below the family's configs; None for the embedded base
WRITTEN = {
    "sdxl_base": ("sdxl", "."), "flux_dev": ("flux", "dev"), "flux_schnell": ("flux", "schnell"), "sd35_medium": ("sd3", "35_medium"),
    "sd3_medium": ("sd3", "medium"), "sd35_large": ("sd3", "35_large"),
    "sd15": ("sd15", "."), "animatediff_v3": ("animatediff", "v3"), "animatediff_v2": ("animatediff", "v2"),
    "animatediff_sdxl": ("animatediff_sdxl", "."),
    "charworld_sdxl": ("sdxl", None), "charworld_flux": ("flux", None), "charworld_sd3": ("sd3", None),
    "charworld_animatediff": ("animatediff", None),
}  # fmt: skip


def measured(name: str) -> dict[str, Any]:
    """One row of the listing, from networks on the meta device."""
    from charforgex.families.parts import measure_adaptable, read_config
    from charforgex.lora.inject import canonical

    family_name, folder = WRITTEN[name]
    family = registry.spelling(family_name)
    configs = family.configs if folder is not None else Path(__file__).parents[1] / "charworld/assets" / family_name
    texts = registry.spelling(family.pictures).configs if folder is not None and family.pictures else configs
    modules: dict[str, list[str]] = {}
    for component in (family.denoiser_name, *(n for n in family.components["text"] if n.startswith("text_encoder"))):
        config = read_config(configs / (folder or ".") if component == family.denoiser_name else texts, component)
        for path, shape in measure_adaptable(family, component, config).items():
            modules.setdefault("x".join(map(str, shape)), []).append(f"{component}.{canonical(component, path)}")
    config = read_config(configs / (folder or "."), family.denoiser_name)
    return {"family": family_name, "config": config, "modules": modules}


if __name__ == "__main__":
    LISTING.write_text(json.dumps({name: measured(name) for name in WRITTEN}, indent=0) + "\n", encoding="utf-8")
