"""The captions that were there already, as they are."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from charforgex.curation.captions.base import Context, captioner_name
from charforgex.curation.captions.settings import CaptionSettings


class SidecarCaptioner:
    name = captioner_name("sidecar", "as they are", None)
    reads = frozenset({"captions"})

    def caption(self, pictures: Sequence[Image.Image], contexts: Sequence[Context]) -> list[str]:
        return ["\n".join(context.captions) for context in contexts]


def build(settings: CaptionSettings) -> SidecarCaptioner:
    return SidecarCaptioner()
