"""`charforgex lora words`: which words an adapter reacts to in another way than its base, and sliders along such a direction.

Some layers read what the text encoders say as it is (`Family.reads_text`): SDXL's keys and values of text, the context embedder of Flux and
SD3. The first block of those two reads what that embedder, a norm and a modulation by time leave of it, and still each token for itself
(`Family.first_reads_text`). The right singular vectors of all such layers' changes together are directions in the space of words, the
strongest first: along them what is read is changed most. A direction is told by the words whose states, less the mean of all words, point
its way.

What other layers read has been mixed by the blocks before them, or is a picture's: its directions have no words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from charforgex.config import Range, bind
from charforgex.errors import ConfigError, LoraError
from charforgex.runs import write_json
from charforgex.toolbox.analyzing import inputs_of
from charforgex.toolbox.common import Inputs, Opened, Outputs, lineage, opened_loras, save, say, written

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console
    from torch import Tensor

    from charforgex.families.base import Family
    from charforgex.lora.lowrank import Product, Spectrum
    from charforgex.lora.state import LoraLayer
    from charforgex.types import Components, Text

WORDS = Path(__file__).with_name("words.txt")
PIECE = 4  # letters: a built-in word that a tokenizer breaks into shorter pieces is none that its encoder has learnt
BATCH = 32
NEAREST = 5  # words at either end of a direction
DRAWN = 5000  # random directions of each kind, by which chance is told
RISK = 0.05  # of taking any of the directions for more than it is


@dataclass(frozen=True, kw_only=True)
class WordsSettings(Inputs, Outputs):
    """conf/lora_words.yaml; `base` is a listed base's name or the address of one. Raises ConfigError for values that need each other."""

    words: Path | None = None
    layers: list[str] | None = None
    count: Annotated[int, Range(at_least=1)] = 8
    slider: int | list[int] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self):
        self.the_path()
        if bool(self.sliding) != (self.out is not None):
            raise ConfigError("slider (which direction) and out (its file) go together: slider=0 out=slider.safetensors, or neither.")
        if self.out is None:
            self.check_unused()

    @property
    def sliding(self) -> list[int]:
        return sorted({self.slider} if isinstance(self.slider, int) else set(self.slider or ()))


def words(cfg: DictConfig) -> dict[str, Any]:
    """Tells the directions, and writes a slider if `slider` and `out` are set. Returns what `<out>.json` says. Raises a CharForgeError."""
    from rich.console import Console

    from charforgex.families import registry

    settings = bind(WordsSettings, cfg, "")
    inputs, source = inputs_of(settings.lora, settings.base)
    path, sliding, device = settings.the_path(), settings.sliding, device_of(settings.device)
    if settings.out is not None:
        settings.check_out([path])
    vocabulary = read_words(settings.words) if settings.words else read_words(WORDS)
    with opened_loras(inputs) as opened:
        settings.check_format(opened)
        if source is None and not opened.base.name.startswith("charworld"):
            raise ConfigError(
                f"What words mean is the base's to say; say base=<diffusers folder, checkpoint or hub id of {opened.base.name}>."
            )
        family = registry.get(opened.base.family)
        names = text_layers(opened, family, settings.layers)
        products = changes(opened, names)
        found = joint(products)
        if not len(found.values):
            raise LoraError(f"{path}: the {len(names)} layers that read the text change nothing.")
        if sliding and (sliding[0] < 0 or sliding[-1] >= len(found.values)):
            raise ConfigError(f"slider={settings.slider}: there are directions 0 to {len(found.values) - 1}.")
        states = encoded(opened, family, names, source or "charworld", vocabulary, settings.words is None, device)
        told = told_by_words(found, states, settings.count)
        result = {"lora": str(path), "base": opened.base.name, "text_layers": names, **told}
        if sliding and not settings.dry_run:
            axes = found.right[sliding]
            meta = lineage(opened, "words", {"slider": sliding, "layers": settings.layers})
            result |= save(opened, settings, lambda name: along(products[name], axes), names, meta)
            write_json(f"{settings.out}.json", result)
    console = Console()
    show(result, console)
    if sliding:
        say(console, written(result))
    return result


def device_of(setting: str) -> str:
    """Raises ConfigError for one that is not there."""
    import torch

    there = torch.cuda.is_available()
    if setting == "cuda" and not there:
        raise ConfigError("device=cuda is not on this machine; say device=cpu, or leave it out.")
    return setting if setting != "auto" else "cuda" if there else "cpu"


# ---- the adapter ----


