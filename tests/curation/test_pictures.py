"""Every kind of file becomes the same upright RGB picture."""

import base64
import io
import pickle

import numpy as np
import pytest
from PIL import Image, ImageCms

from charforgex.curation.pictures import Unusable, decode_picture, looks_like_picture, measure_picture, read_bytes, read_picture, verdict_of
from charforgex.errors import DataError

# 2 high, 3 wide: red, green, blue over black, grey, white
UPRIGHT = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 0], [128, 128, 128], [255, 255, 255]]], np.uint8)


def saved(image, form="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(data: bytes, **options) -> np.ndarray:
    picture = decode_picture(data, **options)
    assert picture.mode == "RGB"
    return np.asarray(picture)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_lossless_formats_keep_their_pixels(form):
    options = {"lossless": True} if form == "WEBP" else {}
    assert (pixels(saved(Image.fromarray(UPRIGHT), form, **options)) == UPRIGHT).all()


# Row 0 and column 0 of the stored picture by EXIF 2.3: what was done to the upright one to store it.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(np.ascontiguousarray(STORED[orientation](UPRIGHT))), exif=exif)
    assert (pixels(data) == UPRIGHT).all()
    assert measure_picture(data) == (3, 2)


def test_a_meaningless_orientation_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 77
    assert (pixels(saved(Image.fromarray(UPRIGHT), exif=exif)) == UPRIGHT).all()


def test_alpha_goes_over_the_background():
    half = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 128]]], np.uint8)
    out = pixels(saved(Image.fromarray(half)), background=(0, 0, 250))[0]
    # 128/255: 200 * .50196 = 100.4, 100 * .50196 = 50.2, 250 * .49804 = 124.5
    assert out[0].tolist() == [200, 100, 0] and out[1].tolist() == [0, 0, 250]
    assert np.abs(out[2].astype(int) - [100, 50, 124]).max() <= 1


def test_transparent_palette_and_grey():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    assert pixels(saved(palette, transparency=0), background=(9, 9, 9))[0].tolist() == [[9, 9, 9], [40, 50, 60]]
    grey = Image.fromarray(np.array([[7, 200]], np.uint8))
    assert pixels(saved(grey, transparency=7), background=(1, 2, 3))[0].tolist() == [[1, 2, 3], [200, 200, 200]]
    assert pixels(saved(grey))[0].tolist() == [[7] * 3, [200] * 3]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(form):
    values = np.array([[0, 257, 32896, 65535, 300]], np.uint16)  # 300 / 257 = 1.17
    assert pixels(saved(Image.fromarray(values), form))[0, :, 0].tolist() == [0, 1, 128, 255, 1]


def test_cmyk_and_bilevel():
    cmyk = Image.fromarray(np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], np.uint8), "CMYK")
    assert pixels(saved(cmyk, "TIFF"))[0].tolist() == [[255, 255, 255], [0, 255, 255], [0, 0, 0]]
    assert pixels(saved(Image.new("1", (1, 1), 1)))[0, 0].tolist() == [255, 255, 255]


