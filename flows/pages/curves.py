"""The plots of a report: one number over the steps of one run or several, beside published ones. Reads no store."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from flows.inspection.facts import Facts
from flows.pages.drawing import LINE, MARK, draw

COLOURS = (LINE, MARK, "#3f9e6e", "#b0599e", "#8a7a2d", "#c4524a")  # legible on white and on black
MOST_POINTS = 1_000  # of a line: 19,073 steps would be 400 kB each
OF_TRAINING = {
    "Learning rate": ("learning_rate", ""),
    "Gradient norm": ("gradient_norm", ""),
    "Speed": ("tokens_per_second", "tokens a second"),
}


@dataclass(frozen=True)
class Series:
    """Points (step, value, standard error) under one label: joined by a line, or marked each."""

    label: str
    run: int  # whose it is: several runs have a colour each
    points: list[tuple[int, float, float]]
    marked: str = ""


def curves(runs: list[Facts]) -> dict[str, str]:
    """Title and inline SVG of each plot that there is something to draw for."""
    drawn = {"Loss": _draw("Loss", "nats a token", list(_losses(runs)), _published(runs, "val_loss"))}
    for title, (name, unit) in OF_TRAINING.items():
        drawn[title] = _draw(title, unit, [_trained(runs, place, name, "") for place in range(len(runs))], {})
    for family in dict.fromkeys(
        _family(metric) for run in runs for one in run["evaluations"] for metric in one["metrics"]
    ):
        if family not in ("val_loss", "perplexity"):
            drawn[family] = _draw(family, "", list(_evaluated(runs, family)), _published(runs, family))
    return {title: svg for title, svg in drawn.items() if svg}


def loss_curve(name: str, metrics: list[dict[str, Any]]) -> str:
    """The loss of one training so far, as inline SVG; nothing where no step is."""
    run: Facts = {"name": name, "metrics": metrics, "evaluations": []}
    return _draw("Loss", "nats a token", list(_losses([run])), {})


def _losses(runs: list[Facts]) -> Iterator[Series]:
    for place, run in enumerate(runs):
        yield _trained(runs, place, "loss", "training")
        validated = [(line["step"] + 1, line["val_loss"], 0.0) for line in run["metrics"] if "val_loss" in line]
        yield Series(_of(runs, run, "val, while training"), place, validated, "o")
    yield from _evaluated(runs, "val_loss")


def _trained(runs: list[Facts], place: int, name: str, label: str) -> Series:
    points = [(line["step"] + 1, line[name], 0.0) for line in runs[place]["metrics"] if line[name] is not None]
    return Series(_of(runs, runs[place], label), place, thinned(points))


def _evaluated(runs: list[Facts], family: str) -> Iterator[Series]:
    for place, run in enumerate(runs):
        found: dict[str, list[tuple[int, float, float]]] = {}
        for one in run["evaluations"]:
            for metric, value in one["metrics"].items():
                if _family(metric) == family:
                    error = one.get("standard_errors", {}).get(metric, 0.0)
                    found.setdefault(metric, []).append((one["step"], value, error))
        for (metric, points), mark in zip(found.items(), cycle("Ds^v"), strict=False):
            yield Series(_of(runs, run, metric), place, points, mark)


def thinned(points: list[tuple[int, float, float]]) -> list[tuple[int, float, float]]:
    """At most MOST_POINTS of them: the means of neighbours, each at the last one's step."""
    width = -(-len(points) // MOST_POINTS)
    groups = [points[start : start + width] for start in range(0, len(points), max(width, 1))]
    return [(group[-1][0], sum(value for _, value, _ in group) / len(group), 0.0) for group in groups]


def _family(metric: str) -> str:
    """Metrics of one plot: accuracies of one convention, losses whatever the windows."""
    return metric.partition("_acc")[0].partition("_t")[0]


def _of(runs: list[Facts], run: Facts, label: str) -> str:
    return label if len(runs) == 1 else f"{run['name']} {label}".strip()


def _published(runs: list[Facts], family: str) -> dict[str, float]:
    """The published numbers of the family's metrics, by what is written beside them."""
    found = {one.metric: one for run in runs for one in run["references"].values() if _family(one.metric) == family}
    return {f"{one.what}, {metric}: {one.value:.4f}": one.value for metric, one in found.items()}


def _draw(title: str, unit: str, series: list[Series], published: dict[str, float]) -> str:
    """The plot, or nothing where there is no point."""
    series = [one for one in series if one.points]
    labels = len(series) + len(published)
    return draw(title, _plot(unit, series, published), 3 + 0.17 * labels * (labels > 1)) if series else ""


def _plot(unit: str, series: list[Series], published: dict[str, float]) -> Callable[[Any], None]:
    def plot(axes: Any) -> None:
        several = len({one.run for one in series}) > 1
        for number, one in enumerate(series):
            colour = COLOURS[(one.run if several else number) % len(COLOURS)]
            steps, values, errors = zip(*one.points, strict=True)
            if one.marked:
                bars = errors if any(errors) else None
                how = {"fmt": f"{one.marked}-", "markersize": 4, "linewidth": 0.9, "capsize": 2}
                axes.errorbar(steps, values, bars, color=colour, label=one.label, **how)
            else:
                axes.plot(steps, values, color=colour, linewidth=1.4, label=one.label)
        for (label, value), colour in zip(published.items(), cycle(COLOURS[::-1]), strict=False):
            axes.axhline(value, color=colour, linewidth=1, linestyle="--", label=label)
        if len(series) + len(published) > 1 or series[0].marked:
            axes.figure.legend(frameon=False, fontsize=8, loc="outside lower left")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)

    return plot
