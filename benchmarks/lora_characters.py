"""Two characters in one LoRA: what becomes of both when their LoRAs are loaded together, merged or distilled. Writes into docs/toolbox.md.

    python benchmarks/lora_characters.py            trains LoRAs of two characters on the embedded SDXL base, then compares (20 minutes)
    python benchmarks/lora_characters.py --quick    20 steps each and 4 pictures, nothing written: a look

Each character has a trigger of its own and the default recipe. Pictures are of the evaluation's prompts, which ask for scenes that no
picture of the training shows. Identity is the cosine to held-out renders in the judge's embedding; gain is (LoRA - base) / (real - base).
Recognised is the share of pictures that are nearer to the character's renders than to those of the other one and of any of 20 strangers.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURE = ROOT / "docs/toolbox.md", ROOT / "docs/images/lora_characters.png"
BEGIN, END = "<!-- characters: written by benchmarks/lora_characters.py -->", "<!-- end of characters -->"
NUMBERS, WORDS, STRANGERS = (0, 1), ("mivozu", "takolo"), range(2, 22)
REFERENCES, SHOWN = 24, 4
MERGES = {  # name in the table: settings of charforgex.merge
    "merged: linear, a half each": {"method": "linear"},
    "merged: stack": {"method": "stack"},
    "merged: svd": {"method": "svd", "weights": [1, 1], "rank": 16},
    "merged: slerp": {"method": "slerp"},
    "merged: orthogonal": {"method": "orthogonal"},
    "merged: ties": {"method": "ties"},
    "merged: della": {"method": "della"},
}
WEIGHTS = (0.9, 0.8, 0.7, 0.6, 0.5)  # of the stronger one, beside 1 of the other


class Person:
    """A held-out character: its training pictures and how like it others are."""

    def __init__(self, number: int, word: str):
        from charforgex.charworld.demo import held_out_character

        self.number, self.identity = number, held_out_character(number)
        self.word, self.trigger = word, f"{word} {self.identity.kind}"

    def write(self, folder: Path) -> Path:
        """30 pictures with captions that call it by its own word."""
        from charforgex.charworld.demo import TRIGGER, write_character

        write_character(folder, self.number)
        for path in folder.glob("*.txt"):
            path.write_text(path.read_text(encoding="utf-8").replace(TRIGGER, self.word), encoding="utf-8")
        return folder

    def renders(self, count: int, purpose: str) -> list:
        from PIL import Image

        from charforgex.charworld import drawing, world

        contexts = [world.draw_context(random.Random(f"lora_characters {purpose} {self.number} {i}")) for i in range(count)]
        return [Image.fromarray(drawing.render(self.identity, context)) for context in contexts]


class Bench:
    """The base, and what is measured of pictures."""

    def __init__(self, people: Sequence[Person], seeds: int, prompts: int):
        from charforgex.charworld.demo import other_characters
        from charforgex.config import compose
        from charforgex.embedders import get_embedder
        from charforgex.evaluation.alignment import get_follower
        from charforgex.evaluation.identity import similarity
        from charforgex.families import registry

        config = compose("train", ["family=sdxl"])
        recipe = config.family.recipe
        self.options = {"steps": recipe.sampling_steps, "guidance": recipe.guidance, "size": (64, 64)}
        self.family, self.people = registry.get("sdxl"), people
        self.prompts = [prompt for prompt in list(config.evaluation.prompts)[:prompts] for _ in range(seeds)]
        self.embedder, self.follower, self.similarity = get_embedder("charworld"), get_follower("charworld"), similarity
        self.references = [self.embedder(person.renders(REFERENCES, "reference")) for person in people]
        strangers = [Person(number, "") for number in STRANGERS]
        self.strangers = [self.embedder(stranger.renders(REFERENCES, "reference")) for stranger in strangers]
        self.real = [self.identity(person.renders(REFERENCES, "real"), i) for i, person in enumerate(people)]
        self.floor = [self.identity(other_characters(person.number), i) for i, person in enumerate(people)]
        self.base = [self._looked_at(pictures, i) for i, pictures in enumerate(self.draw([]))]

    def identity(self, pictures, index: int) -> float:
        return self.similarity(self.embedder(pictures), self.references[index]).mean().item()

    def draw(self, loras: Sequence[Path]) -> list[list]:
        """Pictures of each person by the base with these LoRAs at full strength."""
        from charforgex.generation.sampling import sample
        from charforgex.lora import formats, inject
        from charforgex.quiet import quiet

        with quiet():
            parts = self.family.load("charworld")
        for path in loras:
            inject.load_adapter(parts, formats.read(path, self.family, parts.denoiser.config), path.stem)
        found = []
        for person in self.people:
            prompts = [prompt.replace("{trigger}", person.trigger) for prompt in self.prompts]
            found.append(sample(self.family, parts, prompts, [1000 + i for i in range(len(prompts))], **self.options))
        return found

    def _looked_at(self, pictures: list, index: int) -> dict:
        import torch

        vectors = self.embedder(pictures)
        everybody = [self.references[index], *(r for i, r in enumerate(self.references) if i != index), *self.strangers]
        likeness = torch.stack([self.similarity(vectors, references) for references in everybody])
        return {
            "identity": likeness[0].mean().item(), "recognised": (likeness.argmax(0) == 0).float().mean().item(),
            "prompt": mean(self.follower.score(pictures, self.prompts)),
        }  # fmt: skip

    def measured(self, loras: Sequence[Path]) -> tuple[list[dict], list[list]]:
        """For each person gain, share recognised, and prompt-following relative to the base's; and the pictures."""
        drawn = self.draw(loras)
        rows = []
        for i, pictures in enumerate(drawn):
            found, base = self._looked_at(pictures, i), self.base[i]
            gain = (found["identity"] - base["identity"]) / (self.real[i] - base["identity"])
            rows.append(found | {"gain": gain, "prompt_ratio": found["prompt"] / base["prompt"]})
        return rows, drawn


