"""What the embedded models can do, and what a LoRA on them becomes: writes docs/charworld.md.

    python benchmarks/charworld.py                 each family's base on 200 held-out prompts, and five held-out characters (two hours)
    python benchmarks/charworld.py --quick         24 prompts, no training, nothing written: a look; --families flux is one alone

Prompts describe characters whose hair no model has seen. Pictures are read by the embedded judge and scored by the embedded CLIP;
real renders of the same characters and contexts are the ceiling, pictures of other prompts the floor.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
BARS = {"gain": 0.75, "traits": 0.75, "prompt": 0.9}
SHARE_OF_SDXL = 0.9  # of its gain, that the other families must reach
FAMILIES = ("sdxl", "flux", "sd3")
CONTACT = 8


def sampling(family_name: str) -> dict:
    """Steps and guidance of the family's recipe, as `sample` takes them."""
    from charforgex.config import compose

    recipe = compose("train", [f"family={family_name}"]).family.recipe
    return {"steps": recipe.sampling_steps, "guidance": recipe.guidance, "true_guidance": recipe.true_guidance}


def base_table(family_name: str, count: int, picture: Path | None) -> dict:
    """Attribute accuracy and CLIP score of real renders, of the base, and of the base's pictures against shuffled prompts."""
    import torch
    from PIL import Image

    from charforgex.charworld import drawing, world
    from charforgex.evaluation.alignment import CharworldFollower
    from charforgex.families import registry
    from charforgex.generation.sampling import sample
    from charforgex.generation.sheets import contact_sheet

    family, options = registry.get(family_name), sampling(family_name)
    parts, follower = family.load("charworld"), CharworldFollower()
    prompts, asked, renders = [], [], []
    for index in range(count):
        rng = random.Random(f"held-out prompt {index}")
        identity, context = world.draw_identity(rng, held_out=True), world.draw_context(rng)
        prompt, named = world.caption(identity, context)
        prompts.append(prompt)
        asked.append(named)
        renders.append(Image.fromarray(drawing.render(identity, context)))
    started = time.process_time()
    drawn = sample(family, parts, prompts, list(range(count)), size=(64, 64), **options)
    seconds = (time.process_time() - started) / count
    if picture is not None:
        rows = [renders[:CONTACT], drawn[:CONTACT], drawn[CONTACT : 2 * CONTACT], renders[CONTACT : 2 * CONTACT]]
        labels = ("real", "drawn by the base", "drawn by the base", "real")
        contact_sheet(rows, labels, (), f"{family_name}: held-out prompts, hair that no model has seen").save(picture)

    def measure(pictures, prompts, asked) -> dict[str, float]:
        readings = follower.judge.read(torch_pixels(pictures))
        right: dict[str, list[bool]] = {}
        for reading, named in zip(readings, asked, strict=True):
            for name, value in named.items():
                right.setdefault(name, []).append(reading[name] == value)
        by_name = {name: mean(found) for name, found in right.items()}
        scores = follower.clip_score(pictures, prompts)
        return {"attributes": mean(by_name.values()), "clip_score": mean(scores), **dict(sorted(by_name.items()))}

    def torch_pixels(pictures) -> torch.Tensor:
        from charforgex.embedders import to_pixels

        return to_pixels(pictures, 64)

    shift = count // 2
    shuffled = prompts[shift:] + prompts[:shift], asked[shift:] + asked[:shift]
    return {
        "real": measure(renders, prompts, asked), "base": measure(drawn, prompts, asked), "shuffled": measure(drawn, *shuffled),
        "cpu_seconds_per_picture": seconds, "prompts": count, **options,
    }  # fmt: skip


def character(family_name: str, number: int, folder: Path) -> dict:
    """`python train.py family=F data.source=charworld:N` as a user runs it, and what its LoRA's pictures show of the character's traits."""
    run_dir = folder / f"{family_name}-{number}"
    if not (run_dir / "result.json").exists():
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            f"family={family_name}",
            f"data.source=charworld:{number}",
            f"run_dir={run_dir}",
            f"cache_dir={folder / 'cache'}",
        ]
        subprocess.run(command, check=True, cwd=folder)
    result = json.loads((run_dir / "result.json").read_text())
    return result | {"number": number, "who": describe(number), "traits": traits(family_name, number, result)}


def describe(number: int) -> str:
    from charforgex.charworld.demo import held_out_character
    from charforgex.charworld.world import identity_phrases

    identity = held_out_character(number)
    return f"{identity.kind}, " + ", ".join(identity_phrases(identity).values())


