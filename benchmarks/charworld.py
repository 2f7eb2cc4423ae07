"""What the embedded models can do, and what a LoRA on them becomes: writes docs/charworld.md.

    python benchmarks/charworld.py                 the base on 200 held-out prompts, and five held-out characters (about half an hour)
    python benchmarks/charworld.py --quick         24 prompts, no training, nothing written: a look

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
BARS = {"gain": 0.75, "identity_attributes": 0.75, "prompt_following": 0.9}
CONTACT = 8


def base_table(count: int, steps: int, guidance: float, picture: Path | None) -> dict:
    """Attribute accuracy and CLIP score of real renders, of the base, and of the base's pictures against shuffled prompts."""
    import torch
    from PIL import Image

    from charforgex.charworld import drawing, world
    from charforgex.evaluation.alignment import CharworldFollower
    from charforgex.families import registry
    from charforgex.generation.sampling import sample
    from charforgex.generation.sheets import contact_sheet

    family = registry.get("sdxl")
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
    drawn = sample(family, parts, prompts, list(range(count)), size=(64, 64), steps=steps, guidance=guidance)
    seconds = (time.process_time() - started) / count
    if picture is not None:
        rows = [renders[:CONTACT], drawn[:CONTACT], drawn[CONTACT : 2 * CONTACT], renders[CONTACT : 2 * CONTACT]]
        labels = ("real", "drawn by the base", "drawn by the base", "real")
        contact_sheet(rows, labels, (), "Held-out prompts: hair that no model has seen").save(picture)

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
        from charforgex.evaluation.identity import to_pixels

        return to_pixels(pictures, 64)

    shift = count // 2
    shuffled = prompts[shift:] + prompts[:shift], asked[shift:] + asked[:shift]
    return {
        "real": measure(renders, prompts, asked), "base": measure(drawn, prompts, asked), "shuffled": measure(drawn, *shuffled),
        "cpu_seconds_per_picture": seconds, "prompts": count, "steps": steps, "guidance": guidance,
    }  # fmt: skip


def character(number: int, folder: Path) -> dict:
    """`python train.py data.source=charworld:N` as a user runs it, and what its LoRA's pictures show of the character's traits."""
    run_dir = folder / f"character-{number}"
    if not (run_dir / "result.json").exists():
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            f"data.source=charworld:{number}",
            f"run_dir={run_dir}",
            f"cache_dir={folder / 'cache'}",
        ]
        subprocess.run(command, check=True, cwd=folder)
    result = json.loads((run_dir / "result.json").read_text())
    return result | {"number": number, "who": describe(number), "traits": traits(number, result)}


def describe(number: int) -> str:
    from charforgex.charworld.world import identity_phrases
    from charforgex.data.rendered import held_out_character

    identity = held_out_character(number)
    return f"{identity.kind}, " + ", ".join(identity_phrases(identity).values())


def traits(number: int, result: dict) -> dict[str, float]:
    """Share of the character's named traits that the judge reads off the LoRA's pictures, and off real renders of the same contexts."""
    import numpy as np
    from PIL import Image

    from charforgex.charworld import drawing, world
    from charforgex.charworld.assets import load_judge
    from charforgex.data.rendered import held_out_character, trigger_of
    from charforgex.evaluation.identity import to_pixels
    from charforgex.families import registry
    from charforgex.generation.sampling import sample
    from charforgex.lora import formats, inject

    family, judge, identity = registry.get("sdxl"), load_judge(), held_out_character(number)
    parts = family.load("charworld")
    inject.load_adapter(parts, formats.read(result["lora"], family, parts.denoiser.config), "lora", 1.0)
    contexts = [world.draw_context(random.Random(f"traits {number} {i}")) for i in range(24)]
    prompts = [world.caption(identity, context, name=trigger_of(number).split()[0])[0] for context in contexts]
    drawn = sample(family, parts, prompts, list(range(len(prompts))), size=(64, 64), steps=20, guidance=result_guidance())
    real = [Image.fromarray(np.asarray(drawing.render(identity, context))) for context in contexts]

    def share(pictures) -> float:
        right = []
        for reading, context in zip(judge.read(to_pixels(pictures, 64)), contexts, strict=True):
            visible = world.visible_attributes(identity, context)
            right += [reading[name] == visible[name] for name in world.IDENTITY_ATTRIBUTES if name in visible]
        return mean(right)

    return {"lora": share(drawn), "real": share(real)}


def result_guidance() -> float:
    from charforgex.config import compose

    return float(compose("train").sampling.guidance)


def provenance_table() -> str:
    assets = ROOT / "src/charforgex/charworld/assets"
    lines = ["| model | steps | pictures seen | time | reached |", "|---|---|---|---|---|"]
    for path in sorted(assets.glob("**/provenance.json")):
        p = json.loads(path.read_text())
        reached = ", ".join(f"{k} {v:.3f}" for k, v in p["measures"].items() if "/" not in k)
        name = path.parent.relative_to(assets).as_posix()
        lines.append(f"| `{name}` | {p['steps']:,} | {p['pictures_seen']:,} | {p['seconds'] / 60:.0f} min | {reached or '-'} |")
    return "\n".join(lines)


