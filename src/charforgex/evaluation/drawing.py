"""The contestants' pictures: on one loaded base, each prompt and seed with the same noise for all, and none that was drawn before.

A picture lies in the cache under the hash of all that decides it. So another metric, another contestant and a command that was interrupted
draw what is lacking alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charforgex.draws import seed_of
from charforgex.errors import ModelError
from charforgex.evaluation.contestants import Contestant
from charforgex.evaluation.packs import Template, class_of
from charforgex.generation.metadata import LoraUse, Recipe, save_png
from charforgex.generation.report import Bar
from charforgex.generation.settings import SamplingSettings
from charforgex.generation.stack import Adapter, Stack
from charforgex.quiet import quiet
from charforgex.runs import write_json

if TYPE_CHECKING:
    from PIL.Image import Image

    from charforgex.evaluation.gallery import Gallery
    from charforgex.types import Components, Text

NAMES = ("template", "base", "base_is_file")  # of a recipe, that change no picture
SPEED = "speed.json"
WRITERS = 4  # threads that compress and write pictures while the next ones are drawn


@dataclass(frozen=True)
class Ask:
    """One picture that is wanted."""

    template: Template
    prompt: str
    seed: int
    recipe: Recipe
    key: str


@dataclass(frozen=True)
class HeldOut:
    """Pictures whose prediction is looked at while a contestant is loaded, at how many noise levels, and what is said where they have no
    caption."""

    gallery: Gallery
    levels: int
    unsaid: str = ""


class Studio:
    """What all contestants share: base, settings and cache. `size` is (height, width); `shared` is `generation.run.shared`'s."""

    def __init__(
        self, stack: Stack, settings: SamplingSettings, size: tuple[int, int], shared: Mapping[str, Any], device: str, dtype: Any,
        tokenizer: str | None, cache: Path,
    ):  # fmt: skip
        self.stack, self.settings, self.size, self.shared = stack, settings, size, shared
        self.device, self.dtype, self.tokenizer, self.cache = device, dtype, tokenizer, Path(cache) / "pictures"
        self.adapters: dict[Path, Adapter] = {adapter.path: adapter for adapter in stack.adapters}
        self.uses: dict[Path, LoraUse] = {}
        self.drawn, self.seconds = 0, 0.0
        self.batch_size = settings.batch_size
        self.held_out: HeldOut | None = None

    # ---- what is wanted ----

    def asks(
        self, contestant: Contestant, templates: Sequence[Template], seeds: Sequence[int], trigger: str | None, class_word: str | None
    ) -> list[Ask]:
        """Every picture of one contestant, prompt by prompt. Raises ConfigError if a prompt calls the character and nothing says how."""
        what = class_of(trigger, class_word)
        uses = tuple(replace(self._use(path), scale=contestant.scale) for path in contestant.loras)
        found = []
        for template in templates:
            for seed in (noise_seed(template.text, number) for number in seeds):
                prompt = template.prompt(seed, trigger, what)
                recipe = Recipe(
                    prompt=prompt, template=template.text, seed=seed, base_sha256=self._weights["denoiser"], loras=uses, **self.shared
                )
                found.append(Ask(template, prompt, seed, recipe, self._key(recipe, contestant)))
        return found

    def trigger(self, contestant: Contestant) -> str | None:
        """What its LoRAs carry."""
        return ", ".join(dict.fromkeys(self.adapters[path].trigger for path in contestant.loras if self.adapters[path].trigger)) or None

    def file(self, ask: Ask) -> Path:
        return self.cache / ask.key[:2] / f"{ask.key}.png"

    def missing(self, asks: Sequence[Ask]) -> list[Ask]:
        """Those that are not drawn yet, each once."""
        return list({ask.key: ask for ask in asks if not self.file(ask).is_file()}.values())

    @cached_property
    def _weights(self) -> dict[str, str]:
        """What identifies the base: all of its parts decide a picture."""
        from charforgex.families.loading import weights_hash
        from charforgex.generation.run import base_hash

        hashes = {group: weights_hash(self.stack.family, self.stack.base, group, self.tokenizer) for group in ("vae", "text")}
        return {"denoiser": base_hash(self.stack), **hashes}

    def _use(self, path: Path) -> LoraUse:
        if path not in self.uses:
            from charforgex.lora.metadata import hashes

            known = hashes(path)
            self.uses[path] = LoraUse(self.adapters[path].name, known["sha256"], known["autov3"], 1.0)
        return self.uses[path]

    def _key(self, recipe: Recipe, contestant: Contestant) -> str:
        told = {key: value for key, value in asdict(recipe).items() if key not in NAMES}
        told |= self._who(contestant)
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def _who(self, contestant: Contestant) -> dict[str, Any]:
        """What identifies base and LoRAs to the caches; a LoRA that is off and brings no words is not there."""
        there = [path for path in contestant.loras if contestant.scale or self.adapters[path].tokens]
        return {
            "weights": self._weights,
            "loras": [[self._use(path).sha256, contestant.scale, self._tokens(path)] for path in there],
        }

    def _tokens(self, path: Path) -> str | None:
        tokens = self.adapters[path].tokens
        if not tokens:
            return None
        digest = hashlib.sha256()
        for name, rows in sorted(tokens.items()):
            digest.update(name.encode() + rows.float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    # ---- how long it will take ----

    def expected(self, pictures: int) -> float | None:
        """Seconds, by what such pictures took here before; None where none were drawn."""
        known = self._speeds().get(self._speed_key)
        return None if known is None else pictures * known

    @cached_property
    def _speed_key(self) -> str:
        facts = {name: self.shared[name] for name in ("family", "base", "dtype", "width", "height", "steps", "guidance", "true_guidance")}
        return hashlib.sha256(json.dumps([facts, self.device], sort_keys=True).encode()).hexdigest()[:16]

    def _speeds(self) -> dict[str, float]:
        try:
            return json.loads((self.cache / SPEED).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    # ---- drawing ----

    def draw(self, wanted: Sequence[tuple[Contestant, Sequence[Ask]]], bar: Bar) -> None:
        """Draws what is missing, contestant by contestant; each batch is on disk when it is done. Raises ModelError or LoraError."""
        from charforgex.generation.run import load

        missing, taken = [], set()
        for contestant, asks in wanted:  # two may want the same picture
            missing.append((contestant, [ask for ask in self.missing(asks) if ask.key not in taken]))
            taken |= {ask.key for ask in asks}
        if not any(asks or self.unheard(contestant) for contestant, asks in missing):
            return
        bar.say(f"loading {self.shared['base']}")
        with quiet():
            parts = load(replace(self.stack, adapters=[]), self.device, self.dtype, self.tokenizer)
        texts: dict[str, Text] = {}  # what the base says of each prompt
        for contestant, asks in missing:
            if asks or self.unheard(contestant):
                with self._holding(parts, contestant):
                    started = time.perf_counter()
                    self._draw(parts, asks, {} if self._speaks(contestant) else texts, contestant.name, bar)
                    self.seconds += time.perf_counter() - started
                    if self.unheard(contestant):
                        bar.say(f"loss of {contestant.name}")
                        self._listen(parts, contestant)
        if self.drawn:
            write_json(self.cache / SPEED, self._speeds() | {self._speed_key: self.seconds / self.drawn})

    # ---- losses ----

    def losses(self, contestant: Contestant) -> dict[str, Any] | None:
        """What a loaded contestant was found to predict; None where nobody asked."""
        return None if self.held_out is None else json.loads(self._heard(contestant).read_text(encoding="utf-8"))

    def unheard(self, contestant: Contestant) -> bool:
        """Whether its losses are wanted and not known."""
        return self.held_out is not None and not self._heard(contestant).is_file()

    def _heard(self, contestant: Contestant) -> Path:
        shots = [[shot.key or shot.name, shot.prompt or self.held_out.unsaid] for shot in self.held_out.gallery.shots]
        told = self._who(contestant) | {"shots": shots, "levels": self.held_out.levels, "size": self.size, "dtype": self.shared["dtype"]}
        key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        return self.cache.parent / "losses" / f"{key}.json"

    def _listen(self, parts: Components, contestant: Contestant) -> None:
        import torch

        from charforgex.evaluation import levels

        family, held_out = self.stack.family, self.held_out
        process, found = family.process(parts), []
        for batch in levels.batches(family, parts, held_out.gallery, min(self.size), self.batch_size, held_out.unsaid):
            batch = batch.to(next(parts.denoiser.parameters()).device)
            with torch.autocast(batch.mean_BChw.device.type, self.dtype, enabled=self.dtype != torch.float32):
                found.append(levels.losses(family, parts.denoiser, process, batch, held_out.levels))
        path = self._heard(contestant)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"times": levels.times(process, held_out.levels).tolist(), "losses": torch.cat(found, 1).tolist()})

    def _speaks(self, contestant: Contestant) -> bool:
        """Whether its prompts are encoded otherwise than by the base."""
        adapters = [self.adapters[path] for path in contestant.loras]
        return any(adapter.tokens or set(adapter.lora.components()) - {self.stack.family.denoiser_name} for adapter in adapters)

    @contextmanager
    def _holding(self, parts: Components, contestant: Contestant) -> Iterator[None]:
        """The contestant's LoRAs and words are in the base; afterwards it is what it was, bit for bit."""
        from charforgex.families.tokens import keeping_words
        from charforgex.generation.run import add
        from charforgex.lora.inject import set_scales, unload_adapter

        names: list[str] = []
        with keeping_words(parts):
            try:
                for path in contestant.loras:
                    add(parts, self.adapters[path])
                    names.append(self.adapters[path].name)
                if names:
                    set_scales(parts, dict.fromkeys(names, contestant.scale))
                yield
            finally:
                for name in reversed(names):
                    unload_adapter(parts, name)

    def _draw(self, parts: Components, asks: Sequence[Ask], texts: dict[str, Text], name: str, bar: Bar) -> None:
        from charforgex.generation.sampling import needs_negative

        settings, family = self.settings, self.stack.family
        guided = needs_negative(family, parts, settings.guidance, settings.true_guidance or 1.0)

        def said(prompt: str) -> Text:
            """Encoded alone, so that no picture depends on which others are missing."""
            if prompt not in texts:
                texts[prompt] = family.encode_text(parts, [prompt]).to("cpu")
            return texts[prompt]

        at, writing = 0, []
        with ThreadPoolExecutor(WRITERS) as pool:  # a PNG takes as long as some steps, and its writer waits for the disk
            while at < len(asks):
                batch, pictures = self._batch(
                    parts, asks[at : at + self.batch_size], said, said(settings.negative) if guided else None, name, bar
                )
                for write in writing:
                    write.result()  # raises what the disk had to say
                writing = [pool.submit(save_png, picture, self.file(ask), ask.recipe) for ask, picture in zip(batch, pictures, strict=True)]
                self.drawn += len(batch)
                at += len(batch)
            for write in writing:
                write.result()

    def _batch(
        self, parts: Components, asks: Sequence[Ask], said: Callable[[str], Text], negative: Text | None, name: str, bar: Bar
    ) -> tuple[Sequence[Ask], list[Image]]:
        """The pictures of the first of `asks`, of as many as the memory holds: half as many from now on where it does not hold all."""
        import torch

        from charforgex.generation.sampling import sample
        from charforgex.types import Text

        settings, done = self.settings, 0.0

        def step(_: int, total: int) -> None:
            nonlocal done
            done += len(asks) / total
            bar.step(len(asks) / total, f"drawing {name}")

        try:
            return asks, sample(
                self.stack.family, parts, None, [ask.seed for ask in asks], text=Text.stack([said(ask.prompt) for ask in asks]),
                negative_text=negative, size=self.size, steps=settings.steps, guidance=settings.guidance,
                true_guidance=settings.true_guidance, scheduler=settings.scheduler, batch_size=len(asks), on_step=step,
            )  # fmt: skip
        except torch.OutOfMemoryError as error:
            if len(asks) == 1:
                raise ModelError(
                    "the device's memory is not enough for one picture; try dtype=bfloat16, or a smaller width and height."
                ) from error
        bar.step(-done, f"drawing {name}")
        self.batch_size = len(asks) // 2
        torch.cuda.empty_cache()
        return self._batch(parts, asks[: self.batch_size], said, negative, name, bar)


def noise_seed(template: str, number: int) -> int:
    """The seed of a prompt's picture `number`: another one for each prompt, as pictures of one noise resemble each other across prompts and
    a base may well draw somebody like the character from it."""
    return seed_of("evaluation", template, number) % 1_000_000


def place(source: Path, target: Path) -> Path:
    """The cached picture under another name: the same file where the disk allows it, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target
