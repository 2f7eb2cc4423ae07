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
from charforgex.curation import crops, ingest, masks
from charforgex.curation.executors import Job
from charforgex.curation.folders import MASK_SUFFIX
from charforgex.curation.ingest import IngestSettings
from charforgex.curation.items import Face, Finding, Item
from charforgex.curation.pictures import decode_picture
from charforgex.errors import DataError
from charforgex.runs import write_atomic, write_json

FAST = 4  # PNG compression: half the time of the default for files 5 % larger
FOLDER = "cuts"
VERSION = 1


def file_name(finding: Finding, framing: str) -> str:
    """Where a cut goes, in its subfolder: readable, unique, and the same in every run."""
    folders, _, last = finding.name.replace("!/", "/").rpartition("/")
    stem = _plain(last.rpartition(".")[0] or last)[-40:] or "picture"
    return "/".join([*(_plain(part) or "folder" for part in folders.split("/") if part), f"{stem}_{finding.sha256[:10]}_{framing}.png"])


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")


def cut(job: Job) -> list[dict[str, Any]]:
    """Does the cuts of `job` (root, cache, out, ingest, masks, unit, wanted: item name -> its cuts and face) unless their files are there.

    Returns a row for each: `item` and `framing` to know it by, its box, file, size, hash and mask. What changed on disk since it was
    measured and cannot be read any more comes back with an `error` instead. A mask that came with the picture goes before one of ours.
    """
    out = Path(job["out"])
    memo = Path(job["cache"]) / FOLDER / f"{hashlib.sha256(json.dumps([VERSION, job], sort_keys=True).encode()).hexdigest()[:40]}.json"
    if memo.exists():
        known = json.loads(memo.read_text(encoding="utf-8"))
        if all((out / row["file"]).exists() and (not row["mask"] or (out / row["mask"]).exists()) for row in known):
            return known
    unit, told = ingest.Unit.from_json(job["unit"]), bind(IngestSettings, job["ingest"], "curation.ingest")
    rows, left = [], dict(job["wanted"])
    for item in ingest.items(job["root"], unit, told):
        if (wanted := left.pop(item.name, None)) is not None:
            rows += _cut_item(item, wanted, out, told, job["masks"])
        if not left:
            break
    rows += [{"item": name, "error": "it is not there any more"} for name in left]
    if not any("error" in row for row in rows):
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_json(memo, rows)
    return rows


def _cut_item(item: Item, wanted: dict[str, Any], out: Path, told: IngestSettings, kind: str) -> list[dict[str, Any]]:
    try:
        picture = item.picture or decode_picture(item.data or b"", told.background, told.max_pixels)
        mask = decode_picture(item.mask, max_pixels=told.max_pixels).convert("L") if item.mask else None
    except DataError as error:
        return [{"item": item.name, "error": str(error)}]
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
