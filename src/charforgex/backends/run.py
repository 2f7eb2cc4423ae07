"""Another tool trains: started with our settings as its own, watched, stopped, gone on with, and judged by the file that it leaves.

Nothing heavy is imported before the settings are known to be right.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from charforgex.backends import ai_toolkit, kohya
from charforgex.backends.common import Given, Pictures, Said, Session, Step, refuse_unknown
from charforgex.backends.process import Asked, run
from charforgex.backends.settings import BackendSettings, read
from charforgex.backends.wanted import Wanted
from charforgex.errors import ConfigError, LoraError, TrainingError
from charforgex.runs import EXIT_INTERRUPTED, EXIT_TERMINATED, write_atomic

if TYPE_CHECKING:
    from rich.console import Console

    from charforgex.lora.state import Lora

TOOLS: dict[str, ModuleType] = {"ai_toolkit": ai_toolkit, "kohya": kohya}
FAMILIES = ("sdxl", "flux", "sd3")
OWN = ("charworld", "tiny")  # bases that no other program can read
LINES = 400  # of output kept for an error's cause
WAYS_OUT = {
    "ai_toolkit": "backend.quantize=true, backend.low_vram=true, trainer.gradient_checkpointing=true or a lower data.resolution",
    "kohya": "backend.fp8_base=true, backend.blocks_to_swap=20 (Flux, SD3), trainer.gradient_checkpointing=true or a lower data.resolution",
}
ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b(?:: .*)?$")


def check(cfg: Any) -> tuple[BackendSettings, list[str]]:
    """The group `backend`, and what is done differently there than here. Reads no file. Raises ConfigError for what the tool cannot do."""
    settings = read(cfg.backend)
    for group in ("motion", "pretrain"):
        if group in cfg:
            raise ConfigError(f"backend={settings.name} trains characters on pictures alone; leave {group} out.")
    if cfg.get("trial") is not None:
        raise ConfigError(f"backend={settings.name} gives a LoRA that nothing is measured of while it trains; sweep without backend.")
    if cfg.family.name not in FAMILIES:
        raise ConfigError(f"family={cfg.family.name} is not trained with backend; there are {', '.join(FAMILIES)}.")
    if str(cfg.family.source) in OWN:
        example = {"sdxl": "sdxl_base", "flux": "flux_dev", "sd3": "sd35_large"}[cfg.family.name]
        raise ConfigError(
            f"family.source={cfg.family.source} is of this program alone, and {settings.name} cannot read it; say family={example}."
        )
    wanted = Wanted(cfg, TOOLS[settings.name].TITLE)
    regular = (Pictures(Path("regular"), regular=True),) if cfg.data.regularisation.source is not None else ()
    work = Path("backend")
    given = Given(work, Session(work), (Pictures(Path("pictures")), *regular), tuple(cfg.evaluation.prompts))
    TOOLS[settings.name].translate(wanted, settings, given)
    wanted.check()
    return settings, wanted.notes


@dataclass
class Job:
    """A training that a tool does. `work` is its folder in the run's; `log` takes (step, numbers) as they become known."""

    cfg: Any
    settings: BackendSettings
    work: Path
    console: Console
    log: Callable[[int, dict[str, float]], None]

    @property
    def tool(self) -> ModuleType:
        return TOOLS[self.settings.name]

    @property
    def name(self) -> str:
        return self.cfg.name

    @property
    def steps(self) -> int:
        return self.cfg.trainer.steps


@dataclass(frozen=True)
class Done:
    """What came of it: the LoRA in memory, its file, its steps, and what is to be told."""

    lora: Lora
    file: Path
    steps: int
    notes: tuple[str, ...]


def check_installation(settings: BackendSettings) -> None:
    """Raises ConfigError unless the tool is where `backend.folder` says, with an environment."""
    tool, folder = TOOLS[settings.name], settings.folder.expanduser()
    if not (folder / tool.ENTRY).is_file():
        raise ConfigError(f"backend.folder={settings.folder} has no {tool.ENTRY}; name the folder of your checkout of {tool.TITLE}.")
    settings.interpreter()


