"""HTML pages that need nothing else, neither network nor scripts: what they have in common. Texts in them may be hostile.

A template begins with `{% extends "pages.html" %}` and fills the blocks `style` and `body`; every value in it is escaped, and letters that
are invisible or turn the direction of writing are spelled out.
"""

from __future__ import annotations

import base64
import html
import io
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup
    from PIL.Image import Image

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = Path(__file__).with_name("pages.css")
JOINERS = "\u200c\u200d"  # invisible, but emoji and some scripts are written with them
LONGEST = 1200  # characters of one text that are shown


def shown(value: object) -> str:
    """A text as it may be shown, not yet escaped."""
    found = str(value)
    found = found if len(found) <= LONGEST else f"{found[:LONGEST]}…"
    return "".join(letter if _visible(letter) else ascii(letter)[1:-1] for letter in found)


def text(value: object) -> str:
    """A text as HTML, also within quotes."""
    return html.escape(shown(value))


def _visible(letter: str) -> bool:
    return letter in JOINERS or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")


def render(template: Path, **values: Any) -> str:
    """The page of a template. A name that `values` lacks is an error; one of ours that it has is replaced, such as `policy`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: value if isinstance(value, Markup) else "" if value is None else shown(value),
    )  # fmt: skip
    shared = {"policy": POLICY, "shared_style": Markup(STYLE.read_text(encoding="utf-8"))}  # our own file
    return environment.get_template(template.name).render(**(shared | values))


def embedded(picture: Image, side: int) -> Markup:
    """A picture as the `src` of an <img>. One larger than `side` pixels is reduced, a smaller one stays as it was made."""
    from PIL.Image import Resampling

    scale = side / max(picture.size)
    data = io.BytesIO()
    if scale >= 1:
        picture.convert("RGB").save(data, "PNG", optimize=True)
        return as_png(data.getvalue())
    size = tuple(max(1, round(length * scale)) for length in picture.size)
    picture.convert("RGB").resize(size, Resampling.LANCZOS, reducing_gap=2).save(data, "JPEG", quality=80, optimize=True)
    return _source(data.getvalue(), "jpeg")


def as_png(data: bytes) -> Markup:
    """A PNG file's content as the `src` of an <img>."""
    return _source(data, "png")


def as_jpeg(data: bytes) -> Markup:
    """The same of a JPEG file."""
    return _source(data, "jpeg")


def _source(data: bytes, kind: str) -> Markup:
    from markupsafe import Markup

    return Markup(f"data:image/{kind};base64,{base64.b64encode(data).decode()}")  # letters, digits and + / =
