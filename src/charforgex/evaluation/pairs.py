"""A contestant's pictures beside the base's of the same prompts and seeds: what several metrics compare."""

from __future__ import annotations

from typing import TYPE_CHECKING

from charforgex.errors import DataError
from charforgex.evaluation.gallery import Gallery

if TYPE_CHECKING:
    from charforgex.evaluation.metric import Case


def paired(gallery: Gallery, case: Case, pack: str | None = None) -> tuple[Gallery, Gallery, list[int]]:
    """The shots (of `pack`) that the base drew as well, the base's, in the same order, and their places in `gallery`.

    Raises DataError if there are none.
    """
    if not case.base:
        raise DataError("it is compared with the base's pictures of the same prompts and seeds, and there are none")
    partners = gallery.partners(case.base)
    places = [i for i, shot in enumerate(gallery.shots) if pack in (None, shot.pack)]
    if not places:
        raise DataError(f"no picture is of the prompt pack {pack}; add it to the prompts" if pack else "there are no pictures")
    both = [i for i in places if partners[i] >= 0]
    if not both:
        raise DataError("the base has no picture of the same prompt and seed as any of these")
    own = Gallery(gallery.name, [gallery.shots[i] for i in both], gallery.cache)
    return own, Gallery(case.base.name, [case.base.shots[partners[i]] for i in both], case.base.cache), both
