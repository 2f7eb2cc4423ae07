"""A page on which people say which of two pictures is better, without knowing whose they are: one file that works offline, on a phone, too.

What the page tells: pictures, prompts and the question. Who is on which side stands in vote_key.json, which stays with whoever asks.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from charforgex.config import Range
from charforgex.draws import python_rng
from charforgex.errors import DataError
from charforgex.evaluation.ballots import KEY, Key, Pair, read_key
from charforgex.evaluation.gallery import Gallery, Shot
from charforgex.runs import write_atomic, write_json

if TYPE_CHECKING:
    from PIL.Image import Image

PAGE, PICTURES = "vote.html", "vote_pictures"
QUESTION = "Which picture shows the character better?"
REFERENCES, REFERENCE_SIDE = 6, 320  # how many are shown, and their longer side in pixels
APART = 6  # pairs between a pair and its repetition, at least, where there are so many
TEMPLATE, SCRIPT = Path(__file__).with_name("voting.html"), Path(__file__).with_name("voting.js")


@dataclass(frozen=True)
class Duel:
    """Two pictures of the same prompt and seed, as they are shown."""

    left: tuple[str, Shot]  # contestant and picture
    right: tuple[str, Shot]


def write_page(
    galleries: Sequence[Gallery],
    references: Gallery | None,
    out: Path,
    *,
    question: str = QUESTION,
    pairs: Annotated[int, Range(at_least=1)] = 60,
    repeats: Annotated[float, Range(at_least=0, at_most=1)] = 0.1,
    raters: Annotated[int, Range(at_least=1)] = 3,
    alpha: Annotated[float, Range(above=0, below=1)] = 0.05,
    margin: Annotated[float, Range(above=0, below=0.5)] = 0.1,
    side: Annotated[int, Range(at_least=64)] = 768,
    embed: bool = True,
    seed: int = 0,
) -> Path:
    """Writes vote.html and vote_key.json into `out` and returns the page's path. Raises DataError where there is nothing to compare.

    `pairs` are shown, or all that there are if fewer: as many of every two contestants, and a prompt comes again only when all others have
    come; so votes of people who stop early are worth as much. A share of `repeats` comes a second time, sides changed. `raters`, `alpha`
    and `margin` are the plan that the verdicts keep to (see `ballots.Key`). `side` is the longer one of pictures, in pixels. With `embed`
    the page is one file; without, pictures lie in vote_pictures/ under names that tell nothing. The same seed and pictures make the same
    page. The key of another page in `out` is kept as vote_key_<study>.json.
    """
    galleries = sorted(galleries, key=lambda gallery: gallery.name)
    names = [gallery.name for gallery in galleries]
    if len(set(names)) != len(names) or len(names) < 2:
        raise DataError(f"A vote needs two contestants or more with names of their own, and these are {names}.")
    duels = _duels(galleries, pairs, seed)
    order = _order(len(duels), round(repeats * len(duels)), python_rng("voting", "repeats", seed))
    pictures = Pictures(out, side, embed)
    shown: list[Pair] = []
    told: list[dict[str, str]] = []
    first: dict[int, str] = {}  # number of a duel -> id of the pair that showed it first
    for i in order:
        left, right = (duels[i].right, duels[i].left) if i in first else (duels[i].left, duels[i].right)
        pair = Pair(f"p{len(shown) + 1:03}", left[0], right[0], left[1].prompt, left[1].seed, first.get(i))
        first.setdefault(i, pair.id)
        shown.append(pair)
        told.append({"id": pair.id, "prompt": pair.prompt, "left": pictures(left[1]), "right": pictures(right[1])})
    beside = _some(references.shots, python_rng("voting", "references", seed)) if references is not None else []
    study: dict[str, Any] = {"question": question, "pairs": told, "references": [pictures(shot, REFERENCE_SIDE) for shot in beside]}
    study["pictures"] = pictures.sources
    key = Key("charforgex-vote-key-1", "", question, names, raters, alpha, margin, shown)
    study["id"] = hashlib.sha256(json.dumps([asdict(key), pictures.hashes], sort_keys=True).encode()).hexdigest()[:16]
    if (out / KEY).is_file() and (old := read_key(out).study) != study["id"]:
        os.replace(out / KEY, out / f"vote_key_{old}.json")  # people may be voting on that page
    write_json(out / KEY, asdict(replace(key, study=study["id"])))
    pictures.forget_others()
    return write_atomic(out / PAGE, page(study, embed))


def page(study: dict[str, Any], embed: bool) -> str:
    """The HTML. Texts reach it as JSON in which no tag can end, and the script shows them as texts."""
    from markupsafe import Markup

    from charforgex.pages import render

    script = SCRIPT.read_text(encoding="utf-8")
    data = json.dumps(study)
    for letter in "<>&":
        data = data.replace(letter, f"\\u{ord(letter):04x}")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    images = "data:" if embed else "'self' file:"
    policy = f"default-src 'none'; img-src {images}; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
    policy += "form-action 'none'"
    return render(TEMPLATE, title=study["question"], policy=policy, script=Markup(script), data=Markup(data))


class Pictures:
    """Pictures for the page, each once, under ids that are numbered as they come. Encoded anew: nothing of a file's metadata is left."""

    def __init__(self, folder: Path, side: int, embed: bool):
        self.folder, self.side, self.embed = folder / PICTURES, side, embed
        self.sources: dict[str, str] = {}  # id -> src of the <img>
        self.hashes: list[str] = []
        self._ids: dict[tuple[int, int], str] = {}

    def __call__(self, shot: Shot, side: int | None = None) -> str:
        side = side or self.side
        if (id(shot), side) not in self._ids:
            name = f"i{len(self._ids) + 1:03}"
            self._ids[id(shot), side] = name
            data = _encoded(shot.open(), side)
            self.hashes.append(hashlib.sha256(data).hexdigest())
            if not self.embed:
                write_atomic(self.folder / f"{name}.jpg", data)
            source = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}" if self.embed else f"{PICTURES}/{name}.jpg"
            self.sources[name] = source
        return self._ids[id(shot), side]

    def forget_others(self) -> None:
        """Pictures of an earlier page in this folder."""
        for path in self.folder.glob("i*.jpg"):
            if self.embed or path.stem not in self.sources:
                path.unlink()