def page(base: dict, characters: list[dict]) -> str:
    names = [name for name in base["real"] if name not in ("attributes", "clip_score")]
    rows = [
        f"| {name} | {base['real'][name]:.2f} | {base['base'][name]:.2f} | {base['shuffled'][name]:.2f} |"
        for name in ["attributes", "clip_score", *names]
    ]
    weak = [name for name in names if base["base"][name] < 0.75 * base["real"][name]]
    table = []
    for c in characters:
        i, f, t = c["identity"], c["prompt_following"], c["traits"]
        seen = f"{t['lora']:.2f} / {t['real']:.2f} | {f['lora']:.2f} / {f['base']:.2f}"
        table.append(
            f"| {c['number']} | {c['who']} | {i['floor']:.2f} | {i['base']:.2f} | **{i['lora']:.2f}** | {i['ceiling']:.2f} "
            f"| {i['gain']:.2f} | {seen} | {c['best_step']} | {c['seconds'] / 60:.1f} |"
        )
    gain, ratio = mean(c["identity"]["gain"] for c in characters), mean(c["prompt_following"]["ratio"] for c in characters)
    kept = mean(c["traits"]["lora"] / c["traits"]["real"] for c in characters)
    verdict = (
        "reached"
        if gain >= BARS["gain"] and ratio >= BARS["prompt_following"] and kept >= BARS["identity_attributes"]
        else "not reached yet"
    )
    return f"""# Charworld: the embedded default

CharForgeX carries a small world of drawn characters, and tiny models of SDXL's own classes trained on it, so that everything can be shown
and tested with real effects and without a download. No model has seen the demo's characters: their (hair style, hair colour) pairs are kept
out of all pre-training, and so are they.

![held-out prompts](images/charworld_base.png)

*This page is written by `python benchmarks/charworld.py` ({platform.machine()}, {os.cpu_count()} cores).*

## The base on {base["prompts"]} held-out prompts

Read by the embedded judge (share right of what the prompt names) and scored by the embedded CLIP (cosine). *Real*: renders of what the
prompts describe, the ceiling. *Shuffled*: the base's pictures against other prompts, the floor. {base["steps"]} steps, guidance
{base["guidance"]:g}, {base["cpu_seconds_per_picture"]:.2f} CPU-seconds a picture.

| | real | base | shuffled |
|---|---|---|---|
{chr(10).join(rows)}

Where the base shows less than three quarters of what real renders do: {", ".join(weak) or "nowhere"}. More pre-training is what helps.

## LoRAs of five held-out characters, default settings

`python train.py data.source=charworld:N`. Identity is the cosine to held-out references in the judge's embedding; gain is
(LoRA - base) / (real - base), where base is the base model with the same trigger. *Traits*: share of the character's named traits that are
read off the LoRA's pictures / off real ones. *Prompt*: share of the asked context that is shown, LoRA / base.

| N | who | others | base | LoRA | real | gain | traits | prompt | best step | minutes |
|---|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(table)}

Means: **gain {gain:.2f}** (bar {BARS["gain"]}), **traits kept {kept:.2f}** of real renders' (bar {BARS["identity_attributes"]}),
**prompt-following {ratio:.2f}** of the base's (bar {BARS["prompt_following"]}). The bars are {verdict}.

## How the models were made, and how to go on

Each is trained by the project's own command through the training loop that LoRAs use, in this order; every stage is resumable, and its
weights lie beside its `provenance.json`.

```
python train.py experiment=charworld_pretrain pretrain.stage=vae trainer.steps=5000 optimizer.lr=3e-3 pretrain.batch_size=16
python train.py experiment=charworld_pretrain pretrain.stage=text trainer.steps=1000 optimizer.lr=3e-3 pretrain.batch_size=64
python train.py experiment=charworld_pretrain pretrain.stage=judge trainer.steps=600 pretrain.batch_size=96 pretrain.pictures=48000
python train.py experiment=charworld_pretrain pretrain.stage=base
python train.py experiment=charworld_pretrain pretrain.stage=decoder pretrain.start=embedded
```

{provenance_table()}

To go on with the base from where it stands (the first thing for idle cores or a GPU):
`python train.py experiment=charworld_pretrain pretrain.stage=base pretrain.start=embedded trainer.steps=20000`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--characters", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--folder", type=Path, default=Path("runs/charworld"), help="of the five runs; finished ones are taken as they are")
    options = parser.parse_args()
    guidance = options.guidance or result_guidance()
    images = ROOT / "docs/images"
    images.mkdir(parents=True, exist_ok=True)
    base = base_table(24 if options.quick else 200, options.steps, guidance, None if options.quick else images / "charworld_base.png")
    values = {kind: {name: base[kind][name] for name in ("attributes", "clip_score")} for kind in ("real", "base", "shuffled")}
    characters: list[dict] = []
    if not options.quick:
        folder = options.folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        characters = [character(number, folder) for number in range(options.characters)]
        (ROOT / "docs/charworld.md").write_text(page(base, characters), encoding="utf-8")
        values["characters"] = [{"number": c["number"], **c["identity"], "ratio": c["prompt_following"]["ratio"]} for c in characters]
    ratios = {"attributes_vs_real": base["base"]["attributes"] / base["real"]["attributes"]}
    print(json.dumps({"benchmark": "charworld", "ratios": ratios, "values": values, "machine": platform.machine()}))


if __name__ == "__main__":
    main()