def swapped_profile() -> bytes:
    """sRGB with the red and green primaries exchanged, under another name."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for word in ("sRGB".encode("utf-16-be"), b"sRGB"):
        while (at := data.find(word, 128)) >= 0:
            data[at : at + len(word)] = "test".encode("utf-16-be" if len(word) == 8 else "ascii")
    red, green = data.index(b"rXYZ", 128), data.index(b"gXYZ", 128)
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(data)


def test_icc_profiles_are_converted_to_srgb():
    image = Image.fromarray(UPRIGHT)
    out = pixels(saved(image, icc_profile=swapped_profile()))
    assert out[0, 0].tolist() == [0, 255, 0] and out[0, 1].tolist() == [255, 0, 0]
    assert np.abs(out[1].astype(int) - UPRIGHT[1]).max() <= 1  # greys stay grey
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert (pixels(saved(image, icc_profile=srgb)) == UPRIGHT).all()
    with_alpha = np.dstack([UPRIGHT, np.full((2, 3), 255, np.uint8)])
    assert pixels(saved(Image.fromarray(with_alpha), icc_profile=swapped_profile()))[0, 0].tolist() == [0, 255, 0]


@pytest.mark.parametrize("profile", [b"no profile", b"", swapped_profile()[:200]])
def test_a_damaged_profile_is_ignored(profile):
    assert (pixels(saved(Image.fromarray(UPRIGHT), icc_profile=profile)) == UPRIGHT).all()


def test_float_and_wide_pictures_are_refused():
    with pytest.raises(DataError, match="floating-point"):
        decode_picture(saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    with pytest.raises(DataError, match="70000"):
        decode_picture(saved(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"))


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(data)[0, 0].tolist() == [255, 0, 0]


def test_the_pixel_cap_is_inclusive():
    data = saved(Image.fromarray(UPRIGHT))
    assert measure_picture(data, max_pixels=6) == (3, 2)
    with pytest.raises(DataError, match="3 x 2"):
        measure_picture(data, max_pixels=5)


def test_measuring_a_jpeg_gives_its_whole_size_and_sees_its_end():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    data = saved(noise, "JPEG", quality=95)
    assert measure_picture(data) == (300, 200)
    with pytest.raises(DataError, match="truncated"):
        measure_picture(data[: len(data) * 9 // 10])


def test_files_that_are_not_read(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "large").write_bytes(b"12345")
    with pytest.raises(DataError, match=r"empty\.png cannot be used: the file is empty"):
        read_picture(tmp_path / "empty.png")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_picture(tmp_path / "absent.png")
    with pytest.raises(DataError, match="not a regular file"):
        read_picture(tmp_path)
    with pytest.raises(DataError, match="more than"):
        read_bytes(tmp_path / "large", limit=4)
    assert read_bytes(tmp_path / "large", limit=5) == b"12345"


WHY = {
    "corrupt": [
        b"",
        bytes(100),
        saved(Image.fromarray(UPRIGHT))[:20],
        saved(Image.fromarray(UPRIGHT), "JPEG")[:200],
        b"\x89PNG and no more",
    ],
    "unsupported": [
        b"words",
        b"PK\3\4" + bytes(60),
        saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
        b"%!PS-Adobe-3.0 EPSF-3.0",
    ],
    "too_large": [saved(Image.new("1", (400, 300)))],
}


@pytest.mark.parametrize(("kind", "data"), [(kind, data) for kind, files in WHY.items() for data in files])
def test_errors_know_their_class(kind, data):
    with pytest.raises(Unusable) as caught:
        decode_picture(data, max_pixels=100_000)
    verdict = verdict_of(caught.value)
    assert verdict == (kind, str(caught.value)) and verdict.reason
    assert verdict_of(pickle.loads(pickle.dumps(caught.value))) == verdict  # they come from worker processes
    assert verdict_of(DataError("any other")) == ("corrupt", "any other")


def test_pictures_are_known_by_their_first_bytes():
    for form in ("PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG"):
        assert looks_like_picture(saved(Image.fromarray(UPRIGHT), form)[:16]), form
    assert looks_like_picture(HEIC[:16]) and not looks_like_picture(b"PK\3\4" + bytes(12)) and not looks_like_picture(b"RIFF    AVI LIST")


# 48 x 32: red and green over blue and white; encoded by libheif 1.23, an HEVC still picture
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAX1tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAACJpbG9jAAAAAERAAAEA"
    "AQAAAAABoQABAAAAAAAAALwAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRtAAAAAAABAAAA/WlwcnAAAADdaXBjbwAAAHZodmND"
    "AQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQAqQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbq5Ka5uAhoMCAA"
    "AAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29scm5jbHgAAQANAAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xhcAAAADAAAAABAAAAIAAAAAH////wAAAA"
    "Av///+AAAAACAAAAEHBpeGkAAAAAAwgICAAAABhpcG1hAAAAAAAAAAEAAQWBAgMFhAAAAMRtZGF0AAAAuCgBrwngIzhH/+Cff/3+Gh9o6W9yg83fWP1Jf/wj"
    "z/sHKva9h/UIbcgP/DQjj2fI/8X7UmQxv/Eyy8DcVdRMRG9wFJSAC/I77Ul/J/LYPBzRMJhD83+20Av/8DeO6f/wN48u0OPmyaR0JY4ifpt2/TfL8RUV3mlb"
    "H6pSzjgWaU+ABlbnatcezJd3oBsUFuEs2lllYtF0qku/5qkZWB/yWRnSpUKHcNixy9M1muKbVzD6EXJKam2SOGA="
)


def test_heic_is_read_where_there_is_a_plugin():
    pytest.importorskip("pi_heif")
    out = pixels(HEIC)
    assert out.shape == (32, 48, 3)
    for (row, column), colour in {(4, 4): (255, 0, 0), (4, 40): (0, 255, 0), (28, 4): (0, 0, 255), (28, 40): (255, 255, 255)}.items():
        assert np.abs(out[row, column].astype(int) - colour).max() <= 8
    with pytest.raises(Unusable) as caught:
        decode_picture(HEIC[: len(HEIC) // 2])
    assert caught.value.kind == "corrupt"


def test_heic_without_a_plugin_says_what_to_install(monkeypatch):
    monkeypatch.setattr("charforgex.curation.pictures.formats", lambda: ("PNG", "JPEG"))
    with pytest.raises(Unusable, match=r"charforgex\[heif\]") as caught:
        decode_picture(HEIC)
    assert caught.value.kind == "unsupported"


def test_an_animated_png_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for form in ("PNG", "WEBP"):
        data = saved(frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {}))
        assert pixels(data)[0, 0].tolist() == [255, 0, 0]
