"""The charts of a report: a metric over the steps of one or several runs, beside published values. Reads no store."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import cycle, groupby, islice, repeat
from math import isfinite
from typing import Any, NamedTuple

from flows.inspection.facts import RunFacts
from flows.pages.drawing import Chart, specification, svg
from model.checkpoints.records import StepMetrics

LINE = "stroke"  # as Vega names a line's symbol in a legend
COLOURS = ("#3b82c4", "#d9822b", "#3f9e6e", "#b0599e", "#8a7a2d", "#c4524a")  # legible on white and on black
LINE_POINTS, RUNS_POINTS = 1_000, 3_000  # of a line, and of the lines of all runs: in four charts these take 350 kB
TRAINING_CHARTS = {  # title: name in the metrics log, unit
    "Learning rate": ("learning_rate", ""),
    "Gradient norm": ("gradient_norm", ""),
    "Speed": ("tokens_per_second", "tokens per second"),
}

Point = tuple[int, float, float]  # step, value, standard error


class Series(NamedTuple):
    """Labelled points of a run: a line, or markers with this shape."""

    run: str
    label: str
    points: list[Point]
    shape: str = LINE


def curves(runs: list[RunFacts]) -> dict[str, Chart]:
    """Title and chart of each metric that has a series with several points."""
    batch_tokens = {run.name: run.config.get("train", {}).get("batch_tokens", 0) for run in runs}
    stride = max(_stride(run.metrics, len(runs)) for run in runs)
    losses = [one for run in runs for one in _training_losses(run.name, run.metrics, stride)]
    plotted = {"Loss": ("nats per token", [*losses, *_evaluated(runs, "val_loss")])}
    for title, (column, unit) in TRAINING_CHARTS.items():
        lines = [Series(run.name, "", thinned(_column(run.metrics, column), stride)) for run in runs]
        plotted[title] = unit, lines
    families = (_family(metric) for run in runs for evaluation in run.evaluations for metric in evaluation.metrics)
    for family in dict.fromkeys(families):
        if family not in ("val_loss", "perplexity"):
            plotted[family] = "", list(_evaluated(runs, family))
    return {
        title: _chart(unit, _rows(series, batch_tokens), _published(runs, "val_loss" if title == "Loss" else title))
        for title, (unit, series) in plotted.items()
        if any(len(one.points) > 1 for one in series)
    }


def loss_curve(metrics: list[StepMetrics]) -> str:
    """The loss of one run so far, as inline SVG; "" before its first step."""
    rows = _rows(_training_losses("", metrics, _stride(metrics)), {"": 0})
    return svg(_chart("nats per token", rows, {})) if rows else ""


def thinned(points: list[Point], stride: int) -> list[Point]:
    """Means over `stride` steps, each at its last step. Lines with the same stride share their steps."""
    groups = [list(group) for _, group in groupby(points, lambda point: (point[0] - 1) // stride)]
    return [(group[-1][0], sum(value for _, value, _ in group) / len(group), 0.0) for group in groups]


def _stride(metrics: list[StepMetrics], runs: int = 1) -> int:
    """How many steps a mean covers, so that a page stays below 1 MB."""
    return -(-(metrics[-1].step + 1) // min(LINE_POINTS, RUNS_POINTS // runs)) if metrics else 1


def _training_losses(run: str, metrics: list[StepMetrics], stride: int) -> list[Series]:
    training, val = (_column(metrics, name) for name in ("loss", "val_loss"))
    return [Series(run, "training", thinned(training, stride)), Series(run, "val, while training", val, "circle")]


def _column(metrics: list[StepMetrics], name: str) -> list[Point]:
    values = ((line.step, getattr(line, name)) for line in metrics)
    # JSON has no NaN.
    return [(step + 1, value, 0.0) for step, value in values if value is not None and isfinite(value)]


def _evaluated(runs: list[RunFacts], family: str) -> Iterator[Series]:
    for run in runs:
        points_by_metric: dict[str, list[Point]] = defaultdict(list)
        for evaluation in run.evaluations:
            errors = evaluation.standard_errors or {}
            for metric, value in evaluation.metrics.items():
                if _family(metric) == family and isfinite(value):
                    points_by_metric[metric].append((evaluation.step, value, errors.get(metric, 0.0)))
        shapes = cycle(("diamond", "square", "triangle-up", "triangle-down"))
        for (metric, points), shape in zip(points_by_metric.items(), shapes, strict=False):
            yield Series(run.name, _label(metric), points, shape)


def _family(metric: str) -> str:
    """The name of a metric's chart: accuracies of one convention share a chart, as do losses of all window lengths."""
    losses = (family for family in ("val_loss", "perplexity", "bits_per_byte") if metric.startswith(family))
    return next(losses, metric.partition("_acc")[0])


def _label(metric: str) -> str:
    """The name of a metric in its chart, whose title has the rest of an accuracy's name."""
    return f"acc{metric.partition('_acc')[2]}" if "_acc" in metric else metric


def _published(runs: list[RunFacts], family: str) -> dict[str, float]:
    known = {metric: reference for run in runs for metric, reference in run.references.items()}
    return {
        f"{reference.label.partition(',')[0]}, {_label(metric)}: {reference.value:.4f}": reference.value
        for metric, reference in known.items()
        if _family(metric) == family
    }


def _rows(series: list[Series], batch_tokens: dict[str, int]) -> list[dict[str, Any]]:
    """The series that have points, as Vega reads them. `batch_tokens` has every run of the page."""
    runs = list(batch_tokens)
    return [
        {
            "run": one.run,
            "label": f"{one.run} {one.label}".strip() if len(runs) > 1 else one.label,
            "colour": COLOURS[(runs.index(one.run) if len(runs) > 1 else number) % len(COLOURS)],
            "shape": one.shape,
            "batch_tokens": batch_tokens[one.run],
            "step": [step for step, _, _ in one.points],
            "value": [float(f"{value:.6g}") for _, value, _ in one.points],
            "error": [error for _, _, error in one.points] if one.shape != LINE else [],
        }
        for number, one in enumerate(one for one in series if one.points)
    ]


def _chart(unit: str, rows: list[dict[str, Any]], published: dict[str, float]) -> Chart:
    """Lines, markers with error bars, and a dashed line for each published value."""
    chart = specification("lines", rows)
    chart["encoding"]["y"]["title"] = unit
    *_, markers, dashed = chart["layer"]
    dashed["data"] = {"values": [{"label": label, "value": value} for label, value in published.items()]}
    labels = [*(row["label"] for row in rows), *published]
    for encoding, ours, theirs in (
        (chart["encoding"]["color"], (row["colour"] for row in rows), cycle(COLOURS[::-1])),
        (markers["encoding"]["shape"], (row["shape"] for row in rows), repeat(LINE)),
        (dashed["encoding"]["strokeDash"], ([1, 0] for _ in rows), repeat([5, 4])),
    ):
        encoding["scale"] = {"domain": labels, "range": [*ours, *islice(theirs, len(published))]}
        encoding["legend"] = {} if len(labels) > 1 else None
    return chart
