"""The plots of a report: a metric over the steps of one or several runs, beside published values. Reads no store."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import cycle
from typing import Any, NamedTuple

from flows.inspection.facts import RunFacts
from flows.pages.drawing import LINE, MARK, draw
from model.checkpoints.metrics import StepMetrics

COLOURS = (LINE, MARK, "#3f9e6e", "#b0599e", "#8a7a2d", "#c4524a")  # legible on white and on black
MAXIMUM_POINTS = 1_000  # per line: 19,073 points take 400 kB
TRAINING_PLOTS = {  # title: name in the metrics log, unit
    "Learning rate": ("learning_rate", ""),
    "Gradient norm": ("gradient_norm", ""),
    "Speed": ("tokens_per_second", "tokens per second"),
}

Point = tuple[int, float, float]  # step, value, standard error


class Series(NamedTuple):
    """Labelled points, drawn as a line or as markers."""

    label: str
    run: int  # its index: with several runs, each has a colour
    points: list[Point]
    marker: str = ""


def curves(runs: list[RunFacts]) -> dict[str, str]:
    """Title and inline SVG of each plot that has at least one point."""
    losses = [one for index, run in enumerate(runs) for one in _training_losses(run.metrics, index, _label(runs, run))]
    losses += _evaluated(runs, "val_loss")
    plots = {"Loss": _draw("Loss", "nats per token", losses, _published(runs, "val_loss"))}
    for title, (column, unit) in TRAINING_PLOTS.items():
        points = [thinned(_column(run.metrics, column)) for run in runs]
        lines = [Series(_label(runs, run), index, points[index]) for index, run in enumerate(runs)]
        plots[title] = _draw(title, unit, lines, {})
    families = (_family(metric) for run in runs for evaluation in run.evaluations for metric in evaluation.metrics)
    for family in dict.fromkeys(families):
        if family not in ("val_loss", "perplexity"):
            plots[family] = _draw(family, "", list(_evaluated(runs, family)), _published(runs, family))
    return {title: svg for title, svg in plots.items() if svg}


def loss_curve(metrics: list[StepMetrics]) -> str:
    """The loss of one run so far, as inline SVG; "" before its first step."""
    return _draw("Loss", "nats per token", _training_losses(metrics, 0, ""), {})


def thinned(points: list[Point]) -> list[Point]:
    """At most MAXIMUM_POINTS points: means of neighbours, each at its last step."""
    width = -(-len(points) // MAXIMUM_POINTS)
    groups = [points[start : start + width] for start in range(0, len(points), max(width, 1))]
    return [(group[-1][0], sum(value for _, value, _ in group) / len(group), 0.0) for group in groups]


def _training_losses(metrics: list[StepMetrics], run: int, name: str) -> list[Series]:
    losses = Series(f"{name} training".strip(), run, thinned(_column(metrics, "loss")))
    return [losses, Series(f"{name} val, while training".strip(), run, _column(metrics, "val_loss"), "o")]


def _column(metrics: list[StepMetrics], name: str) -> list[Point]:
    values = ((line.step, getattr(line, name)) for line in metrics)
    return [(step + 1, value, 0.0) for step, value in values if value is not None]


def _evaluated(runs: list[RunFacts], family: str) -> Iterator[Series]:
    for index, run in enumerate(runs):
        points_by_metric: dict[str, list[Point]] = defaultdict(list)
        for evaluation in run.evaluations:
            errors = evaluation.standard_errors or {}
            for metric, value in evaluation.metrics.items():
                if _family(metric) == family:
                    points_by_metric[metric].append((evaluation.step, value, errors.get(metric, 0.0)))
        for (metric, points), marker in zip(points_by_metric.items(), cycle("Ds^v"), strict=False):
            yield Series(_label(runs, run, metric), index, points, marker)


def _family(metric: str) -> str:
    """The name of a metric's plot: accuracies of one convention share a plot, as do losses of all window lengths."""
    losses = (family for family in ("val_loss", "perplexity", "bits_per_byte") if metric.startswith(family))
    return next(losses, metric.partition("_acc")[0])


def _label(runs: list[RunFacts], run: RunFacts, label: str = "") -> str:
    return label if len(runs) == 1 else f"{run.name} {label}".strip()


def _published(runs: list[RunFacts], family: str) -> dict[str, float]:
    known = (item for run in runs for item in run.references.items() if _family(item[0]) == family)
    return {f"{reference.label}, {metric}: {reference.value:.4f}": reference.value for metric, reference in known}


def _draw(title: str, unit: str, series: list[Series], published: dict[str, float]) -> str:
    """The plot as inline SVG, or "" when no series has points."""
    series = [one for one in series if one.points]
    if not series:
        return ""
    labels = len(series) + len(published)
    several_runs = len({one.run for one in series}) > 1

    def plot(axes: Any) -> None:
        for number, one in enumerate(series):
            colour = COLOURS[(one.run if several_runs else number) % len(COLOURS)]
            steps, values, errors = zip(*one.points, strict=True)
            if one.marker:
                bars = errors if any(errors) else None
                style = {"fmt": f"{one.marker}-", "markersize": 4, "linewidth": 0.9, "capsize": 2}
                axes.errorbar(steps, values, bars, color=colour, label=one.label, **style)
            else:
                axes.plot(steps, values, color=colour, linewidth=1.4, label=one.label)
        for (label, value), colour in zip(published.items(), cycle(COLOURS[::-1]), strict=False):
            axes.axhline(value, color=colour, linewidth=1, linestyle="--", label=label)
        if labels > 1 or series[0].marker:
            axes.figure.legend(frameon=False, fontsize=8, loc="outside lower left")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)

    legend_height = 0.17 * labels if labels > 1 else 0.0  # below the plot
    return draw(title, plot, 3.0 + legend_height)