def traits(family_name: str, number: int, result: dict) -> dict[str, float]:
    """Share of the character's named traits that the judge reads off the LoRA's pictures, and off real renders of the same contexts."""
    import numpy as np
    from PIL import Image

    from charforgex.charworld import drawing, world
    from charforgex.charworld.assets import load_judge
    from charforgex.charworld.demo import held_out_character, trigger_of
    from charforgex.embedders import to_pixels
    from charforgex.families import registry
    from charforgex.generation.sampling import sample
    from charforgex.lora import formats, inject

    family, judge, identity = registry.get(family_name), load_judge(), held_out_character(number)
    parts = family.load("charworld")
    inject.load_adapter(parts, formats.read(result["lora"], family, parts.denoiser.config), "lora", 1.0)
    contexts = [world.draw_context(random.Random(f"traits {number} {i}")) for i in range(24)]
    prompts = [world.caption(identity, context, name=trigger_of(number).split()[0])[0] for context in contexts]
    drawn = sample(family, parts, prompts, list(range(len(prompts))), size=(64, 64), **sampling(family_name))
    real = [Image.fromarray(np.asarray(drawing.render(identity, context))) for context in contexts]

    def share(pictures) -> float:
        right = []
        for reading, context in zip(judge.read(to_pixels(pictures, 64)), contexts, strict=True):
            visible = world.visible_attributes(identity, context)
            right += [reading[name] == visible[name] for name in world.IDENTITY_ATTRIBUTES if name in visible]
        return mean(right)

    return {"lora": share(drawn), "real": share(real)}


def provenance_table() -> str:
    assets = ROOT / "src/charforgex/charworld/assets"
    lines = ["| model | steps | pictures seen | time | reached |", "|---|---|---|---|---|"]
    for path in sorted(assets.glob("**/provenance.json")):
        p = last = json.loads(path.read_text())
        totals = dict.fromkeys(("steps", "pictures_seen", "seconds"), 0)
        while last:
            totals = {name: value + last[name] for name, value in totals.items()}
            last = last.get("before")
        reached = ", ".join(f"{k} {v:.3f}" for k, v in p["measures"].items() if "/" not in k)
        name = path.parent.relative_to(assets).as_posix()
        steps, pictures, minutes = totals["steps"], totals["pictures_seen"], totals["seconds"] / 60
        lines.append(f"| `{name}` | {steps:,} | {pictures:,} | {minutes:.0f} min | {reached or '-'} |")
    return "\n".join(lines)


def means(characters: list[dict]) -> dict[str, float]:
    return {
        "gain": mean(c["identity"]["gain"] for c in characters),
        "traits": mean(c["traits"]["lora"] / c["traits"]["real"] for c in characters),
        "prompt": mean(c["prompt_following"]["ratio"] for c in characters),
    }


def bases(found: dict[str, dict]) -> str:
    """One table: what each base shows of what prompts name, beside real renders and beside other prompts' pictures."""
    real, names = next(iter(found.values()))["base"]["real"], list(found)
    lines = [f"| | real | {' | '.join(names)} | shuffled |", f"|---|---{'|---' * len(names)}|---|"]
    for name in ["attributes", "clip_score", *(name for name in real if name not in ("attributes", "clip_score"))]:
        shown = " | ".join(f"{found[family]['base']['base'][name]:.2f}" for family in names)
        lines.append(f"| {name} | {real[name]:.2f} | {shown} | {found[names[0]]['base']['shuffled'][name]:.2f} |")
    return "\n".join(lines)


def weak(base: dict) -> list[str]:
    return [name for name, value in base["real"].items() if base["base"][name] < 0.75 * value]


def characters_table(characters: list[dict]) -> str:
    lines = ["| N | who | others | base | LoRA | real | gain | traits | prompt | best step | minutes |", "|---" * 11 + "|"]
    for c in characters:
        i, f, t = c["identity"], c["prompt_following"], c["traits"]
        seen = f"{t['lora']:.2f} / {t['real']:.2f} | {f['lora']:.2f} / {f['base']:.2f}"
        lines.append(
            f"| {c['number']} | {c['who']} | {i['floor']:.2f} | {i['base']:.2f} | **{i['lora']:.2f}** | {i['ceiling']:.2f} "
            f"| {i['gain']:.2f} | {seen} | {c['best_step']} | {c['seconds'] / 60:.1f} |"
        )
    return "\n".join(lines)


def verdicts(found: dict[str, dict]) -> str:
    lines = ["| family | gain | bar | traits kept | bar | prompt-following | bar | |", "|---" * 8 + "|"]
    for family, one in found.items():
        reached = means(one["characters"])
        bars = dict(BARS)
        if family != "sdxl" and "sdxl" in found:
            bars["gain"] = SHARE_OF_SDXL * means(found["sdxl"]["characters"])["gain"]
        verdict = "reached" if all(reached[name] >= bar for name, bar in bars.items()) else "**not reached yet**"
        lines.append(f"| {family} | " + " | ".join(f"{reached[name]:.2f} | {bar:.2f}" for name, bar in bars.items()) + f" | {verdict} |")
    return "\n".join(lines)


