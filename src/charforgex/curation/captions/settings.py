"""What can be asked of captions. No torch here, so that a bad setting stops in a second."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from charforgex.binding import Range, not_among
from charforgex.errors import ConfigError

MODEL = {"source", "max_tokens", "dtype", "quantise"}
# backend -> the options it has a use for, besides batch_size
USES = {
    "charworld": set(),
    "sidecar": set(),
    "blip2": {*MODEL, "prompt"},
    "florence": {*MODEL, "task"},
    "chat": {*MODEL, "turns"},
    "endpoint": {"source", "max_tokens", "turns", "url", "key_variable", "timeout", "retries"},
    "tagger": {"source", "general", "character"},
    "interrogator": {"source", "begin", "flavours"},
}
# what `source` is for those that cannot do without
WANTED = {
    "blip2": "a BLIP-2 of transformers, such as Salesforce/blip2-opt-2.7b or a folder",
    "florence": "a Florence-2 of transformers, such as florence-community/Florence-2-base or a folder",
    "chat": "a model that talks about pictures, such as Qwen/Qwen3-VL-4B-Instruct, zai-org/GLM-4.1V-9B-Thinking or a folder",
    "endpoint": "the model's name at the endpoint",
    "interrogator": "a CLIP of transformers, such as openai/clip-vit-large-patch14, a folder, or charworld",
    "tagger": "a folder with model.onnx and selected_tags.csv, or an image classifier of transformers",
}
TURN = (
    "Describe this {{ {'portrait': 'portrait', 'upper': 'half-length picture', 'full': 'full-length picture'}.get(framing, 'picture') }}"
    "{% if class_word %} of a {{ class_word }}{% endif %} in one plain sentence: expression and pose, clothes, the place, the light."
    " Say only what can be seen, name nobody, and leave out words such as picture or image."
)


@dataclass(frozen=True)
class CaptionSettings:
    """`backend` is one, or several for their ensemble; then `source` is a mapping by backend where more than one takes it."""

    backend: str | tuple[str, ...] = "sidecar"
    source: str | dict[str, str] | None = None
    batch_size: Annotated[int, Range(at_least=1)] = 8
    max_tokens: Annotated[int, Range(at_least=1)] = 128
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantise: Literal["8bit"] | None = None
    prompt: str | None = None
    task: Literal["caption", "detailed", "more_detailed"] = "more_detailed"
    turns: dict[Literal["any", "portrait", "upper", "full"], tuple[str, ...]] = field(default_factory=lambda: {"any": (TURN,)})
    url: str | None = None
    key_variable: str | None = None
    timeout: Annotated[float, Range(above=0)] = 120.0
    retries: Annotated[int, Range(at_least=0)] = 5
    general: Annotated[float, Range(above=0, at_most=1)] = 0.35
    character: Annotated[float, Range(above=0, at_most=1)] = 1.0
    begin: str | None = "sidecar"
    flavours: Annotated[int, Range(at_least=0, at_most=32)] = 8
    weights: dict[str, Annotated[float, Range(at_least=0)]] = field(default_factory=dict)
    scorer: str | None = None
    clip_share: Annotated[float, Range(at_least=0, at_most=1)] = 0.5

    @property
    def backends(self) -> tuple[str, ...]:
        return (self.backend,) if isinstance(self.backend, str) else tuple(self.backend)

    @property
    def _all(self) -> tuple[str, ...]:
        """The backends, and the one that an interrogator begins with."""
        begin = (self.begin,) if "interrogator" in self.backends and self.begin else ()
        return tuple(dict.fromkeys((*self.backends, *begin)))

    def __post_init__(self):
        for backend in self._all:
            if backend not in USES:
                raise ConfigError(
                    not_among(f"captions.{'backend' if backend in self.backends else 'begin'}={backend}", backend, list(USES))
                )
        if not self.backends or len(set(self.backends)) < len(self.backends):
            raise ConfigError(f"curation.captions.backend={list(self.backends)} must name each backend once, and at least one.")
        if "interrogator" in self.backends and self.begin == "interrogator":
            raise ConfigError("curation.captions.begin=interrogator would begin with itself; use sidecar, a captioner, or null.")
        self._refuse_unused()
        self._check_ensemble()
        self._check_sources()
        if "any" not in self.turns or not all(self.turns.values()):
            raise ConfigError(
                f"curation.captions.turns={self.turns} needs `any`, and a question at least in each; "
                "curation.captions.turns.any=['Describe it.']"
            )
        if "endpoint" in self._all and not self.url:
            raise ConfigError(
                "curation.captions.url is not set; the endpoint needs its address, such as curation.captions.url=http://localhost:8000/v1"
            )

    def _refuse_unused(self) -> None:
        used = set().union(*(USES[backend] for backend in self._all))
        for name in sorted(set().union(*USES.values()) - used):
            if (value := getattr(self, name)) != default(name):
                users = ", ".join(backend for backend, uses in USES.items() if name in uses)
                said = (
                    f"curation.captions.{name}={value} has an effect only in {users}; curation.captions.backend is {', '.join(self._all)}"
                )
                raise ConfigError(f"{said}. Leave it out, or choose one of these.")

    def _check_ensemble(self) -> None:
        alone = len(self.backends) == 1
        for name in ("weights", "scorer", "clip_share"):
            useless = alone or (name == "clip_share" and self.scorer is None)
            if useless and (value := getattr(self, name)) != default(name):
                need = "several of curation.captions.backend" if alone else "curation.captions.scorer"
                raise ConfigError(f"curation.captions.{name}={value} has an effect only with {need}; leave it out.")
        for backend in self.weights:
            if backend not in self.backends:
                raise ConfigError(
                    f"curation.captions.weights.{backend} is read by nothing; curation.captions.backend is {', '.join(self.backends)}."
                )

    def _check_sources(self) -> None:
        takers = [backend for backend in self._all if "source" in USES[backend]]
        if isinstance(self.source, dict):
            for backend in sorted(set(self.source) - set(takers)):
                raise ConfigError(
                    f"curation.captions.source.{backend} is read by nothing; curation.captions.backend is {', '.join(self._all)}."
                )
        elif self.source is not None and len(takers) > 1:
            raise ConfigError(
                f"curation.captions.source={self.source}: whose? Say "
                f"curation.captions.source={{{takers[0]}: {self.source}, {takers[1]}: ...}}."
            )
        for backend in takers:
            if backend in WANTED and not self.source_of(backend):
                raise ConfigError(f"curation.captions.source is not set; {backend} needs {WANTED[backend]}.")

    def source_of(self, backend: str) -> str | None:
        return self.source.get(backend) if isinstance(self.source, dict) else self.source

    def of(self, backend: str) -> CaptionSettings:
        """The settings of one of the backends alone: what it has no use for is as if never said."""
        begin = {self.begin} if backend == "interrogator" and self.begin else set()
        takers = {one for one in (backend, *begin) if "source" in USES[one]}
        used = {"batch_size", *USES[backend], *(option for one in begin for option in USES[one])}
        source = {one: self.source_of(one) for one in takers if self.source_of(one)} if begin else self.source_of(backend)
        unused = {f.name: default(f.name) for f in fields(self) if f.name not in used}
        return replace(self, **{**unused, "backend": backend, "source": source if takers else None})


def default(name: str) -> Any:
    """What a setting is when nobody says it."""
    option = next(f for f in fields(CaptionSettings) if f.name == name)
    return option.default if option.default_factory is MISSING else option.default_factory()