def trained(person: Person, folder: Path, steps: int | None) -> Path:
    """The LoRA of `charforgex.train` with its defaults. A finished run is taken as it is."""
    import charforgex

    run_dir = folder / f"{person.word}-{steps or 'default'}"
    if not (run_dir / "result.json").exists():
        source = person.write(folder / f"pictures-{person.word}")
        settings = {} if steps is None else {"trainer": {"steps": steps}, "evaluation": {"every": steps}}
        charforgex.train(
            family="sdxl", data={"source": str(source), "trigger": person.trigger}, run_dir=str(run_dir), cache_dir=str(folder / "cache"),
            name=person.word, **settings,
        )  # fmt: skip
    return Path(json.loads((run_dir / "result.json").read_text())["lora"])


def merged(loras: Sequence[Path], folder: Path) -> dict[str, Path]:
    import charforgex

    files = {}
    for name, settings in MERGES.items():
        out = folder / f"{settings['method']}.safetensors"
        charforgex.merge(lora=[str(path) for path in loras], out=str(out), overwrite=True, **settings)
        files[name] = out
    return files


def balanced(loras: Sequence[Path], folder: Path, stronger: int, weights: Sequence[float]) -> dict[str, Path]:
    """Stacked, the stronger of the two with each of these weights."""
    import charforgex

    files = {}
    for weight in weights:
        both = [1.0, 1.0]
        both[stronger] = weight
        out = folder / f"stack-{weight:g}.safetensors"
        charforgex.merge(lora=[str(path) for path in loras], out=str(out), overwrite=True, method="stack", weights=both)
        files["merged: stack, weights {:g} and {:g}".format(*both)] = out
    return files


def distilled(loras: Sequence[Path], folder: Path, steps: int | None) -> tuple[Path, dict]:
    import charforgex

    out = folder / "distilled.safetensors"
    settings = {"lora": [str(path) for path in loras], "out": str(out), "rank": 16, "together": False, "overwrite": True}
    settings |= {"steps": steps, "count": 8} if steps else {}
    started = time.process_time()
    told = charforgex.lora_tool("distill", **settings)
    return out, told | {"cpu_minutes": (time.process_time() - started) / 60}


def table(people: Sequence[Person], bench: Bench, rows: dict[str, list[dict]], sizes: dict[str, str]) -> str:
    heads = "".join(f" `{person.word}`: gain | recognised | prompts |" for person in people)
    lines = [f"| | rank |{heads}", f"|---|---|{'---|' * 3 * len(people)}"]
    base = "".join(f" 0 | {found['recognised']:.0%} | {found['prompt']:.2f} |" for found in bench.base)
    lines.append(f"| base, no LoRA | |{base}")
    for name, found in rows.items():
        cells = "".join(f" **{one['gain']:.2f}** | {one['recognised']:.0%} | {one['prompt']:.2f} |" for one in found)
        lines.append(f"| {name} | {sizes[name]} |{cells}")
    return "\n".join(lines)