def page(found: dict[str, dict]) -> str:
    pictures = "\n\n".join(f"![{family}: held-out prompts](images/charworld_{family}.png)" for family in found)
    tables = {family: one["base"] for family, one in found.items()}
    costs = ", ".join(
        f"{family} {t['steps']} steps, guidance {t['guidance']:g}, {t['cpu_seconds_per_picture']:.2f} CPU-seconds"
        for family, t in tables.items()
    )
    weaknesses = "; ".join(f"{family}: {', '.join(weak(one['base'])) or 'nothing'}" for family, one in found.items())
    runs = "\n\n".join(f"### {family}\n\n{characters_table(one['characters'])}" for family, one in found.items())
    return f"""# Charworld: the embedded default

CharForgeX carries a small world of drawn characters, and tiny models of SDXL's, Flux's, SD3's and AnimateDiff's own classes trained on
it, so that everything can be shown and tested with real effects and without a download. No model has seen the demo's characters: their
(hair style, hair colour) pairs are kept out of all pre-training, and so are they.

{pictures}

*This page is written by `python benchmarks/charworld.py` ({platform.machine()}, {os.cpu_count()} cores).*

## The bases on {next(iter(found.values()))["base"]["prompts"]} held-out prompts

Read by the embedded judge (share right of what the prompt names) and scored by the embedded CLIP (100 max(cosine, 0)).
*Real*: renders of what the prompts describe, the ceiling. *Shuffled*: pictures against other prompts, the floor. A picture takes: {costs}.

{bases(found)}

Less than three quarters of what real renders show: {weaknesses}. More pre-training is what helps.

## LoRAs of five held-out characters, default settings

`python train.py family=flux data.source=charworld:0` and so on. Identity is the cosine to held-out references in the judge's embedding;
gain is (LoRA - base) / (real - base), where base is the base model with the same trigger. *Traits*: share of the character's named traits
that are read off the LoRA's pictures / off real ones. *Prompt*: share of the asked context that is shown, LoRA / base.

{verdicts(found)}

{runs}

AnimateDiff's base makes clips of 8 frames; what it and motion LoRAs reach is in [motion.md](motion.md).

## How the models were made, and how to go on

Each is trained by the project's own command through the training loop that LoRAs use, in this order; every stage is resumable, and its
weights lie beside its `provenance.json`.

```
{COMMANDS}
```

{provenance_table()}

To go on with a base from where it stands (the first thing for idle cores or a GPU):
`python train.py experiment=charworld_pretrain pretrain.family=flux pretrain.stage=base pretrain.start=embedded trainer.steps=20000`.
"""


PRETRAIN = "python train.py experiment=charworld_pretrain"
COMMANDS = f"""{PRETRAIN} pretrain.stage=vae trainer.steps=5000 optimizer.lr=3e-3 pretrain.batch_size=16
{PRETRAIN} pretrain.stage=text trainer.steps=1000 optimizer.lr=3e-3 pretrain.batch_size=64
{PRETRAIN} pretrain.stage=judge trainer.steps=600 pretrain.batch_size=96 pretrain.pictures=48000
{PRETRAIN} pretrain.stage=base
{PRETRAIN} pretrain.stage=decoder pretrain.start=embedded
{PRETRAIN} pretrain.family=flux pretrain.stage=vae trainer.steps=6000 optimizer.lr=3e-3 pretrain.batch_size=16
{PRETRAIN} pretrain.family=flux pretrain.stage=text trainer.steps=500 optimizer.lr=3e-3 pretrain.batch_size=64
{PRETRAIN} pretrain.family=flux pretrain.stage=base loss.timesteps=logit_normal loss.shift=1.5
{PRETRAIN} pretrain.family=flux pretrain.stage=guidance loss.timesteps=logit_normal loss.shift=1.5 pretrain.start=embedded
{PRETRAIN} pretrain.family=sd3 pretrain.stage=base loss.timesteps=logit_normal loss.shift=1.5
{PRETRAIN} pretrain.stage=faces trainer.steps=1500
{PRETRAIN} pretrain.stage=captioner trainer.steps=1200 pretrain.batch_size=48
{PRETRAIN} pretrain.stage=pose pretrain.pictures=24000 trainer.steps=1500
{PRETRAIN} pretrain.family=animatediff pretrain.stage=base optimizer.lr=1.5e-3"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--characters", type=int, default=5)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--folder", type=Path, default=Path("runs/charworld"), help="of all runs; finished ones are taken as they are")
    options = parser.parse_args()
    images = ROOT / "docs/images"
    images.mkdir(parents=True, exist_ok=True)
    folder = options.folder.resolve()
    found: dict[str, dict] = {}
    for family in options.families:
        picture = None if options.quick else images / f"charworld_{family}.png"
        found[family] = {"base": base_table(family, 24 if options.quick else 200, picture), "characters": []}
    ratios = {
        f"{family}_attributes_vs_real": one["base"]["base"]["attributes"] / one["base"]["real"]["attributes"]
        for family, one in found.items()
    }
    if not options.quick:
        folder.mkdir(parents=True, exist_ok=True)
        for family, one in found.items():
            one["characters"] = [character(family, number, folder) for number in range(options.characters)]
            ratios |= {f"{family}_{name}": value for name, value in means(one["characters"]).items()}
        (ROOT / "docs/charworld.md").write_text(page(found), encoding="utf-8")
    values = {
        family: {kind: {name: one["base"][kind][name] for name in ("attributes", "clip_score")} for kind in ("real", "base", "shuffled")}
        for family, one in found.items()
    }
    print(json.dumps({"benchmark": "charworld", "ratios": ratios, "values": values, "machine": platform.machine()}))


if __name__ == "__main__":
    main()
