"""Clips of videos as training batches: read, checked, encoded once, and drawn by step number.

    data = ClipData("videos/", cache="cache/", resolution=256, frames=16, fps=8, seed=7)
    data.prepare(family, load_parts, weights={"vae": "...", "text": "..."}, pixel_multiple=64, latent_stride=8)
    for batch in data.train_dataloader(range(1000)): ...    # latents (B, C, T, h, w)

A source is a folder of short videos, each cut into all the windows it holds, or the `clips.jsonl` of curated clips. A video's windows stay
on one side of the split; only of one or two videos, which leave none to hold out, some windows are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from torch import Tensor

from charforgex.binding import Range
from charforgex.curation.manifest import MIN_TRAIN, Manifest, Problem, Record, Video, some, split_records, videos_in
from charforgex.data import captions
from charforgex.data.buckets import FILTER, Cut, sides
from charforgex.data.cache import Cache, Entry, key_of
from charforgex.data.dataset import Item, Order, arrange, group
from charforgex.data.prepared import LoadParts, PreparedData, geometry
from charforgex.data.windows import Timeline, Window, measure, read_windows, windows
from charforgex.errors import ConfigError, DataError
from charforgex.runs import sha256_file
from charforgex.types import Components
from charforgex.videos import Unreadable, check_pyav

if TYPE_CHECKING:
    from charforgex.families.base import Family

SMALLEST = 16  # pixels of a side
HELD_OUT = 0.15  # of the windows, where no whole video can be


def to_pixels(clip_THWP: np.ndarray) -> Tensor:
    """uint8 RGB to float32 (1, 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(clip_THWP).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


class ClipData(PreparedData):
    """Clips of `frames` frames, `fps` of them a second, whatever the videos' own rates are."""

    def __init__(
        self,
        source: Path,
        cache: Path,
        resolution: int | list[int],
        frames: Annotated[int, Range(at_least=2)],
        fps: Annotated[float, Range(above=0, at_most=240)],
        trigger: str | None = None,
        add_trigger: bool = False,
        default_caption: str | None = None,
        batch_size: Annotated[int, Range(at_least=1)] = 1,
        num_workers: Annotated[int, Range(at_least=0)] = 0,
        caption_dropout: Annotated[float, Range(at_least=0, at_most=1)] = 0.05,
        flip: bool = False,
        upscale: bool = False,
        val_count: Annotated[int, Range(at_least=0)] | None = None,
        seed: int = 0,
    ):
        """`source` is a folder of videos with .txt captions or a .jsonl manifest; `cache` a folder that any dataset may share.

        `resolution`: sides of the squares whose area frames get, as for pictures. `val_count`: videos held out, 15 % if not given.
        Raises ConfigError for settings that mean nothing here, DataError for videos or captions that cannot be used.
        """
        check_pyav()
        self.resolutions = sides(resolution)
        self.frames, self.fps = frames, Fraction(str(fps))
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.caption_dropout, self.flip, self.upscale, self.tag_separator = caption_dropout, flip, upscale, ","
        self.cache, self.notes = Cache(cache), []
        source = Path(source).expanduser()
        self.manifest, windows = self._folder(source, val_count) if source.is_dir() else self._described(source, val_count)
        self.problems: tuple[Problem, ...] = self.manifest.problems

        records = captions.with_trigger(self.manifest.records, trigger, add_trigger, self.tag_separator, default_caption, "videos")
        records.sort(key=lambda record: record.sha256)  # so that files may be renamed without changing any batch
        self.train = tuple(record for record in records if record.split == "train")
        self.val = tuple(record for record in records if record.split == "val")
        if not self.train:
            skipped = f" Not usable are {some([f'{p.path} ({p.reason})' for p in self.problems])}." if self.problems else ""
            raise DataError(f"{source} has no clip of {self._asked()} to train on.{skipped}")
        self._windows = {record: windows[record.sha256] for record in (*self.train, *self.val)}
        self._held_windows = {record: windows[record.sha256] for record in self.val}
        if not self.val and val_count is None and source.is_dir():
            self._hold_out_windows()
        self.texts = {record.sha256: list(record.captions) for record in self.train}

    # ---- reading ----

    def _asked(self) -> str:
        return f"data.frames={self.frames} at data.fps={float(self.fps):g}"

    def _cut_up(self, timeline: Timeline) -> list[Window]:
        """Raises DataError, with the reason alone, if there is no window in it."""
        height, width = timeline.size
        if min(height, width) < SMALLEST:
            raise DataError(f"its size is {width} x {height}; sides below {SMALLEST} pixels are too small")
        found = windows(timeline, self.frames, self.fps)
        if not found:
            count, seconds = len(timeline.times), float(timeline.end)
            has = f"it has {count} frame{'s' * (count != 1)} in {seconds:.2f} seconds"
            raise DataError(f"{has}; a clip of {self._asked()} takes {float(self.frames / self.fps):.2f}")
        return found

    def _note_repeated(self, name: str, found: Sequence[Window]) -> None:
        repeating = sum(len(set(window)) < len(window) for window in found)
        if repeating:
            self.notes.append(
                f"{name}: {repeating} of its {len(found)} clips show a frame more than once; it has not always {float(self.fps):g} a second"
            )

    def _folder(self, root: Path, val_count: int | None) -> tuple[Manifest, dict[str, list[Window]]]:
        """Every video whole is decoded once, for when its frames are shown; the cache remembers that."""
        from rich.console import Console
        from rich.progress import track

        videos, problems = videos_in(root)
        if not videos:
            raise DataError(f"{root} holds no video, such as .mp4, .mov, .mkv or .webm; make GIFs and single frames one of these first.")
        root = root.resolve()
        found: dict[str, list[Window]] = {}
        records: dict[str, Record] = {}
        console = Console(stderr=True)
        for video in track(videos, "Reading videos", console=console, transient=True, disable=not console.is_terminal):
            result = self._read(root, video)
            if isinstance(result, Problem):
                problems.append(result)
            elif result[0].sha256 in records:
                reason = f"it is the same file as {records[result[0].sha256].path}; its captions are not used"
                problems.append(Problem(video.path, reason))
            else:
                record, found[record.sha256] = result
                records[record.sha256] = record
                self._note_repeated(record.path, found[record.sha256])
        if val_count is not None and val_count > (most := max(0, len(records) - MIN_TRAIN)):
            raise DataError(f"val_count={val_count} of {len(records)} usable videos: choose 0 to {most}, so that {MIN_TRAIN} can train.")
        return Manifest(root, tuple(split_records(list(records.values()), val_count)), tuple(sorted(problems))), found

    def _read(self, root: Path, video: Video) -> tuple[Record, list[Window]] | Problem:
        try:
            path = Manifest(root, ()).file(video.path)
            sha256 = sha256_file(path)
            timeline = self._timeline(path, sha256)
            height, width = timeline.size
            return Record(video.path, sha256, width, height, video.captions), self._cut_up(timeline)
        except OSError as error:
            return Problem(video.path, f"it cannot be read: {error.strerror or error}")
        except Unreadable as error:
            return Problem(video.path, error.reason)
        except DataError as error:
            return Problem(video.path, str(error))

    def _timeline(self, path: Path, sha256: str) -> Timeline:
        key = key_of("timeline", video=sha256)
        entry = self.cache.find(key)
        if entry is None:
            timeline = measure(path)
            pairs = [(time.numerator, time.denominator) for time in (*timeline.times, timeline.end)]
            self.cache.write(key, {"size": torch.tensor(timeline.size), "times": torch.tensor(pairs)})
            return timeline
        times = [Fraction(*pair) for pair in entry["times"].tolist()]
        return Timeline(tuple(entry["size"].tolist()), tuple(times[:-1]), times[-1])

    def _described(self, path: Path, val_count: int | None) -> tuple[Manifest, dict[str, list[Window]]]:
        """A manifest of clips says how many frames each has, and how many a second."""
        if not path.exists():
            raise DataError(f"There is no folder or manifest {path}; set data.source to a folder of videos or a clips.jsonl.")
        if path.suffix not in (".jsonl", ".parquet"):
            raise DataError(f"{path} is neither a folder of videos nor a manifest of clips (.jsonl, .parquet).")
        if val_count is not None:
            raise DataError(f"val_count={val_count} has no effect on {path}: a manifest says itself which clips are held out.")
        manifest = Manifest.read(path)
        found: dict[str, list[Window]] = {}
        problems = []
        for record in manifest.records:
            count, rate = (record.facts.get(name) for name in ("frames", "fps"))
            if type(count) is not int or type(rate) not in (int, float) or min(count, rate) <= 0:
                raise DataError(
                    f"{path}: {record.path} does not say how many frames it has and how many a second; a manifest of clips does in facts, "
                    "as frames and fps. For pictures choose another family."
                )
            rate = Fraction(str(rate))
            try:
                timeline = Timeline((record.height, record.width), tuple(k / rate for k in range(count)), count / rate)
                found[record.sha256] = self._cut_up(timeline)
            except DataError as error:
                problems.append(Problem(record.path, str(error)))
                continue
            self._note_repeated(record.path, found[record.sha256])
        usable = tuple(record for record in manifest.records if record.sha256 in found)
        return Manifest(manifest.root, usable, tuple(problems)), found

    def _hold_out_windows(self) -> None:
        """Of one or two videos none is held out whole: the last windows of the longer one are, if that leaves enough to train on."""
        record = max(self.train, key=lambda record: len(self._windows[record]))
        own, total = self._windows[record], sum(map(len, self._windows.values()))
        count = min(max(1, round(HELD_OUT * total)), len(own) - 1, total - MIN_TRAIN)
        if count < 1:
            self.notes.append(f"no clip is held out: there {'are' if total > 1 else 'is'} {total} in all; give three videos or more")
            return
        self.val = (record,)
        self._windows[record], self._held_windows[record] = own[:-count], own[-count:]
        self.notes.append(
            f"the last {count} of the {len(own)} clips of {record.path} are held out; with three videos or more, whole ones are"
        )

    # ---- encoding ----

    def prepare(
        self,
        family: Family,
        load_parts: LoadParts,
        *,
        weights: Mapping[str, str],
        pixel_multiple: int,
        latent_stride: int,
        prompts: Sequence[str] = (),
        dtype: str = "float32",
        progress: bool = True,
    ) -> dict[str, int]:
        """Choose sizes, and encode what the cache lacks. Returns how many "latent" and "text" entries were made.

        The arguments are those of `CharacterData.prepare`. A clip is encoded whole, and each for itself. Raises ConfigError for a family
        of pictures, DataError if every video is too small.
        """
        if not family.is_video:
            raise ConfigError(f"family={family.name} makes pictures, and clips are for families of clips; set family=animatediff.")
        items, notes = arrange(self.train, self.resolutions, pixel_multiple, self.upscale, {})
        held_out, more_notes = arrange(self.val, self.resolutions, pixel_multiple, self.upscale, {})
        self.notes = list(dict.fromkeys([*self.notes, *notes, *more_notes]))
        if not items:
            raise DataError(
                f"Every video is too small for data.resolution={self.resolutions}: {some(notes, 2)}. "
                "Lower data.resolution, or set data.upscale=true."
            )
        largest = {item.record: item for item in held_out}.values()  # resolutions ascend
        self.items = [replace(item, frames=window) for item in items for window in self._windows[item.record]]
        self.val_items = [replace(item, frames=window) for item in largest for window in self._held_windows[item.record]]
        self._base = {"family": family.name, "dtype": dtype}
        self._weights, self._stride = dict(weights), latent_stride
        self._order = Order(group(self.items), self.batch_size, self.seed)
        self._prepared = True
        texts = ["", *prompts, *(record.captions[0] for record in self.val), *(text for found in self.texts.values() for text in found)]
        made = {"latent": self._prepare_latents(family, load_parts, "Encoding clips", progress)}
        made["text"] = self._prepare_texts(family, load_parts, texts, progress)
        return made

    def _latent_key(self, item: Item, cut: Cut) -> str:
        clip = {"video": item.record.sha256, "frames": list(item.frames), "filter": FILTER}
        return key_of("clip", weights=self._weights["vae"], **clip, **geometry(cut), **self._base)

    def _grid(self, item: Item, cut: Cut) -> tuple[int, ...]:
        return len(item.frames), *(side // self._stride for side in cut.size)

    def _encode(self, family: Family, parts: Components, wanted: list[tuple[str, Item, Cut]]) -> Iterator[tuple[str, Entry]]:
        record = wanted[0][1].record
        keys = {(item.frames, cut): key for key, item, cut in wanted}
        for window, cut, clip in self._clips(record, list(keys)):
            mean, std = family.encode_pixels(parts, to_pixels(clip))
            assert tuple(mean.shape[2:]) == (len(window), *(side // self._stride for side in cut.size))
            yield keys[window, cut], {"mean": mean[0].float(), "std": std[0].float()}

    def _clips(self, record: Record, wanted: Sequence[tuple[Window, Cut]]) -> Iterator[tuple[Window, Cut, np.ndarray]]:
        """uint8 (T, H, W, 3). Raises DataError if the file is not what it was."""
        path = self.manifest.file(record.path)
        try:
            changed = sha256_file(path) != record.sha256
        except OSError as error:
            raise DataError(f"{record.path} cannot be used: {error.strerror or error}.") from error
        if changed:  # an entry filed under another video's hash would be stale for ever
            raise DataError(f"{record.path} was changed after it was read; start again.")
        cuts: dict[Window, list[Cut]] = {}
        for window, cut in wanted:
            cuts.setdefault(window, []).append(cut)
        yield from read_windows(path, (record.height, record.width), cuts)

    # ---- what reports and evaluation ask for ----

    def paths(self, split: str) -> list[Path]:
        """The videos of "train" or "val"; one may be in both where windows are held out."""
        return [self.manifest.file(record.path) for record in {"train": self.train, "val": self.val}[split]]

    def references(self) -> Iterator[np.ndarray]:
        """The held-out clips as they are trained on, uint8 (T, H, W, 3), one at a time: what generated motion is compared with."""
        assert self._prepared, "prepare() comes first"
        wanted: dict[Record, list[tuple[Window, Cut]]] = {}
        for item in self.val_items:
            wanted.setdefault(item.record, []).append((item.frames, item.cut))
        for record, shown in wanted.items():
            for _, _, clip in self._clips(record, shown):
                yield clip
