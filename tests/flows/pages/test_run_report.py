"""The report of runs: which charts it has, their size and numbers, and what a browser makes of it."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from flows.inspection.facts import REFERENCES, RunFacts, TrainingFacts
from flows.pages.curves import curves, loss_curve
from flows.pages.run_report import markdown, page
from model.checkpoints.records import StepMetrics
from model.evaluation.results import Evaluation
from tests.browser import browser
from tests.flows.pages.html_page import VALUES, HtmlPage, middle, values_at_pointer
from tests.polling import poll

HOSTILE = "</script><img src=x onerror=alert(1)>&amp;\"'"
ACCURACY = "hellaswag_completion_acc"


@cache
def logged(step: int, *, validated: bool) -> StepMetrics:
    """What every run logged of a step."""
    return StepMetrics(
        step=step, loss=3 + 8 * math.exp(-step / 400), learning_rate=1e-4 / (1 + step), gradient_norm=None,
        tokens_per_second=476_000 / (1 + step), val_loss=4.0 if validated else None,
    )  # fmt: skip


def run(name: str = "tiny", steps: int = 12, evaluated: tuple[int, ...] = (6, 12), batch_tokens: int = 256) -> RunFacts:
    """A run of so many steps, with evaluations and samples of some."""
    metrics = [logged(step, validated=step + 1 in evaluated) for step in range(steps)]
    shared: dict[str, Any] = {"job": "job", "environment": {}, "precision": "fp32", "data": "d"}
    evaluations = [
        Evaluation(name="hellaswag", step=step, items=9, metrics={ACCURACY: 0.27 + step / 1e6, "val_loss_t32": 4.5},
                   conventions={ACCURACY: "c", "val_loss_t32": "c"}, standard_errors={ACCURACY: 0.0044}, **shared)
        for step in evaluated
    ]  # fmt: skip
    text = {"prompt": "Hello,", "text": f" {HOSTILE}"}
    samples = [Evaluation(name="samples", step=step, samples=[text], **shared) for step in reversed(evaluated)]
    model = {"layers": 1, "heads": 2, "width": 16}
    references = {reference.metric: reference for reference in REFERENCES if reference.metric == ACCURACY}
    return RunFacts(
        name=name, code_version=None, config={"model": model, "train": {"batch_tokens": batch_tokens}}, dataset=None,
        mix="", metrics=metrics, training=TrainingFacts(steps, steps, metrics[0].loss, metrics[-1].loss),
        evaluations=evaluations, samples=samples, references=references, lineage=[], environment=[],
    )  # fmt: skip


def values(chart: dict[str, Any], label: str) -> list[tuple[int, float]]:
    """The steps and values of a series."""
    [series] = [row for row in chart["data"]["values"] if row["label"] == label]
    return list(zip(series["step"], series["value"], strict=True))


def test_a_chart_needs_two_points_of_a_series() -> None:
    titles = ["Loss", "Learning rate", "Speed", "hellaswag_completion"]
    assert list(curves([run()])) == titles  # every gradient norm is NaN
    assert list(curves([run(evaluated=(12,))])) == titles[:-1]
    assert list(curves([run(steps=1, evaluated=(1,))])) == []
    html = HtmlPage(page([run(steps=1, evaluated=(1,))]))
    assert html.count("0.2700 ± 0.0044")
    assert html.charts == {}
    assert loss_curve([]) == ""


def test_a_value_that_json_cannot_hold_is_left_out() -> None:
    facts = run()
    facts.evaluations[0].metrics["val_loss_t32"] = math.inf
    assert values(HtmlPage(page([facts])).charts["Loss"], "val_loss_t32") == [(12, 4.5)]


def test_the_numbers_of_all_runs_are_in_the_page_with_their_errors() -> None:
    first, second = run("first"), run("second", steps=8, evaluated=(4, 8), batch_tokens=512)
    html = HtmlPage(page([first, second]))
    html.assert_loads_nothing()
    losses = [(line.step + 1, float(f"{line.loss:.6g}")) for line in first.metrics]
    assert values(html.charts["Loss"], "first training") == losses
    accuracies = html.charts["hellaswag_completion"]
    assert values(accuracies, "second acc") == [(4, 0.270004), (8, 0.270008)]
    assert [(row["batch_tokens"], row["error"]) for row in accuracies["data"]["values"]] == [
        (256, [0.0044, 0.0044]),
        (512, [0.0044, 0.0044]),
    ]
    colours = {(row["run"], row["colour"]) for chart in html.charts.values() for row in chart["data"]["values"]}
    assert len(colours) == 2  # one for each run, the same in every chart


@pytest.mark.parametrize("count", [3, 20])
def test_long_runs_make_a_page_below_1_mb_and_share_their_steps(count: int) -> None:
    evaluated = tuple(range(1_000, 19_073, 1_000))
    names = [f"gpt2-124m-{index}" for index in range(count)]
    body = page([run(name, 19_073 - 500 * index, evaluated[:9]) for index, name in enumerate(names)])
    assert len(body) < 1_000_000
    lines = [row for row in HtmlPage(body).charts["Loss"]["data"]["values"] if row["shape"] == "stroke"]
    longest = lines[0]["step"]
    assert 140 <= len(longest) <= 1_000
    assert longest[-1] == 19_073
    for line in lines[1:]:
        assert set(line["step"][:-1]) <= set(longest)


def test_chance_is_beside_each_accuracy() -> None:
    cells = HtmlPage(page([run()])).cells
    assert cells[cells.index("0.2700 ± 0.0044") + 1] == "0.2500"
    assert cells.count("0.2500") == 1
    lines = markdown([run()]).splitlines()
    [accuracy], [loss] = (
        [line for line in lines if line.startswith(f"| {name} |")] for name in (ACCURACY, "val_loss_t32")
    )
    assert accuracy.startswith(f"| {ACCURACY} | 0.2700 ± 0.0044 | 0.2500 |")
    assert loss.startswith("| val_loss_t32 | 4.5000 |  |")


def test_a_hostile_name_or_text_stays_text() -> None:
    html = HtmlPage(page([run(HOSTILE), run("other")]))
    html.assert_loads_nothing()
    assert html.text.count(f" {HOSTILE}") == 4  # samples of two steps of both runs
    assert values(html.charts["Speed"], HOSTILE)


@contextmanager
def serving(body: bytes) -> Iterator[tuple[str, list[str]]]:
    """A web server for the page. Yields its address and the paths that were requested."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/report", paths
        server.shutdown()


