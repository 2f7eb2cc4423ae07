"""A run's curves as PNG, from its metrics.csv."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from charforgex.runs import replace_atomic

SMOOTHING = 0.95
Series = dict[str, list[tuple[int, float]]]


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average, corrected for its start."""
    average, out = 0.0, []
    for count, value in enumerate(values, 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        out.append(average / (1 - SMOOTHING**count))
    return out


class Panels:
    """Axes side by side, for a run's series."""

    def __init__(self, series: Series, count: int):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.series, self.figure = series, Figure(figsize=(15, 3.6), layout="constrained")
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.subplots(1, count)

    def plot(self, axes, name: str, label: str, **style) -> None:
        if name in self.series:
            axes.plot(*zip(*self.series[name], strict=True), label=label, **style)

    def loss(self, axes, name: str = "loss", label: str = "training loss, smoothed", colour: str = "#1f4e9c") -> None:
        if name in self.series:
            steps, values = zip(*self.series[name], strict=True)
            axes.plot(steps, values, color="#c9d3e6", linewidth=0.6)
            axes.plot(steps, smooth(list(values)), color=colour, label=label)

    def validation(self, axes) -> None:
        self.plot(axes, "validation/lora", "LoRA on", color="#1f4e9c", marker="o")
        self.plot(axes, "validation/base", "LoRA off", color="#999999", linestyle="--")

    def save(self, titles: Sequence[str], path: Path, best_step: int | None) -> None:
        for axes, title in zip(self.axes, titles, strict=True):
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("step", fontsize=9)
            axes.grid(alpha=0.25)
            if best_step is not None and axes is not self.axes[0]:
                axes.axvline(best_step, color="#444444", linewidth=0.8, alpha=0.5)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8, frameon=False)
        with replace_atomic(path) as temporary:
            self.figure.savefig(temporary, dpi=110)


def draw_curves(series: Series, path: Path, best_step: int | None = None) -> None:
    """Loss, validation by LoRA on and off, identity with floor, base and ceiling, and prompt-following, side by side."""
    panels = Panels(series, 4)
    loss, validation, identity, following = panels.axes
    panels.loss(loss)
    panels.validation(validation)
    panels.plot(identity, "identity/lora", "LoRA", color="#b3261e", marker="o")
    for name, style in (("ceiling", ":"), ("base", "--"), ("floor", "-.")):
        panels.plot(identity, f"identity/{name}", name, color="#777777", linestyle=style)
    panels.plot(following, "prompt_following/lora", "prompt-following, LoRA", color="#2e7d32", marker="o")
    panels.plot(following, "prompt_following/base", "prompt-following, base", color="#777777", linestyle="--")
    panels.plot(following, "diversity/lora", "diversity, LoRA", color="#8e6bbf", marker="s")
    titles = ("Training loss", "Validation loss, held-out pictures", "Identity, held-out references", "Prompt-following and diversity")
    panels.save(titles, path, best_step)


def draw_motion_curves(series: Series, path: Path, best_step: int | None = None) -> None:
    """Losses of both paths, validation with what learnt on and off, and what the drawn clips do, side by side."""
    panels = Panels(series, 4)
    loss, validation, moves, steady = panels.axes
    panels.loss(loss, "loss/temporal", "motion, smoothed")
    panels.loss(loss, "loss/spatial", "look, smoothed", "#b3261e")
    panels.validation(validation)
    for axes, names in ((moves, {"alike": "#2e7d32", "strength": "#8e6bbf"}), (steady, {"drift": "#b3261e", "flicker": "#e0a100"})):
        for name, colour in names.items():
            panels.plot(axes, f"motion/{name}/lora", f"{name}, LoRA", color=colour, marker="o")
            panels.plot(axes, f"motion/{name}/base", f"{name}, base", color=colour, linestyle="--")
    titles = ("Training losses", "Validation loss, held-out clips", "Motion of drawn clips", "Drift of identity, and flicker")
    panels.save(titles, path, best_step)
