"""What lies under the root: videos, the captions beside them, and why everything else is left alone. Nothing of the videos is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from charforgex.curation import ingest
from charforgex.curation.folders import (
    MAX_CAPTION_BYTES,
    caption_lines,
    caption_verdict,
    is_mask,
    is_sidecar,
    refusal_by_name,
    stem,
    suffix_of,
)
from charforgex.curation.ingest import Unit
from charforgex.curation.items import Verdict
from charforgex.curation.pictures import read_bytes, verdict_of
from charforgex.errors import DataError

NO_VIDEO = {
    "picture": "a picture; charforgex curate makes a dataset of pictures",
    "archive": "videos in archives are not read; unpack it",
    "sidecar": "no video has this name",
}


@dataclass
class Videos:
    """Videos by name, the captions beside them, and what becomes of all other files."""

    units: dict[str, Unit]
    captions: dict[str, tuple[str, ...]]
    others: dict[str, Verdict]


def find(root: Path, leave_out: Sequence[Path]) -> Videos:
    """All files under the root but those in `leave_out`. Raises ConfigError as `ingest.units`."""
    units = ingest.units(root, ingest.IngestSettings(), leave_out)
    found = Videos({unit.path: unit for unit in units if unit.kind == "video" and unit.verdict is None}, {}, {})
    of_stem: dict[str, list[str]] = {}
    for path in found.units:
        of_stem.setdefault(stem(path, suffix_of(path)), []).append(path)
    for unit in units:
        owners = of_stem.get(stem(unit.path, suffix_of(unit.path)), ())
        if unit.path in found.units:
            continue
        if is_sidecar(unit.path) and not is_mask(unit.path) and owners:
            found.others[unit.path] = take_caption(root, unit.path, owners, found.captions)
        else:
            reason = NO_VIDEO.get(unit.kind) or refusal_by_name(unit.path).reason
            known = unit.verdict if unit.kind != "sidecar" else None  # which was looked for among pictures
            found.others[unit.path] = known or Verdict("unsupported", reason)
    return found


def take_caption(root: Path, name: str, owners: Sequence[str], captions: dict[str, tuple[str, ...]]) -> Verdict:
    """The lines of a file beside videos, added to their captions."""
    try:
        data = read_bytes(ingest.locate(root, name), MAX_CAPTION_BYTES, may_be_empty=True)
    except DataError as error:
        return verdict_of(error)
    verdict = caption_verdict(data, owners[0])
    if verdict.kind == "sidecar":
        for owner in owners:
            captions[owner] = tuple(dict.fromkeys([*captions.get(owner, ()), *caption_lines(data)]))
    return verdict
