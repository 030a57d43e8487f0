"""The page of a run: one Markdown artifact of the top-level flow run, kept up to date until the run ends.

    stages: say, Bar, …  ─▶  RunPage (its stages, tables, curve)  ─▶  a thread renders it and updates the artifact

A retry of the flow run updates the same artifact. Everything on the page covers all attempts, as the store does.
"""

import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from math import inf
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.runtime import flow_run

from flows.inspection.plan import Plan, plan
from flows.pages.curves import loss_curve
from flows.pages.drawing import render
from model.checkpoints.records import StepMetrics
from model.config import RunConfig
from model.form import DEFAULT, settings_beyond
from storage.errors import StorageError

KEY = "run"
UPDATE_SECONDS = 3.0
CURVE_SECONDS = 20.0  # drawing takes 0.2 s of this process
INK = "#7d8794"  # legible on the UI's white and on its black background
MOST_ROWS = 30  # of a table; the stages' own pages show all

page: ContextVar["RunPage | None"] = ContextVar("page", default=None)


@dataclass
class Stage:
    """What the page shows about one stage."""

    name: str
    state: str = "waiting"
    text: str = ""  # the last line that the stage has printed
    done: int = 0
    total: int = 0
    unit: str = ""
    began: float = 0.0
    ended: float = 0.0
    counted: tuple[float, int] | None = None  # when the stage first counted something done, and how much

    @property
    def seconds(self) -> float:
        return (self.ended or time.monotonic()) - self.began if self.began else 0.0

    @property
    def rate(self) -> float:
        """Units per second since the first were done: without the start of processes, with checkpoints."""
        since, before = self.counted or (time.monotonic(), self.done)
        return (self.done - before) / max((self.ended or time.monotonic()) - since, 1e-9)

    @property
    def remaining_seconds(self) -> float | None:
        return (self.total - self.done) / self.rate if self.state == "running" and self.rate else None


@dataclass
class RunPage:
    """What the page shows. Any thread may change it; each method marks it as changed."""

    title: str
    config: RunConfig
    stages: dict[str, Stage]
    plan: Plan | None = None
    tables: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    alerts: list[str] = field(default_factory=list)
    metrics: list[StepMetrics] = field(default_factory=list)  # of the loss curve
    changed: threading.Event = field(default_factory=threading.Event)
    _drawn: list[StepMetrics] = field(default_factory=list)
    _drawn_at: float = -inf
    _curve: str = ""

    def enter(self, name: str, text: str = "") -> Stage:
        """The stage, which is running from now on; earlier stages are done."""
        stage = self.stages.setdefault(name, Stage(name))
        if not stage.began:
            self._end()
            stage.state, stage.began = "running", time.monotonic()
        stage.text = text or stage.text
        self.changed.set()
        return stage

    def count(self, name: str, done: int, total: int, unit: str) -> None:
        stage = self.enter(name)
        stage.done, stage.total, stage.unit = done, total, unit
        if done and (stage.counted is None or done < stage.counted[1]):  # less: an earlier attempt was ahead
            stage.counted = time.monotonic(), done

    def fail(self, name: str, reason: object) -> None:
        stage = self.enter(name, str(reason).partition("\n")[0])
        stage.state, stage.ended = "failed", time.monotonic()

    def show(self, title: str, rows: list[dict[str, str]]) -> None:
        self.tables[title] = rows
        self.changed.set()

    def close(self, error: BaseException | None) -> None:
        """The run has ended: its running stage is done, or failed with this error unless another stage has failed."""
        states = {stage.state: stage.name for stage in self.stages.values()}
        if error is not None and "running" in states and "failed" not in states:
            self.fail(states["running"], str(error) or type(error).__name__)
        self._end()
        self._drawn_at = -inf  # draw the last curve at once

    @property
    def headline(self) -> str:
        """The page in one line: its title, and the stage that runs or has failed."""
        shown = [stage for stage in list(self.stages.values()) if stage.state in ("running", "failed")]
        count = f", {shown[-1].done:,} of {shown[-1].total:,} {shown[-1].unit}" if shown and shown[-1].total else ""
        return f"{self.title}: {shown[-1].name} {shown[-1].state}{count}" if shown else self.title

    def markdown(self) -> str:
        metrics = self.metrics
        if metrics is not self._drawn and len(metrics) > 1 and time.monotonic() - self._drawn_at > CURVE_SECONDS:
            self._drawn, self._drawn_at = metrics, time.monotonic()
            self._curve = b64encode(loss_curve(metrics).replace("currentColor", INK).encode()).decode()
        tables = {title: (rows[:MOST_ROWS], len(rows) - MOST_ROWS) for title, rows in dict(self.tables).items() if rows}
        stages = [replace(stage) for stage in list(self.stages.values())]  # copies: another thread changes the stages
        shown = {"stages": stages, "tables": tables, "curve": self._curve, "duration": duration}
        shown |= {"settings": settings_beyond(DEFAULT, self.config), "now": self._so_far(), "links": dict(self.links)}
        return render("run_page.md.j2", **vars(self) | shown)

    def _so_far(self) -> dict[str, str]:
        """What the plan says, as it is now: by the same labels."""
        stage = self.stages.get("train")
        if stage is None or not stage.counted or not stage.rate:
            return {}
        seconds_left = stage.remaining_seconds
        spent_of_total = [stage.seconds] + ([] if seconds_left is None else [stage.seconds + seconds_left])
        price = self.config.resources.price_per_gpu_hour * (self.plan.gpus if self.plan else 1) / 3600
        speed = f"{stage.rate * self.config.train.batch_tokens:,.0f} tokens/s"
        now = {"speed": speed, "time": " of ".join(map(duration, spent_of_total))}
        return now | ({"price": " of ".join(f"{price * seconds:,.2f}" for seconds in spent_of_total)} if price else {})

    def _end(self) -> None:
        for stage in self.stages.values():
            if stage.state == "running":
                stage.state, stage.ended = "done", time.monotonic()