def train(
    job: Job, pictures: Sequence[Pictures], prompts: Sequence[str], trigger: str | None, class_word: str | None, base: dict[str, Path],
    read_lora: Callable[[Path], Lora],
) -> Done:  # fmt: skip
    """Lets the tool train, from where an earlier start left off. `read_lora` reads a file and raises LoraError if it is no good.

    Raises ConfigError before it is started, TrainingError for what it did not do, SystemExit when it was stopped.
    """
    tool, name = job.tool, job.name
    if finished := _finished(job, read_lora):
        return finished
    session = tool.session(job.work, name)
    given = Given(job.work, session, tuple(pictures), tuple(prompts), trigger, class_word, base)
    wanted = Wanted(job.cfg, tool.TITLE)
    config = tool.translate(wanted, job.settings, given)
    wanted.check()
    folder = job.settings.folder.expanduser().absolute()
    refuse_unknown(tool.TITLE, folder, tool.written(config), tool.options(folder))
    session.out.mkdir(parents=True, exist_ok=True)
    for file, text in tool.texts(config).items():
        write_atomic(job.work / file, text)
    command = tool.command(job.settings, config, job.work)
    extra = {"WANDB_MODE": "offline"} if job.cfg.logger.offline else {}
    with Asked() as asked, Watch(job, session) as watch:
        code, is_hung = run(command, folder, job.work / "log.txt", watch.hear, job.settings.silence, asked, extra, tick=watch.tick)
    watch.record()
    finished = _finished(job, read_lora, watch)
    if finished is not None:
        left = [f"{tool.TITLE} ended with exit code {code} after it had saved the LoRA, which is whole"] if code else []
        return Done(finished.lora, finished.file, finished.steps, (*finished.notes, *left))
    if asked.signal is not None:
        job.console.print(f"Stopped at step {watch.step}; {watch.saved_so_far()}. The same command goes on from there.", soft_wrap=True)
        raise SystemExit(EXIT_INTERRUPTED if asked.signal == 2 else EXIT_TERMINATED)
    raise TrainingError(watch.why(code, is_hung))


def _finished(job: Job, read_lora: Callable[[Path], Lora], watch: Watch | None = None) -> Done | None:
    """What the tool left when it was through. None if it was not. Raises TrainingError for a file that is no LoRA to be used."""
    for path, offset in job.tool.finals(job.work, job.name):
        try:
            lora = read_lora(path)
            lora.check()
        except LoraError as error:
            raise TrainingError(
                f"{job.tool.TITLE} ended, and what it saved is no good: {error} Its output is in {job.work / 'log.txt'}; begin again with "
                "fresh=true and a lower optimizer.lr."
            ) from error
        told = job.tool.steps_in(lora.metadata)
        steps = job.steps if told is None else offset + told
        if steps < job.steps - 1:  # ai-toolkit may count from 0
            continue
        return Done(lora, path, max(steps, job.steps), tuple(watch.warnings if watch else ()))
    return None