def texts(part: str) -> str:
    """JavaScript: the texts of such a part of the first chart."""
    return f"[...document.querySelector('.plot').querySelectorAll('.role-{part} text')].map(text => text.textContent)"


@pytest.mark.full
def test_a_browser_draws_the_page_and_obeys_its_controls_without_a_request(tmp_path: Path) -> None:
    body = page([run("first", 1_200, (600, 1_200)), run(HOSTILE, 1_200, (600, 1_200))])
    with serving(body) as (url, paths), browser(tmp_path / "profile") as tab:
        for width, scheme in ((390, "dark"), (1_280, "light")):
            tab.call(
                "Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 500
            )
            tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            tab.visit(url)
            poll(lambda: tab.run("document.querySelectorAll('.vega-embed svg').length") == 4)
            assert tab.run("document.documentElement.scrollWidth") <= width
            styles = "[...document.querySelectorAll('svg text')].map(text => getComputedStyle(text))"
            ink = "rgb(228, 232, 238)" if scheme == "dark" else "rgb(28, 36, 48)"
            assert tab.run(f"[...new Set({styles}.map(style => style.fill))]") == [ink]
            assert tab.run(f"Math.min(...{styles}.map(style => parseFloat(style.fontSize)))") >= 12
            assert tab.run("document.querySelector('.wide').scrollWidth") <= width  # no column is cut
            if width < 500:
                x, y = middle(tab, ".plot svg")
                for kind, points in (("touchStart", [{"x": x, "y": y}]), ("touchEnd", [])):
                    tab.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)
                assert "first training" in poll(lambda: tab.run(VALUES))
        axis, legend = texts("axis-label"), texts("legend-label")
        assert "1.2k" in tab.run(axis)
        for control, expected in (("[value=tokens]", "300k"), ("[value=log]", "7")):
            tab.run(f"document.querySelector({control!r}).click()")
            poll(lambda expected=expected: expected in tab.run(axis))
        drawn = "document.querySelector('.plot').querySelectorAll('.mark-line path').length"
        assert (len(tab.run(legend)), tab.run(drawn)) == (6, 6)
        tab.run("document.querySelectorAll('[name=run]')[1].click()")
        poll(lambda: tab.run(legend) == ["first training", "first val, while training", "first val_loss_t32"])
        poll(lambda: tab.run(drawn) == 3)
        assert "first training" in values_at_pointer(tab, ".plot svg")
        download = "document.querySelector('[download]').href"
        assert tab.run(download).startswith("blob:")
        assert tab.run(f"fetch({download}).then(() => 'sent', () => 'refused')") == "refused"  # the page's policy
        steps = "[...document.querySelectorAll('details')].filter(step => step.checkVisibility())"
        slider = (
            "(slider => {slider.value = 0; slider.dispatchEvent(new Event('input'))})(document.querySelector('.step'))"
        )
        for step in ("step 1,200", "step 600"):
            assert tab.run(f"{steps}[0].innerText").startswith(step)
            tab.run(slider)
    assert paths == ["/report", "/report"]
