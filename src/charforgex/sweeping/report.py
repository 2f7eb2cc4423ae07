"""What a sweep found: result.json, the best settings as an experiment, and a page."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from charforgex import runs
from charforgex.pages import as_png, render
from charforgex.sweeping.composing import Composer
from charforgex.sweeping.space import text
from charforgex.sweeping.study import LOST, WHY, Sweep, best_of

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from rich.console import Console

PAGE = "report.html"
TOP = 0.25  # share of the trials that importances ask about
FEWEST = 4  # complete trials that importances need
COLOURS = {"complete": "#1f4e9c", "pruned": "#c79a3a", "fail": "#b3261e", "running": "#999999"}


def write_report(found: Sweep, recipe: Mapping[str, Any] | None, composer: Composer, console: Console) -> dict[str, Any]:
    """Of the trials so far, those of other machines with the same study included. Returns what result.json holds."""
    trials = found.trials()
    best = best_of(trials, found.settings.directions)
    chosen = max(best, key=lambda trial: trial.values[0] if found.settings.directions[0] == "maximize" else -trial.values[0], default=None)
    experiments = {trial.number: write_experiment(found, trial, trial is chosen, composer) for trial in best}
    result = {
        "study": found.name,
        "objective": list(found.settings.objective),
        "space": found.space.texts,
        "trials": [told(found, trial, recipe) for trial in trials],
        "best": None if chosen is None else chosen.number,
        "front": [trial.number for trial in best],
        "importances": importances(found, trials),
        "experiments": experiments,
        "page": str(found.folder / PAGE),
    }
    runs.write_atomic(found.folder / PAGE, page(found, trials, best, runs.plain(result)))
    runs.write_result(found.folder, result)
    show(found, result, console)
    return result


def told(found: Sweep, trial: FrozenTrial, recipe: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "settings": {name: text(value) for name, value in trial.params.items()},
        "numbers": dict(zip(found.settings.objective, trial.values, strict=True)) if trial.state == TrialState.COMPLETE else None,
        "steps": max(trial.intermediate_values, default=None),
        "is_recipe": recipe is not None and trial.params == recipe,
        "lost": trial.user_attrs.get(LOST, 0),
        "why": trial.user_attrs.get(WHY),
        "folder": str(found.trial_folder(trial.number)),
    }


def write_experiment(found: Sweep, trial: FrozenTrial, is_best: bool, composer: Composer) -> str:
    """The trial's settings as `experiment=<name>`; returns the command that trains them."""
    name = "best" if is_best else f"trial-{trial.number:03d}"
    command = f"python train.py --config-dir {found.folder} experiment={name}"
    numbers = ", ".join(f"{word} {value:.4g}" for word, value in zip(found.settings.objective, trial.values, strict=True))
    overrides = [*found.space.fixed, *found.space.overrides(trial.params)]
    yaml = composer.experiment(overrides, command, f"trial {trial.number} of {found.name}: {numbers}")
    runs.write_atomic(found.folder / "experiment" / f"{name}.yaml", yaml)
    return command


def importances(found: Sweep, trials: Sequence[FrozenTrial]) -> dict[str, float] | None:
    """How far each setting tells the best quarter of the trials from the rest, summing up to 1: PED-ANOVA (Watanabe et al. 2023)."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if len(complete) < FEWEST or len(found.space.params) < 2:
        return None
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=TOP)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(optuna.importance.get_param_importances(found.study, evaluator=evaluator))


# ---- the page ----


def page(found: Sweep, trials: Sequence[FrozenTrial], best: Sequence[FrozenTrial], result: Mapping[str, Any]) -> str:
    words, complete = found.settings.objective, [trial for trial in trials if trial.state == TrialState.COMPLETE]
    charts = [("History", picture(lambda axes: draw_history(axes, found, trials), len(words)), "Each trial's number, and the best so far.")]
    if result["importances"]:
        values = result["importances"]
        drawn = picture(lambda axes: draw_importances(axes[0], values))
        charts.append(("What matters", drawn, "How far each setting tells the best quarter of the trials from the others."))
    if complete:
        drawn = picture(lambda axes: draw_coordinates(axes[0], found, complete), width=11)
        charts.append(("Parallel coordinates", drawn, f"One line for each whole trial; the darker, the better its {words[0]}."))
    if len(words) > 1 and complete:
        drawn = picture(lambda axes: draw_front(axes, found, complete, best), len(words) - 1)
        charts.append(("The front", drawn, "Nothing is better than the ringed trials in every respect."))
    if any(len(trial.intermediate_values) > 1 for trial in trials):
        drawn = picture(lambda axes: draw_curves(axes[0], found, trials), width=11)
        charts.append(("While they trained", drawn, "Where a line ends early, its trial was pruned."))
    return render(
        Path(__file__).with_name("page.html"), title=found.name, result=result, charts=charts, names=list(found.space.params), words=words,
        best=result["best"], front=result["front"],
    )  # fmt: skip


def picture(draw: Callable[[Sequence[Axes]], None], count: int = 1, width: float = 5.4) -> Markup:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(width, 5.4 * count), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, count, squeeze=False)[0]
    draw(axes)
    data = io.BytesIO()
    figure.savefig(data, dpi=110, format="png")
    return as_png(data.getvalue())


def draw_history(axes: Sequence[Axes], found: Sweep, trials: Sequence[FrozenTrial]) -> None:
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    for index, (ax, word) in enumerate(zip(axes, found.settings.objective, strict=True)):
        better = max if found.settings.directions[index] == "maximize" else min
        numbers, values = [trial.number for trial in complete], [trial.values[index] for trial in complete]
        ax.plot(numbers, values, "o", color=COLOURS["complete"])
        ax.step(numbers, [better(values[: i + 1]) for i in range(len(values))], where="post", color="#999999", linewidth=1)
        for state in ("pruned", "fail"):
            for number in (trial.number for trial in trials if trial.state.name.lower() == state):
                ax.axvline(number, color=COLOURS[state], linewidth=1, linestyle=":")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("trial (dotted: pruned, red: failed)", fontsize=9)
        ax.set_title(word, fontsize=10)
        ax.grid(alpha=0.25)


def draw_importances(ax: Axes, values: Mapping[str, float]) -> None:
    names = list(values)[::-1]
    ax.barh(names, [values[name] for name in names], color=COLOURS["complete"])
    ax.set_xlim(0, 1)


def draw_coordinates(ax: Axes, found: Sweep, trials: Sequence[FrozenTrial]) -> None:
    """Every setting and number is an axis from its lowest to its highest, a logarithmic one where the space is."""
    columns = [(name, axis_of(found.space.params[name])) for name in found.space.params]
    firsts = [trial.values[0] for trial in trials]
    order = sorted(range(len(trials)), key=lambda i: firsts[i] if found.settings.directions[0] == "maximize" else -firsts[i])
    place = {trial: position / max(len(order) - 1, 1) for position, trial in enumerate(order)}
    numbers = [[trial.values[i] for trial in trials] for i in range(len(found.settings.objective))]
    spread = lambda values, value: (value - min(values)) / ((max(values) - min(values)) or 1)  # noqa: E731
    for i in order:
        heights = [axis(trials[i].params[name]) for name, axis in columns] + [spread(values, values[i]) for values in numbers]
        ax.plot(range(len(heights)), heights, color=(0.12, 0.31, 0.61, 0.15 + 0.85 * place[i] ** 2), linewidth=1 + 1.5 * place[i])
    ends = [ends_of(found.space.params[name]) for name, _ in columns] + [(f"{min(v):.3g}", f"{max(v):.3g}") for v in numbers]
    labels = [*(name for name, _ in columns), *found.settings.objective]
    ax.set_xticks(range(len(labels)), [f"{label}\n{low} … {high}" for label, (low, high) in zip(labels, ends, strict=True)], fontsize=8)
    ax.set_yticks([])
    for position in range(len(labels)):
        ax.axvline(position, color="#bbbbbb", linewidth=0.8)


def axis_of(distribution: optuna.distributions.BaseDistribution) -> Callable[[Any], float]:
    """A setting's value as a height from 0 to 1."""
    import math

    if hasattr(distribution, "choices"):
        return lambda value: distribution.choices.index(value) / (len(distribution.choices) - 1)
    scale = math.log if distribution.log else float
    low, high = scale(distribution.low), scale(distribution.high)
    return lambda value: (scale(value) - low) / (high - low)


