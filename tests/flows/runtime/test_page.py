"""The page of a run: what it shows of each stage, and the one artifact that attempts and updates share."""

from collections.abc import Iterator
from typing import Any
from uuid import UUID

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from flows.runtime import page as module
from flows.runtime.page import RunPage, Stage, duration, on_page
from flows.runtime.progress import Bar, say
from model.checkpoints.records import StepMetrics
from model.config import RunConfig
from tests.flows.client import call_api
from tests.polling import poll

CONFIG = RunConfig(name="shown")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def lines_of(shown: RunPage) -> dict[str, list[str]]:
    """The cells of each row of the page's tables, by the first cell."""
    rows = [line for line in shown.markdown().splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in row.strip("| ").split("|")] for row in rows)}


def test_a_stage_shows_its_state_its_count_its_rate_and_what_remains(clock: Clock) -> None:
    shown = RunPage("Run shown", CONFIG, {name: Stage(name) for name in ("download", "train", "report")})
    shown.enter("download", "4 of 4 source files")
    clock.now += 10
    shown.count("train", 0, 100, "steps")
    clock.now += 50  # processes start, the model is compiled
    shown.count("train", 20, 100, "steps")
    clock.now += 40
    shown.count("train", 40, 100, "steps")
    rows = lines_of(shown)
    assert rows["download"][:3] == ["done", "", "10 s"]
    assert rows["train"] == ["**running**", "40 of 100 steps", "1 min 30 s", "30/min", "2 min 0 s"]
    assert rows["report"][0] == "waiting"
    assert "- **download**: 4 of 4 source files" in shown.markdown()
    shown.close(ValueError("no such file\nand more"))
    assert lines_of(shown)["train"][0] == "**failed**"
    assert "- **train**: no such file\n" in shown.markdown()


def test_a_resumed_training_counts_from_its_checkpoint(clock: Clock) -> None:
    shown = RunPage("Run shown", CONFIG, {"train": Stage("train")})
    for done in (50, 41, 51):  # the earlier attempt was at step 50
        shown.count("train", done, 100, "steps")
        clock.now += 5
    assert lines_of(shown)["train"] == ["**running**", "51 of 100 steps", "15 s", "1/s", "49 s"]


def test_a_failed_evaluation_stays_failed_when_the_report_is_written() -> None:
    shown = RunPage("Run shown", CONFIG, {name: Stage(name) for name in ("evaluate", "report")})
    shown.enter("evaluate")
    shown.fail("evaluate", "hellaswag of step 9: killed")
    shown.enter("report", "written")
    shown.close(ValueError("hellaswag of step 9: killed"))
    assert [stage.state for stage in shown.stages.values()] == ["failed", "done"]


def test_speed_and_time_stand_beside_the_plan(clock: Clock) -> None:
    config = CONFIG.model_copy(update={"resources": CONFIG.resources.model_copy(update={"price_per_gpu_hour": 36.0})})
    shown = RunPage("Run shown", config, {"train": Stage("train")}, module.plan(config, lambda _config, _gpus: 1e6))
    shown.count("train", 1, config.train.max_steps, "steps")
    clock.now += 100
    shown.count("train", 101, config.train.max_steps, "steps")
    rows = lines_of(shown)
    assert rows["speed"] == ["1,000,000 tokens/s, measured now", "524,288 tokens/s"]
    assert rows["time"] == ["2.9 hours", "1 min 40 s of 5 h 17 min"]
    assert rows["price"][1] == "1.00 of 190.72"


def test_a_table_shows_its_first_rows_and_how_many_follow() -> None:
    shown = RunPage("Run shown", CONFIG, {})
    shown.show("Shards", [{"shards": f"shard {number}", "why": "a|b\nc"} for number in range(module.MOST_ROWS + 7)])
    text = shown.markdown()
    assert text.count("shard ") == module.MOST_ROWS
    assert r"| shard 0 | a\|b c |" in text
    assert "and 7 more" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (21_900, "6 h 5 min")]
)
def test_a_duration_is_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def artifacts_of(api: str, run_id: str) -> list[dict[str, Any]]:
    query = {"artifacts": {"flow_run_id": {"any_": [run_id]}, "key": {"any_": [module.KEY]}}}
    found: list[dict[str, Any]] = call_api(api, "/artifacts/filter", query)
    return found


def test_the_page_is_there_while_the_run_goes_on_and_ends_with_its_last_state(
    api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UPDATE_SECONDS", 0.05)
    seen: list[str] = []

    @flow(name="paged")
    def paged(config: RunConfig) -> str:
        with on_page(config, "train"):
            run_id, shown = str(flow_run.id), module.page.get()
            assert shown is not None
            bar = Bar("train", 10, "steps")
            seen.append(poll(lambda: artifacts_of(api, run_id))[0]["data"])
            bar.to(5)
            poll(lambda: "5 of 10 steps" in artifacts_of(api, run_id)[0]["data"])
            line: dict[str, Any] = {"learning_rate": 1e-3, "gradient_norm": None}
            shown.metrics = [StepMetrics(step=step, loss=9.0 - step, **line) for step in range(5)]
            say("train", "10 of 10 steps done")
            bar.to(10)
            return run_id

    run_id = paged(CONFIG)
    [artifact] = artifacts_of(api, run_id)
    assert "**running**" in seen[0]
    assert "| train | done | 10 of 10 steps |" in artifact["data"]
    assert "data:image/svg+xml;base64," in artifact["data"]
    with get_client(sync_client=True) as client:  # another attempt of the same run
        second = module._put(client, UUID(run_id), None, RunPage("Run shown", CONFIG, {}))
    assert [str(second)] == [other["id"] for other in artifacts_of(api, run_id)]


def test_a_run_goes_on_without_its_page_when_the_server_fails(api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> UUID:
        raise httpx.ConnectError("down")

    monkeypatch.setattr(module, "UPDATE_SECONDS", 0.01)
    monkeypatch.setattr(module, "_put", refused)

    @flow(name="unpaged")
    def unpaged(config: RunConfig) -> int:
        with on_page(config, "audit"):
            say("audit", "done")
            return 7

    assert unpaged(CONFIG) == 7


@pytest.fixture(autouse=True)
def no_page() -> Iterator[None]:
    assert module.page.get() is None
    yield
    assert module.page.get() is None
