"""A run's curves as PNG, from its metrics.csv."""

from __future__ import annotations

from pathlib import Path

from charforgex.runs import replace_atomic

SMOOTHING = 0.95


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average, corrected for its start."""
    average, out = 0.0, []
    for count, value in enumerate(values, 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        out.append(average / (1 - SMOOTHING**count))
    return out


def draw_curves(series: dict[str, list[tuple[int, float]]], path: Path, best_step: int | None = None) -> None:
    """Loss, validation by LoRA on and off, identity with floor, base and ceiling, and prompt-following, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, validation, identity, following = figure.subplots(1, 4)

    def plot(axes, name: str, label: str, **style) -> None:
        if name in series:
            axes.plot(*zip(*series[name], strict=True), label=label, **style)

    if "loss" in series:
        steps, values = zip(*series["loss"], strict=True)
        loss.plot(steps, values, color="#c9d3e6", linewidth=0.6)
        loss.plot(steps, smooth(list(values)), color="#1f4e9c", label="training loss, smoothed")
    plot(validation, "validation/lora", "LoRA on", color="#1f4e9c", marker="o")
    plot(validation, "validation/base", "LoRA off", color="#999999", linestyle="--")
    plot(identity, "identity/lora", "LoRA", color="#b3261e", marker="o")
    for name, style in (("ceiling", ":"), ("base", "--"), ("floor", "-.")):
        plot(identity, f"identity/{name}", name, color="#777777", linestyle=style)
    plot(following, "prompt_following/lora", "prompt-following, LoRA", color="#2e7d32", marker="o")
    plot(following, "prompt_following/base", "prompt-following, base", color="#777777", linestyle="--")
    plot(following, "diversity/lora", "diversity, LoRA", color="#8e6bbf", marker="s")
    titles = ("Training loss", "Validation loss, held-out pictures", "Identity, held-out references", "Prompt-following and diversity")
    for axes, title in zip((loss, validation, identity, following), titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.grid(alpha=0.25)
        if best_step is not None and axes is not loss:
            axes.axvline(best_step, color="#444444", linewidth=0.8, alpha=0.5)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
    with replace_atomic(path) as temporary:
        figure.savefig(temporary, dpi=110)