def ends_of(distribution: optuna.distributions.BaseDistribution) -> tuple[str, str]:
    if hasattr(distribution, "choices"):
        return distribution.choices[0], distribution.choices[-1]
    return text(distribution.low), text(distribution.high)


def draw_front(axes: Sequence[Axes], found: Sweep, trials: Sequence[FrozenTrial], best: Sequence[FrozenTrial]) -> None:
    """The first objective against each other one."""
    words = found.settings.objective
    front = {trial.number for trial in best}
    for index, ax in enumerate(axes, 1):
        for trial in trials:
            edge = "#211f1c" if trial.number in front else "none"
            ax.scatter(trial.values[index], trial.values[0], color=COLOURS["complete"], edgecolors=edge, linewidths=1.6, s=46)
            ax.annotate(str(trial.number), (trial.values[index], trial.values[0]), xytext=(4, 4), textcoords="offset points", fontsize=8)
        ax.set_xlabel(words[index] + (" (less is better)" if found.settings.directions[index] == "minimize" else ""), fontsize=9)
        ax.set_ylabel(words[0], fontsize=9)
        ax.grid(alpha=0.25)


def draw_curves(ax: Axes, found: Sweep, trials: Sequence[FrozenTrial]) -> None:
    for trial in trials:
        if trial.intermediate_values:
            steps = sorted(trial.intermediate_values)
            colour = COLOURS[trial.state.name.lower()]
            ax.plot(steps, [trial.intermediate_values[step] for step in steps], marker="o", markersize=3, color=colour, linewidth=1)
            ax.annotate(str(trial.number), (steps[-1], trial.intermediate_values[steps[-1]]), fontsize=8)
    ax.set_xlabel("step", fontsize=9)
    ax.set_ylabel(found.settings.objective[0], fontsize=9)
    ax.grid(alpha=0.25)


# ---- the terminal ----


def show(found: Sweep, result: Mapping[str, Any], console: Console) -> None:
    states = [trial["state"] for trial in result["trials"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    console.print(f"\n[bold]{found.name}[/]: {counts}", highlight=False)
    if "running" in states:
        console.print("Trials are running elsewhere; the same command collects them when they are through.")
    by_number = {trial["number"]: trial for trial in result["trials"]}
    if (recipe := next((trial for trial in result["trials"] if trial["is_recipe"] and trial["numbers"]), None)) is not None:
        console.print(f"the recipe as it is  {said(recipe)}", highlight=False)
    for number in result["front"]:
        settings = " ".join(f"{name}={value}" for name, value in by_number[number]["settings"].items())
        console.print(f"trial {number}  {said(by_number[number])}  {settings}", highlight=False)
    console.print(f" [bold]report[/]  {result['page']}", soft_wrap=True, highlight=False)
    if result["best"] is not None:
        console.print(
            f"\nTrain the best again, or longer:\n{result['experiments'][result['best']]}", soft_wrap=True, highlight=False, markup=False
        )


def said(trial: Mapping[str, Any]) -> str:
    return ", ".join(f"{word} {value:.4g}" for word, value in trial["numbers"].items())
