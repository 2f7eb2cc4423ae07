"""Our dataset as a folder of pictures with one caption each, as both tools read it."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from charforgex.backends.common import Pictures
from charforgex.curation.manifest import Record, decode_picture, read_bytes, read_picture

READABLE = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
ORIENTATION = 0x0112  # in EXIF


def write_pictures(
    records: Sequence[Record], file: Callable[[str], Path], folder: Path, background: tuple[int, int, int],
    repeats: Mapping[str, int] | None = None, regular: bool = False, with_masks: bool = False,
) -> tuple[Pictures, ...]:  # fmt: skip
    """A folder below `folder` for every number of repeats (by the first part of a record's path), with each record's first caption.

    What was there is replaced. Pictures that the tools would read as we do are copied, others are written as we read them: upright, sRGB,
    over `background`. Where a picture has no mask, all of it is white. Raises DataError for files that cannot be read.
    """
    shutil.rmtree(folder, ignore_errors=True)
    groups: dict[int, list[Record]] = {}
    for record in records:
        groups.setdefault((repeats or {}).get(record.path.split("/")[0], 1), []).append(record)
    made = []
    for count, some in sorted(groups.items()):
        place = folder / f"x{count}"
        place.mkdir(parents=True)
        masks = folder / f"x{count}-masks" if with_masks and any(record.mask for record in some) else None
        if masks:
            masks.mkdir()
        for number, record in enumerate(some):
            data, suffix = _as_read(read_bytes(file(record.path)), background)
            (place / f"{number:05d}{suffix}").write_bytes(data)
            (place / f"{number:05d}.txt").write_text(" ".join(record.captions[0].split()), encoding="utf-8")
            if masks:
                mask = read_picture(file(record.mask)).convert("L") if record.mask else Image.new("L", (record.width, record.height), 255)
                mask.save(masks / f"{number:05d}.png")
        made.append(Pictures(place.absolute(), count, regular, masks.absolute() if masks else None))
    return tuple(made)


def _as_read(data: bytes, background: tuple[int, int, int]) -> tuple[bytes, str]:
    """A file's bytes that other programs read as we read `data`, and the end of its name."""
    with contextlib.suppress(OSError), Image.open(io.BytesIO(data)) as image:  # of other formats, or with what `decode_picture` mends
        plain = image.mode == "RGB" and image.getexif().get(ORIENTATION, 1) == 1 and "icc_profile" not in image.info
        if plain and image.format in READABLE and "transparency" not in image.info and getattr(image, "n_frames", 1) == 1:
            return data, READABLE[image.format]
    written = io.BytesIO()
    decode_picture(data, background).save(written, "PNG")
    return written.getvalue(), ".png"