def _encoded(picture: Image, side: int) -> bytes:
    from PIL.Image import Resampling

    picture = picture.copy()
    picture.info = {}  # JPEG's writer would keep a comment
    picture.thumbnail((side, side), Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=92, subsampling=0, optimize=True)
    return data.getvalue()


def _duels(galleries: Sequence[Gallery], most: int, seed: int) -> list[Duel]:
    """The first `most`: one of each two contestants in turn; within these, a prompt's second seed after all prompts' first; and of every
    two duels in a row of the same contestants, each is on the left once."""
    lanes = []
    for one, other in combinations(galleries, 2):
        first, second = ({(shot.prompt, shot.seed): shot for shot in gallery.shots} for gallery in (one, other))
        rng = python_rng("voting", seed, one.name, other.name)
        places = _rounds(sorted(first.keys() & second.keys(), key=repr), rng)
        swaps = [swap for _ in range(0, len(places), 2) for swap in rng.sample([False, True], 2)]
        both = [((one.name, first[place]), (other.name, second[place])) for place in places]
        lanes.append([Duel(*(reversed(two) if swap else two)) for two, swap in zip(both, swaps, strict=False)])
    if not any(lanes):
        raise DataError(
            f"{galleries[0].name} and {galleries[1].name} have no picture of the same prompt and seed; draw them with the same."
        )
    python_rng("voting", "lanes", seed).shuffle(lanes)
    return [duel for row in zip_longest(*lanes) for duel in row if duel is not None][:most]


def _rounds(places: Sequence[tuple[str, int | None]], rng: random.Random) -> list[tuple[str, int | None]]:
    """Prompts in random order, each with a random seed; then again, with seeds that are left."""
    prompts: dict[str, list[tuple[str, int | None]]] = {}
    for place in places:
        prompts.setdefault(place[0], []).append(place)
    for seeds in prompts.values():
        rng.shuffle(seeds)
    found = []
    while prompts:
        names = rng.sample(list(prompts), len(prompts))
        found += [prompts[name].pop() for name in names]
        prompts = {name: left for name, left in prompts.items() if left}
    return found


def _order(count: int, repeated: int, rng: random.Random) -> list[int]:
    """0 to count - 1 in order, and some of them a second time, some way behind their first."""
    again = [(i + APART + rng.uniform(0.5, 0.5 + count / 3), i) for i in rng.sample(range(max(repeated, count - APART)), repeated)]
    return [i for _, i in sorted([*((float(i), i) for i in range(count)), *again])]


def _some(shots: Sequence[Shot], rng: random.Random) -> list[Shot]:
    return rng.sample(list(shots), REFERENCES) if len(shots) > REFERENCES else list(shots)