class Watch:
    """What a tool says, told on: a bar, numbers, warnings; and what it ended of. Raises TrainingError when its loss is no number."""

    def __init__(self, job: Job, session: Session):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.job, self.session = job, session
        self.step, self.loss, self.saving = job.tool.done_before(job.work, job.name), "-", False
        self.warnings: list[str] = []
        self.errors: list[str] = []
        self.is_out_of_memory = False
        self.lines: deque[str] = deque(maxlen=LINES)
        self._recorded, self._shown, self._polled = self.step, 0.0, 0.0
        self.bar = Progress(
            TextColumn(f"[bold]{job.tool.TITLE}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[phase]}"), console=job.console,
        )  # fmt: skip
        self.task = self.bar.add_task("training", total=job.steps, completed=self.step, loss="-", phase="starting")

    def __enter__(self) -> Watch:
        if self.job.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def hear(self, line: str) -> bool:
        """One line of output; whether the tool is saving now."""
        said = self.job.tool.event(line, self.job.name)
        if isinstance(said, Step):
            self._stepped(said)
        else:
            self.lines.append(line)
            if said is not None:
                self._heard(said)
        return self.saving

    def _stepped(self, said: Step) -> None:
        self.saving = False
        step = self.session.offset + said.step
        loss = said.numbers.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise TrainingError(
                f"{self.job.tool.TITLE} was stopped at step {step}: its loss is {loss}, and it would go on like that. "
                f"{self.saved_so_far().capitalize()}. Lower optimizer.lr, or set family.dtype=float32, and say fresh=true."
            )
        if step > self.step and said.numbers and self.job.tool.recorded(self.job.work, self.job.name, step) is None:
            self.job.log(step, dict(said.numbers))
        self.step, self.loss = step, self.loss if loss is None else f"{loss:.4f}"
        self._show(phase="")

    def _heard(self, said: Said) -> None:
        if said.kind == "warning":
            self.warnings.append(said.text)
            self.job.console.print(f"[yellow]{self.job.tool.TITLE}: {said.text}", soft_wrap=True)
        elif said.kind in ("saving", "saved"):
            self.saving = said.kind == "saving"
        elif said.kind == "error":
            self.errors.append(said.text)
        elif said.kind == "out of memory":
            self.is_out_of_memory = True
        else:
            self._show(phase=said.text[:60])

    def _show(self, phase: str) -> None:
        console, now = self.job.console, time.monotonic()
        if console.is_terminal:
            self.bar.update(self.task, completed=self.step, loss=self.loss, phase=phase)
        elif phase or now - self._shown > 30 or self.step >= self.job.steps:
            self._shown = now
            what = phase or f"step {self.step}/{self.job.steps}  loss {self.loss}"
            console.print(f"{self.job.tool.TITLE}: {what}", highlight=False, soft_wrap=True)

    def tick(self) -> None:
        """Now and then: what the tool has recorded, and its new pictures."""
        if time.monotonic() - self._polled > 10:
            self._polled = time.monotonic()
            self.record()

    def record(self) -> None:
        rows = self.job.tool.recorded(self.job.work, self.job.name, self._recorded) or []
        by_step: dict[int, dict[str, float]] = {}
        for step, name, value in rows:
            by_step.setdefault(step, {})[name] = value
        for step, numbers in by_step.items():
            self.job.log(step, numbers)
            self._recorded = max(self._recorded, step)
        collect_samples(self.job)

    def saved_so_far(self) -> str:
        steps = sorted(self.job.tool.saved(self.job.work, self.job.name))
        return f"step {steps[-1]} is saved" if steps else "nothing is saved yet"

    def why(self, code: int, is_hung: bool) -> str:
        """What it ended of, in a sentence with the way out."""
        title, log = self.job.tool.TITLE, self.job.work / "log.txt"
        where = f"at step {self.step}" if self.step else "before its first step"
        after = f"{self.saved_so_far().capitalize()}; the same command goes on from there. All that it said is in {log}."
        if is_hung:
            return f"{title} said nothing for {self.job.settings.silence} seconds {where} and was stopped (backend.silence). {after}"
        if self.is_out_of_memory:
            return f"{title} ran out of GPU memory {where}; set {WAYS_OUT[self.job.settings.name]}. {after}"
        if code < 0:
            cause = "killed, as systems do when memory runs out" if code == -9 else f"ended by signal {-code}"
            return f"{title} was {cause}, {where}. {after}"
        causes = self.errors or [line.strip() for line in self.lines if ERROR.match(line.strip())]
        cause = f": {causes[-1]}" if causes else f". It said last: {self.lines[-1].strip()}" if self.lines else " without a word"
        return f"{title} ended with exit code {code} {where} and left no LoRA{cause} {after}"


def collect_samples(job: Job) -> None:
    """Copies the tool's pictures that are not there yet to samples/step-00000250-00.jpg, by step and number."""
    for (step, number), path in job.tool.samples(job.work, job.name).items():
        copy = job.work.parent / "samples" / f"step-{step:08d}-{number:02d}{path.suffix}"
        if not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