def text_layers(opened: Opened, family: Family, patterns: Sequence[str] | None) -> list[str]:
    """The first file's layers that read the text itself, or where it has none, its first block's; of those that the patterns choose.

    Raises LoraError if there are none, and ConfigError if the chosen ones read different things.
    """
    from charforgex.lora.targets import chosen

    file = opened.files[0]
    have = [name for name in opened.names if (layer := file.layer(name)) is not None and not layer.is_zero]
    have = [name for name in have if not family.temporal or family.temporal not in name]  # which attend over frames by the same names
    direct, first = (_ending(ends, have, family) for ends in (family.reads_text, family.first_reads_text))
    if not direct and not first:
        those = ", ".join([*family.reads_text, *family.first_reads_text])
        raise LoraError(
            f"{opened.paths[0]}: none of its layers reads the text token by token, as {those} of {family.name} do; "
            "what the others read is mixed with what the blocks before them made of it, and has no words."
        )
    if patterns is None:
        return direct or first
    found = chosen("layers", patterns, direct + first)
    if set(found) & set(direct) and set(found) & set(first):
        raise ConfigError(f"layers: {direct[0]} and {first[0]} read different things and share no directions; choose one of them.")
    return found


def _ending(ends: Sequence[str], names: Sequence[str], family: Family) -> list[str]:
    start = f"{family.denoiser_name}."
    return [name for name in names if name.startswith(start) and any(f".{name}".endswith(f".{end}") for end in ends)]


def changes(opened: Opened, names: Sequence[str]) -> dict[str, Product]:
    """The layers' changes as products. Raises LoraError for DoRA."""
    from charforgex.lora.lowrank import Product, product
    from charforgex.toolbox.decomposing import spectrum

    found = {}
    for name in names:
        layer = opened.files[0].layer(name)
        parts = spectrum(opened, name)  # refuses what is no sum of directions
        found[name] = product(layer) if layer.kind == "lora" else Product(parts.left * parts.values, parts.right, parts.shape)
    return found


def joint(products: Mapping[str, Product]) -> Spectrum:
    """Of all changes on top of each other, which share what they read: right (n, k) are its directions. Their left sides are not kept.

    With U = Q R for each, the stack of the R V has the same right singular vectors and values, and few rows.
    """
    import torch

    from charforgex.lora.lowrank import dense_spectrum

    return dense_spectrum(torch.cat([torch.linalg.qr(found.up).R @ found.down for found in products.values()]))


def along(found: Product, axes: Tensor) -> LoraLayer:
    """What a layer does along directions (n, k) alone: its change times the projection on them, of rank n."""
    from charforgex.lora.lowrank import Product, layer_of

    return layer_of(Product(found.up @ (found.down @ axes.T), axes, found.shape))


# ---- the words ----


