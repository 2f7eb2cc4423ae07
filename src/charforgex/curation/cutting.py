"""Cuts out what was planned, in shards like those that measured: reads each file once more and writes PNG files and their masks."""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image

from charforgex.binding import bind
from charforgex.curation import crops, ingest, masks, shards
from charforgex.curation.executors import Job
from charforgex.curation.folders import MASK_SUFFIX
from charforgex.curation.ingest import IngestSettings
from charforgex.curation.items import Face, Finding, Item
from charforgex.curation.pictures import decode_picture
from charforgex.errors import DataError
from charforgex.runs import sha256_file, write_atomic, write_json

FAST = 4  # PNG compression: half the time of the default for files 5 % larger
FOLDER = "cuts"
VERSION = 2


def file_name(finding: Finding, framing: str) -> str:
    """Where a cut goes, in its subfolder: readable, unique, and the same in every run."""
    folders, _, last = finding.name.replace("!/", "/").rpartition("/")
    stem = plain_name(last.rpartition(".")[0] or last)[-40:] or "picture"
    return "/".join([*(plain_name(part) or "folder" for part in folders.split("/") if part), f"{stem}_{finding.sha256[:10]}_{framing}.png"])


def plain_name(name: str) -> str:
    """What of a name every file system and every tool takes."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")


def cut(job: Job) -> list[dict[str, Any]]:
    """Does the cuts of `job` (root, cache, out, ingest, masks, units, wanted: item name -> its hash, face, subject, cuts).

    Returns a row for each: `item` and `framing` to know it by, its box, file, size, hash and mask. What changed on disk since it was
    measured comes back with an `error` instead. A mask that came with the picture goes before one of ours. A memo of the shard has the rows
    of each item with a digest of what was wanted of it: where that is the same and the files still hold what was written, nothing is done.
    """
    out, told = Path(job["out"]), bind(IngestSettings, job["ingest"], "curation.ingest")
    memo = Path(job["cache"]) / FOLDER / f"{shards.digest([VERSION, {**job, 'wanted': None}])}.json"
    before = json.loads(memo.read_text(encoding="utf-8")) if memo.exists() else {}
    wanted = {name: shards.digest(what) for name, what in job["wanted"].items()}
    done = {name: known for name, known in before.items() if known["wanted"] == wanted.get(name) and are_there(known["rows"], out)}
    left, wrong = wanted.keys() - done.keys(), []
    if not left:
        return [row for known in done.values() for row in known["rows"]]
    for unit in map(ingest.Unit.from_json, job["units"]):
        if unit.kind not in shards.CONTAINERS and unit.path not in left:
            continue
        for item in ingest.items(job["root"], unit, told):
            if item.name not in left:
                continue
            left.remove(item.name)
            try:
                rows = _cut_item(item, job["wanted"][item.name], out, told, job["masks"])
                done[item.name] = {"wanted": wanted[item.name], "rows": rows}
            except DataError as error:
                wrong.append({"item": item.name, "error": str(error)})
            if not left:
                break
    memo.parent.mkdir(parents=True, exist_ok=True)
    write_json(memo, done)
    wrong += [{"item": name, "error": "it is not there any more"} for name in sorted(left)]
    return [row for known in done.values() for row in known["rows"]] + wrong


def are_there(rows: list[dict[str, Any]], out: Path) -> bool:
    """Whether pictures and masks are what was written, and not what a run with other settings put in their place."""
    files = [(row["file"], row["sha256"]) for row in rows] + [(row["mask"], row["mask_sha256"]) for row in rows if row["mask"]]
    return all((out / file).is_file() and sha256_file(out / file) == sha256 for file, sha256 in files)


def _cut_item(item: Item, wanted: dict[str, Any], out: Path, told: IngestSettings, kind: str) -> list[dict[str, Any]]:
    if item.verdict is not None:
        raise DataError(item.verdict.reason)
    if item.data is not None and hashlib.sha256(item.data).hexdigest() != wanted["sha256"]:
        raise DataError("it has changed in the meantime; run the same command again")
    picture = item.picture or decode_picture(item.data, told.background, told.max_pixels)
    mask = decode_picture(item.mask, max_pixels=told.max_pixels).convert("L") if item.mask else None
    face = Face.from_json(wanted["face"]) if wanted["face"] else None
    if mask is None and kind != "none":
        made = masks.masks(picture, face, wanted["subject"]) if kind == "subject" else None
        mask = made.subject if made else masks.face_mask(picture.size, face) if face else None
    rows = []
    for planned in wanted["cuts"]:
        cut = crops.Cut(planned["framing"], tuple(planned["box"]), tuple(planned["size"]))
        row = {"item": item.name, "framing": cut.framing, "file": planned["file"], "box": planned["box"], "mask": None, "mask_sha256": None}
        row |= {"width": cut.size[0], "height": cut.size[1], "sha256": _save(crops.cut(picture, cut), out / planned["file"])}
        if mask is not None:
            row["mask"] = planned["file"].removesuffix(".png") + MASK_SUFFIX
            row["mask_sha256"] = _save(crops.cut(mask, cut), out / row["mask"])
        rows.append(row)
    return rows


def _save(picture: Image.Image, path: Path) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=FAST)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, file.getvalue())
    return hashlib.sha256(file.getvalue()).hexdigest()
