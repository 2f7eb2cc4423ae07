"""Reading one picture safely: any common file becomes upright sRGB, or an `Unusable` that says why not.

Nothing here trusts a file: only the formats below are tried, sizes are checked before pixels are decoded, and whatever a
decoder throws at a broken file becomes an `Unusable`.
"""

from __future__ import annotations

import functools
import importlib
import io
import math
import stat
from pathlib import Path

from PIL import Image, ImageCms

from charforgex.curation.items import CLASSES, Verdict
from charforgex.errors import DataError

SUFFIXES = frozenset(
    {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif", ".heic", ".heif", ".hif"}
)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")  # no EPS, PDF or the like: those run interpreters
MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"BM")  # what files in these formats begin with
HEIF_PLUGINS = ("pi_heif", "pillow_heif")  # the first of them that is installed; pi_heif has no encoder, hence no GPL code in it
HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})  # ISO/IEC 23008-12
MAX_PIXELS = 80_000_000  # about 1 GB while decoding
MAX_BYTES = 512 * 2**20
WHITE = (255, 255, 255)

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF 2.3, tag 0x0112: how to turn the stored picture upright


class Unusable(DataError):
    """Why a file gives no picture, and which of `items.CLASSES` that makes it. Says the reason alone; callers name the file."""

    def __init__(self, kind: str, reason: str):
        assert kind in CLASSES
        super().__init__(kind, reason)  # both are arguments, so that it survives the way between processes
        self.kind, self.reason = kind, reason

    def __str__(self) -> str:
        return self.reason


def verdict_of(error: DataError) -> Verdict:
    """What an error of reading or decoding makes of a file."""
    return Verdict(error.kind if isinstance(error, Unusable) else "corrupt", str(error))


@functools.cache
def formats() -> tuple[str, ...]:
    """What is tried on a file, HEIC too if a plugin for Pillow is installed."""
    for name in HEIF_PLUGINS:
        try:
            importlib.import_module(name).register_heif_opener()
        except ImportError:
            continue
        return (*FORMATS, "HEIF")
    return FORMATS


def looks_like_picture(head: bytes) -> bool:
    """Whether a file's first 16 bytes are those of a picture, whatever its name."""
    return head.startswith(MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or (head[4:8] == b"ftyp" and _brand(head))


def _brand(head: bytes) -> bool:
    return head[8:12] in HEIF_BRANDS or head[8:12] in (b"avif", b"avis")


def check_file(path: Path, limit: float = math.inf, may_be_empty: bool = False) -> None:
    """Raises Unusable for folders, pipes, empty files, files above `limit` bytes, and what cannot be reached."""
    try:
        status = path.stat()
    except OSError as error:
        raise Unusable("corrupt", f"it cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise Unusable("unsupported", "it is not a regular file")
    if status.st_size == 0 and not may_be_empty:
        raise Unusable("corrupt", "the file is empty")
    if status.st_size > limit:
        raise Unusable("too_large", f"the file has {status.st_size / 2**20:.0f} MiB, more than the {limit / 2**20:g} MiB that are read")


def read_bytes(path: Path, limit: int = MAX_BYTES, may_be_empty: bool = False) -> bytes:
    """A regular file's content. Raises Unusable as `check_file` does, and when reading fails."""
    check_file(path, limit, may_be_empty)
    try:
        return path.read_bytes()
    except OSError as error:
        raise Unusable("corrupt", f"it cannot be read: {error.strerror or error}") from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # viewers show a picture whose EXIF block is damaged upright, and so do we
        return 1


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """RGB, L or CMYK in its own colour space to sRGB. A profile that is damaged or of another mode is ignored, as viewers do."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
    return converted


def _sixteen_bits(image: Image.Image) -> Image.Image:
    """Whole numbers of 0..65535 to 8 bits: 65535 / 257 = 255."""
    import numpy as np

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise Unusable("unsupported", f"its values reach from {values.min()} to {values.max()}; save it with 8 or 16 bits a channel")
    return Image.fromarray(((values * 2 + 257) // 514).astype(np.uint8))


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "F":
        raise Unusable("unsupported", "it holds floating-point values; save it with 8 or 16 bits a channel")
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        image = _sixteen_bits(image)
    see_through = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    if see_through:
        image = image.convert("RGBA")
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    alpha = image.getchannel("A") if see_through else None
    colours = image.convert("RGB") if see_through else image
    if profile:
        colours = _to_srgb(colours, profile)
    colours = colours.convert("RGB")
    if alpha is None:
        return colours
    return Image.composite(colours, Image.new("RGB", colours.size, background), alpha)


def _decode(data: bytes, background: tuple[int, int, int], max_pixels: int, quick: bool) -> tuple[Image.Image, tuple[int, int]]:
    """The picture, and the width and height it has when upright. `quick` decodes a JPEG to the end, but at an eighth of its size."""
    with Image.open(io.BytesIO(data), formats=formats()) as image:
        width, height = image.size
        if width < 1 or height < 1:
            raise Unusable("corrupt", f"its size is {width} x {height}")
        if width * height > max_pixels:
            raise Unusable("too_large", f"its size is {width} x {height}, more than {max_pixels / 1e6:g} megapixels; save it smaller")
        orientation = _orientation(image)
        if quick:
            image.draft(None, (width // 8, height // 8))
        image.load()
        picture = _to_rgb(image, background)
    if orientation in TURNS:
        picture = picture.transpose(TURNS[orientation])
    return picture, (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def _guarded(data: bytes, background: tuple[int, int, int], max_pixels: int, quick: bool) -> tuple[Image.Image, tuple[int, int]]:
    try:
        return _decode(data, background, max_pixels, quick)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise Unusable("too_large", f"its header claims more pixels than the {max_pixels / 1e6:g} million that are decoded") from error
    except Image.UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except Exception as error:  # decoders answer broken files with exceptions of nearly every type
        raise Unusable("corrupt", f"it is damaged or incomplete: {type(error).__name__}: {error}") from error


def _unidentified(data: bytes) -> Unusable:
    if not data.strip(b"\0"):
        return Unusable("corrupt", "it holds nothing but zeros")
    if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS and "HEIF" not in formats():
        return Unusable("unsupported", "it is HEIC; install 'charforgex[heif]' to read it, or save it as JPEG")
    if looks_like_picture(data[:16]):
        return Unusable("corrupt", "it begins as a picture, and its header is damaged or incomplete")
    return Unusable("unsupported", "it is not a picture in a known format (" + ", ".join(formats()) + ")")


def decode_picture(data: bytes, background: tuple[int, int, int] = WHITE, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A file's bytes to an upright 8-bit sRGB picture, transparent parts over `background`; the first frame of an animation.

    Raises Unusable with the reason alone; callers name the file.
    """
    return _guarded(data, background, max_pixels, quick=False)[0]


def measure_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height when upright. The whole file is decoded, so that one which passes can also be read. Raises Unusable."""
    return _guarded(data, WHITE, max_pixels, quick=True)[1]


def read_picture(path: str | Path, background: tuple[int, int, int] = WHITE, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture of a file, RGB. Raises DataError with the path and the reason."""
    try:
        return decode_picture(read_bytes(Path(path)), background, max_pixels)
    except DataError as error:
        raise DataError(f"{path} cannot be used: {error}.") from error