def read_words(path: Path) -> list[str]:
    """One a line; lines that begin with # are none. Raises ConfigError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"words={path} cannot be read: {error}; it must be a text file with one word a line.") from error
    found = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if len(found) < 2 * NEAREST:
        raise ConfigError(f"words={path} has {len(found)} words; at least {2 * NEAREST} are needed to tell one from the others.")
    return found


def encoded(
    opened: Opened, family: Family, names: Sequence[str], source: str, vocabulary: Sequence[str], built_in: bool, device: str
) -> dict[str, Tensor]:  # fmt: skip
    """Each word's state (k,), as the layers read it, by what it is called in the report; the trigger that the file names comes first.

    The encoders and the layers before are the base's own, also where the LoRA adapts them.
    """
    import torch

    first = _ending(family.first_reads_text, names, family)
    groups = ("text", "denoiser") if first else ("text",)
    parts = family.load(source, only=groups, dtype=torch.float32 if device == "cpu" else torch.bfloat16, device=device)
    trigger = opened.files[0].metadata.get("charforgex.trigger")
    listed = [word for word in vocabulary if not built_in or known(family, parts, word)]
    path = first[0].partition(".")[2] if first else None
    return word_states(family, parts, list(dict.fromkeys([*([trigger] if trigger else []), *listed])), path)


def known(family: Family, parts: Components, word: str) -> bool:
    """Whether the tokenizers have this word, or long pieces of it."""
    most = max(len(word) // PIECE, len(re.findall(r"\w+|\W", word)))
    return all(count(parts[name], word) <= most for name in family.word_starts(parts))


def count(tokenizer: Any, word: str) -> int:
    return len(tokenizer(word, add_special_tokens=False).input_ids)


def word_states(family: Family, parts: Components, vocabulary: Sequence[str], module: str | None = None) -> dict[str, Tensor]:
    """Each word alone as a caption: the mean of its own tokens' states, less the mean over all words. `module` of the first block: what it
    reads of them. Of families whose encoders follow each other, not side by side, a word has a state for each."""
    import torch

    starts = family.word_starts(parts)
    found: dict[str, list[Tensor]] = {name: [] for name in starts}
    for first in range(0, len(vocabulary), BATCH):
        batch = vocabulary[first : first + BATCH]
        text = family.encode_text(parts, batch)
        tokens_BLD = (text.tokens_BLD if module is None else as_read(family, parts, module, text)).float().cpu()
        for name, start in starts.items():
            ends = [start + count(parts[name], word) for word in batch]
            found[name] += [states[start:end].mean(0) for end, states in zip(ends, tokens_BLD, strict=True)]
    told = {}
    for name, states in found.items():
        suffix = "" if len(starts) == 1 else f" ({'T5' if 'T5' in type(parts[name]).__name__ else 'CLIP'})"
        centred = torch.stack(states) - torch.stack(states).mean(0)
        told |= {word + suffix: state for word, state in zip(vocabulary, centred, strict=True)}
    return told


class _Read(Exception):
    """What a module was about to read."""


def as_read(family: Family, parts: Components, module: str, text: Text) -> Tensor:
    """What a module of the denoiser reads of the text (B, L, D), half way through the noise. The pooled vector, which modulates all tokens
    alike, is that of an empty caption; the denoiser runs as far as the module."""
    import torch

    from charforgex.types import Crop, Text

    def stop(_, inputs):
        raise _Read(inputs[0])

    denoiser, batch = parts.denoiser, len(text)
    side = 2 * family.latent_stride(parts)
    channels = denoiser.config.in_channels // family.channels_per_latent
    noisy = torch.zeros(batch, channels, 2, 2, dtype=denoiser.dtype, device=denoiser.device)
    plain = Text(text.tokens_BLD, family.encode_text(parts, [""]).pooled_BD.expand(batch, -1))
    handle = denoiser.get_submodule(module).register_forward_pre_hook(stop)
    try:
        with torch.no_grad():
            family.denoise(denoiser, noisy, torch.full((batch,), 0.5, device=noisy.device), plain, Crop.whole(batch, side, side))
    except _Read as read:
        return read.args[0]
    finally:
        handle.remove()
    raise AssertionError(f"{module} has not run")


def told_by_words(found: Spectrum, states: Mapping[str, Tensor], most: int) -> dict[str, Any]:
    """The strongest directions by their nearest words, and how likely it is that a random one is as near to any word.

    Of noise, any direction is as likely as another. Of mixtures of all words' states, those are that words lie along: what is nearer to
    a word than noise but not than mixtures is about words, though about no single one.
    """
    import torch

    from charforgex.draws import torch_generator

    names, matrix = list(states), torch.nn.functional.normalize(torch.stack(list(states.values())), dim=1)
    drawn = {"noise": torch.randn(DRAWN, matrix.shape[1], generator=torch_generator("words", "noise"))}
    drawn["mixtures"] = torch.randn(DRAWN, len(names), generator=torch_generator("words", "mixtures")) @ matrix
    reached = {kind: (torch.nn.functional.normalize(rows, dim=1) @ matrix.T).abs().amax(1) for kind, rows in drawn.items()}
    energy = float(found.values.double().square().sum())
    shown = min(most, len(found.values))
    rows = []
    for index in range(shown):
        cosines = matrix @ found.right[index].float()
        if cosines[cosines.abs().argmax()] < 0:  # which end is which means nothing; the nearest word's comes first
            cosines = -cosines
        order = cosines.argsort(descending=True).tolist()
        chance = {kind: (1 + int((usual >= cosines.max()).sum())) / (1 + DRAWN) for kind, usual in reached.items()}
        beyond = {kind for kind, share in chance.items() if share * shown < RISK}
        rows.append({
            "index": index, "value": float(found.values[index]), "share": float(found.values[index]) ** 2 / energy,
            "means": "nothing" if "noise" not in beyond else "a word" if "mixtures" in beyond else "words", "chance": chance,
            "words": {names[i]: float(cosines[i]) for i in order[:NEAREST]},
            "opposite": {names[i]: float(cosines[i]) for i in order[-NEAREST:][::-1] if cosines[i] < 0},
        })  # fmt: skip
    usual = {kind: float(cosines.median()) for kind, cosines in reached.items()}
    return {"vocabulary": len(names), "count": len(found.values), "directions": rows, "usual": usual}


def show(result: Mapping[str, Any], console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"The strongest of {result['count']} directions of the text, for {result['base']}")
    for head, justify in (("", "right"), ("energy", "right"), ("means", "left"), ("words (cosine)", "left"), ("other end", "left")):
        table.add_column(head, justify=justify, overflow="fold")
    for row in result["directions"]:
        ends = [", ".join(f"{escape(word)} {cosine:.2f}" for word, cosine in row[end].items()) for end in ("words", "opposite")]
        style = "dim" if row["means"] == "nothing" else None
        table.add_row(str(row["index"]), f"{100 * row['share']:.2g} %", row["means"], *ends, style=style)
    console.print(table)
    usual = result["usual"]
    said = f"Random directions reach a cosine of {usual['noise']:.2f} with some word, random mixtures of words {usual['mixtures']:.2f}."
    say(console, said)
