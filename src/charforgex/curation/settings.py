"""The schema of `conf/curation/default.yaml` and `conf/curate.yaml`. No torch here, so that a bad setting stops in a second."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from charforgex.binding import Range
from charforgex.curation.analysis import AnalysisSettings
from charforgex.curation.captions.rules import CaptionRules
from charforgex.curation.captions.settings import CaptionSettings
from charforgex.curation.crops import CropSettings
from charforgex.curation.duplicates import DuplicateSettings
from charforgex.curation.executors import ExecutorSettings
from charforgex.curation.faces import FaceSettings
from charforgex.curation.ingest import IngestSettings
from charforgex.curation.people import PeopleSettings
from charforgex.curation.quality import QualitySettings
from charforgex.curation.split import SplitSettings
from charforgex.errors import ConfigError

Positive = Annotated[int, Range(at_least=1)]


@dataclass(frozen=True)
class ScanSettings:
    """What shapes the findings of a shard; every other setting can change without a picture being decoded again."""

    ingest: IngestSettings
    faces: FaceSettings
    embedder: str = "charworld"
    clip: str | None = "charworld"
    assessor: str | None = None


@dataclass(frozen=True)
class CurationSettings:
    ingest: IngestSettings = field(default_factory=IngestSettings)
    faces: FaceSettings = field(default_factory=FaceSettings)
    embedder: str = "charworld"
    clip: str | None = "charworld"
    quality: QualitySettings = field(default_factory=QualitySettings)
    duplicates: DuplicateSettings = field(default_factory=DuplicateSettings)
    people: PeopleSettings = field(default_factory=PeopleSettings)
    crops: CropSettings = field(default_factory=CropSettings)
    captions: CaptionSettings = field(default_factory=CaptionSettings)
    rules: CaptionRules = field(default_factory=CaptionRules)
    analysis: AnalysisSettings = field(default_factory=AnalysisSettings)
    split: SplitSettings = field(default_factory=SplitSettings)
    masks: Literal["face", "subject", "none"] = "face"
    recaption: bool = False
    rewrite: bool = True
    shard: Positive = 256
    executor: Literal["local", "ray", "slurm"] = "local"
    workers: Positive | None = None
    address: str | None = None
    sbatch: tuple[str, ...] = ()
    manifest: Literal["jsonl", "parquet"] = "jsonl"
    webdataset: bool = False

    def __post_init__(self):
        if self.analysis.labels and self.clip in (None, "charworld"):
            raise ConfigError(
                f"curation.analysis.labels has questions for a CLIP of yours, and curation.clip={self.clip or 'null'} knows no such words; "
                "set it to openai/clip-vit-large-patch14 or a folder, or leave the labels empty."
            )

    def scan(self) -> ScanSettings:
        return ScanSettings(self.ingest, self.faces, self.embedder, self.clip, self.quality.assessor)

    def where(self, folder: Path) -> ExecutorSettings:
        return ExecutorSettings(self.executor, self.workers, self.address, self.sbatch, folder)