def run_page() -> RunPage:
    """The page of this run; outside of a run, a page that nobody sees."""
    return page.get() or RunPage("", RunConfig(), {})


def duration(seconds: float) -> str:
    """A duration in its two largest units: 45 s, 3 min 20 s, 6 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


@contextmanager
def on_page(config: RunConfig, *stages: str) -> Iterator[None]:
    """Keep the page of the current flow run up to date while the block lasts. A stage shares the page of its run."""
    if page.get() is not None:
        yield
        return
    title = f"Run {config.name}" if {"train", "evaluate"} & {*stages} else f"Dataset {config.data.dataset}"
    shown = RunPage(title, config, {name: Stage(name) for name in stages})
    if "train" in stages:
        with suppress(ValueError, StorageError):  # the flow itself will say what is wrong
            shown.plan = plan(config)
    ended = threading.Event()
    updater = threading.Thread(target=_update, args=(shown, flow_run.id, ended), daemon=True)
    token = page.set(shown)
    updater.start()
    try:
        yield
        shown.close(None)
    except BaseException as error:
        shown.close(error)
        raise
    finally:
        page.reset(token)
        ended.set()
        shown.changed.set()
        updater.join(UPDATE_SECONDS * 10)  # a server that does not answer costs the run no more


def _update(shown: RunPage, run_id: str, ended: threading.Event) -> None:
    """Keep the artifact up to date until the run has ended. Tries again later if Prefect's server does not answer."""
    artifact: UUID | None = None
    with get_client(sync_client=True) as client:
        while not (is_last := ended.is_set()) or shown.changed.is_set():
            shown.changed.wait()
            shown.changed.clear()
            try:
                artifact = _put(client, UUID(run_id), artifact, shown)
            except httpx.HTTPError:
                shown.changed.set()
            if is_last:
                return
            ended.wait(UPDATE_SECONDS)


def _put(client: SyncPrefectClient, run_id: UUID, artifact: UUID | None, shown: RunPage) -> UUID:
    """Update the artifact, which an earlier attempt may have created. Returns its id."""
    text, title = shown.markdown(), shown.headline
    if artifact is None:
        of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]), key=ArtifactFilterKey(any_=[KEY]))
        if not (existing := client.read_artifacts(artifact_filter=of_run)):
            create = ArtifactCreate(key=KEY, type="markdown", description=title, data=text, flow_run_id=run_id)
            return client.create_artifact(create).id
        artifact = existing[0].id
    # Not `client.update_artifact`, which also emits an event with the whole page: 60 kB in the database each time.
    client.request("PATCH", "/artifacts/{id}", json={"data": text, "description": title}, path_params={"id": artifact})
    return artifact