def section(people: Sequence[Person], bench: Bench, rows: dict[str, list[dict]], sizes: dict[str, str], told: dict) -> str:
    anchors = "; ".join(
        f"`{person.word}`: base {bench.base[i]['identity']:.2f}, real {bench.real[i]:.2f}, strangers {bench.floor[i]:.2f}"
        for i, person in enumerate(people)
    )
    error, count = told["error"], len(bench.prompts)
    return f"""{BEGIN}
A {people[0].trigger} and a {people[1].trigger}, each a LoRA on the embedded SDXL base by the default recipe, each asked for by
its own trigger; {count} pictures of each in scenes that no training picture shows. *Gain*: share of the way from the base's likeness to
that of real pictures
({anchors}).
*Recognised*: pictures that are nearer to this character than to the other and to {len(bench.strangers)} strangers.
*Prompts*: share of what the prompt asks for that is shown.

{table(people, bench, rows, sizes)}

Distilled with `together=false` in {told["cpu_minutes"]:.0f} CPU-minutes and {told["steps"]} steps: the error of its predictions on
held-out latents fell from {error["truncated"]:.2f} (the truncated sum) to {error["distilled"]:.2f} (step {told["best_step"]}), where 1 is
what the base lacks.

![each way, both characters](images/lora_characters.png)

*Written by `python benchmarks/lora_characters.py`.*
{END}"""


def put(text: str) -> None:
    """Between the markers of the page, or at its end."""
    page = PAGE.read_text(encoding="utf-8")
    if BEGIN in page:
        before, rest = page.split(BEGIN, 1)
        page = before + text + rest.split(END, 1)[1]
    else:
        page = f"{page.rstrip()}\n\n## Two characters at once\n\n{text}\n"
    PAGE.write_text(page, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("runs/lora_characters"), help="of all files; finished trainings are kept")
    options = parser.parse_args()

    from charforgex.generation.sheets import contact_sheet

    folder, steps, started = options.folder.resolve(), 20 if options.quick else None, time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    people = [Person(number, word) for number, word in zip(NUMBERS, WORDS, strict=True)]
    loras = [trained(person, folder, steps) for person in people]
    files = {f"`{person.word}` alone": [path] for person, path in zip(people, loras, strict=True)}
    files["both loaded"] = loras
    files |= {name: [path] for name, path in merged(loras, folder).items()}
    path, told = distilled(loras, folder, steps)

    bench = Bench(people, seeds=1 if options.quick else 2, prompts=4 if options.quick else 8)
    rows, pictures, sizes = {}, {}, {}

    def look(name: str, paths: Sequence[Path]) -> None:
        rows[name], pictures[name] = bench.measured(paths)
        sizes[name] = " + ".join(ranks_of(path) for path in paths)
        print(f"{name}: " + ", ".join(f"{p.word} gain {r['gain']:.2f}" for p, r in zip(people, rows[name], strict=True)), flush=True)

    for name, paths in files.items():
        look(name, paths)
    both = rows["both loaded"]
    weighted = balanced(loras, folder, both.index(max(both, key=lambda row: row["gain"])), WEIGHTS[:1] if options.quick else WEIGHTS)
    for name, path_of in weighted.items():
        look(name, [path_of])
    look("distilled", [path])
    if not options.quick:
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        shown = [[picture for one in drawn for picture in one[:: len(one) // SHOWN][:SHOWN]] for drawn in pictures.values()]
        real = [picture for person in people for picture in person.renders(SHOWN, "shown")]
        rows_said = ("real", *(name.replace("`", "") for name in rows))
        sheet = contact_sheet([real, *shown], rows_said, (), "two characters")
        sheet.quantize(256).save(PICTURE, optimize=True)
        put(section(people, bench, rows, sizes, told))
    alone = [rows[f"`{person.word}` alone"][i]["gain"] for i, person in enumerate(people)]
    lost = {name: mean(own - one["gain"] for own, one in zip(alone, found, strict=True)) for name, found in rows.items()}
    ratios = {"identity_lost_distilled_vs_loaded": lost["distilled"] / lost["both loaded"]}
    values = {"rows": rows, "base": bench.base, "real": bench.real, "distilled": told["error"], "seconds": time.monotonic() - started}
    print(json.dumps({"benchmark": "lora_characters", "ratios": ratios, "values": values, "machine": platform.machine()}))


def ranks_of(path: Path) -> str:
    from charforgex.families.bases import base_of_file
    from charforgex.lora.formats import open_lora

    with open_lora(path, base_of_file(path).names) as file:
        ranks = sorted({layer.rank for _, layer in file})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


if __name__ == "__main__":
    main()
