"""A store that stalls, refuses or is gone for a while costs a training no step, and no step is lost or told twice.

Trainings over a real S3 server behind a proxy that spoils what the test says; those of this very process repeat a
request for half a second where others do so for a minute. What is held against the undisturbed run is all: every
number, and the sha256s of the last checkpoint's files.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from model.__main__ import run_job
from model.checkpoints.metrics import StepMetrics
from model.checkpoints.records import checkpoints
from model.training import metrics, saver, trainer
from model.training.metrics import MetricsLog
from storage.keys import DatasetKeys, RunKeys
from storage.stores import retries, s3_client
from storage.stores.opening import open_store
from storage.stores.store import Store, read_json
from tests import servers
from tests.conftest import S3Url
from tests.model.training_runs import House, history, processes_of, training, until
from tests.proxy import Fault, Plan, Proxy, Request, spoiling

STEPS = 20
CALM, RUN = "calm", "disturbed"
SETTINGS = (
    f"train.max_steps={STEPS}", "train.batch_tokens=32", "train.micro_batch_sequences=1",
    "train.validate_every_steps=0", "train.keep_last=99",
)  # fmt: skip
AT_THE_END = "train.checkpoint_every_steps=1000"
SHORT_SECONDS = [
    (s3_client, "READ_SECONDS", 0.5),
    (retries, "RETRY_SECONDS", 0.5),
    (retries, "MAX_WAIT_SECONDS", 0.1),
    (saver, "RETRY_SECONDS", 0.05),
    (trainer, "SAVE_WAIT_SECONDS", 0.02),
]
NOT_STORED = "is not stored yet, the training goes on"
STALL_SECONDS = 60.0
Concerns = Callable[[Request], bool]


def undisturbing(_: Request) -> Fault | None:
    return None


def everything(_: Request) -> bool:
    return True


def of_the_run(request: Request) -> bool:
    return RunKeys(RUN).prefix in request.path


def writes(request: Request) -> bool:
    return request.method not in ("GET", "HEAD")


def of(key: str) -> Concerns:
    return lambda request: key in request.path


def spoils(fault: Fault, concerns: Concerns) -> Plan:
    return lambda request: fault if concerns(request) else None


class Far:
    """A house behind a proxy, and the trainings in it of this very process."""

    def __init__(self, house: House, proxy: Proxy, forget: Callable[[], None], capsys: pytest.CaptureFixture[str]):
        self.house, self.proxy = house, proxy
        self.steps: list[int] = []  # as they were made
        self.at: dict[int, Callable[[], object]] = {}  # what happens as soon as a step was made
        self.said = self.errors = ""
        self._forget, self._capsys = forget, capsys

    @property
    def store(self) -> Store:
        return self.house.store

    def ask(self, run: str, *overrides: str) -> str:
        return self.house.ask(run, *SETTINGS, *overrides)

    def train(self, key: str) -> int:
        """Train with short patience. Returns the exit code."""
        add = MetricsLog.add

        def watched(log: MetricsLog, step_metrics: StepMetrics) -> None:
            add(log, step_metrics)
            self.steps.append(step_metrics.step)
            self.at.pop(step_metrics.step, bool)()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MetricsLog, "add", watched)
            for module, name, seconds in SHORT_SECONDS:
                patch.setattr(module, name, seconds)
            self._forget()
            code = run_job(self.store.url, key)
        self._forget()
        self.listen()
        return code

    def listen(self) -> str:
        """All that was said so far."""
        found = self._capsys.readouterr()
        self.said += found.out
        self.errors += found.err
        return self.said

    def saved(self) -> list[int]:
        return [record.step for record in checkpoints(self.store, RUN)]

    def out(self, fault: Fault, concerns: Concerns, is_over: Callable[[int], object] = lambda _: False) -> None:
        """Spoil such requests from the first one of a save on, until it is over, told how many steps were made then."""
        began: list[int] = []

        def plan(request: Request) -> Fault | None:
            if not began and concerns(request) and RunKeys(RUN).checkpoints in request.path and writes(request):
                began.append(len(self.steps))
            return fault if began and concerns(request) and not is_over(began[0]) else None

        self.proxy.plan = plan

    def prove(self, calm: House, first_step: int = 0) -> None:
        """Each step was made once and is in the store once, and the run is the undisturbed one."""
        self.proxy.plan = undisturbing
        assert self.steps == list(range(first_step, STEPS))
        assert (read_json(self.store, RunKeys(RUN).latest) or {})["step"] == self.saved()[-1] == STEPS
        assert_equal_to(calm.store, CALM, self.store)


def assert_equal_to(calm: Store, calm_run: str, store: Store) -> None:
    assert history(store, RUN) == history(calm, calm_run)
    assert checkpoints(store, RUN)[-1].files == checkpoints(calm, calm_run)[-1].files


@pytest.fixture(scope="module")
def calm(house: House) -> Iterator[House]:
    """Where the undisturbed run is. One thread: two wait for each other ten times as long where others compute, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    house.trained_here(CALM, *SETTINGS, AT_THE_END)
    yield house
    torch.set_num_threads(threads)


@pytest.fixture
def far(
    calm: House,
    running: Callable[[str], servers.Server],
    s3_url: S3Url,
    monkeypatch: pytest.MonkeyPatch,
    forget_client: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Far]:
    url = s3_url("seaweedfs")
    with spoiling(running("seaweedfs").endpoint, undisturbing) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        forget_client()
        store = open_store(url, create=True)
        for listed in calm.store.list(DatasetKeys("small").prefix):
            store.put_new(listed.key, calm.store.read(listed.key).body)
        yield Far(House(store, calm.source, calm.manifest), proxy, forget_client, capsys)


# For a while


@pytest.mark.parametrize(("fault", "concerns"), [("stall", of_the_run), ("503", writes), ("lost", of_the_run)])
def test_a_training_goes_on_while_the_store_does_not_take_its_checkpoint(
    far: Far, calm: House, fault: Fault, concerns: Concerns
) -> None:
    far.out(fault, concerns, lambda began: len(far.steps) >= began + 10)  # for as long as ten steps take
    far.at[12] = lambda: until(lambda: NOT_STORED in far.listen(), "the save was neither stored nor said not to be")
    assert far.train(far.ask(RUN, "resources.unsaved_minutes=1")) == 0
    far.prove(calm)
    assert len(far.saved()) > 1  # later ones were stored as ever


@pytest.mark.parametrize(
    ("fault", "key"),
    [("500", RunKeys(RUN).metrics), ("lost", RunKeys(RUN).checkpoint_record(STEPS)), ("500", RunKeys(RUN).latest)],
)
def test_a_save_is_taken_up_wherever_it_was_cut_off(far: Far, calm: House, key: str, fault: Fault) -> None:
    """And stored once: half an hour of trying would else fill any store. A lost answer is that of a write done."""
    failing = spoils(fault, of(key))
    far.proxy.plan = lambda request: failing(request) if len(far.proxy.spoilt) < 30 else None
    assert far.train(far.ask(RUN, AT_THE_END)) == 0
    assert len(far.proxy.spoilt) == 30 and NOT_STORED in far.said
    far.prove(calm)
    assert len(list(far.store.list(RunKeys(RUN).checkpoints))) == 3  # weights, optimizer, record


def test_a_checkpoint_that_is_never_stored_gives_way_to_the_next(far: Far, calm: House) -> None:
    far.proxy.plan = spoils("500", lambda request: "000004/" in request.path and writes(request))
    far.at[6] = lambda: until(lambda: f"step 4 {NOT_STORED}" in far.listen(), "it was stored")
    assert far.train(far.ask(RUN)) == 0
    far.prove(calm)
    assert 8 <= far.saved()[0] < STEPS


def test_old_checkpoints_that_cannot_be_deleted_do_not_stop_the_training(far: Far, calm: House) -> None:
    far.proxy.plan = spoils("500", lambda request: request.method == "DELETE" and of(RunKeys(RUN).checkpoints)(request))
    assert far.train(far.ask(RUN, "train.keep_last=1", "train.keep_every_steps=0")) == 0
    assert "could not be deleted" in far.said
    assert len(far.saved()) > 1
    far.prove(calm)


@pytest.mark.parametrize("fault", ["500", "stall"])
def test_a_live_curve_that_cannot_be_shown_never_stops_the_training(
    far: Far, calm: House, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "PROGRESS_SECONDS", 0.0)
    far.proxy.plan = spoils(fault, of(RunKeys(RUN).progress))
    assert far.train(far.ask(RUN, "train.checkpoint_every_steps=10")) == 0
    assert "progress could not be shown" in far.said
    far.prove(calm)


# For good


def test_a_store_that_is_gone_ends_the_training_in_words_and_it_goes_on_when_the_store_is_back(
    far: Far, calm: House
) -> None:
    """It ends as soon as the limit is reached, not when the next checkpoint is due."""
    assert far.train(far.ask(CALM, AT_THE_END)) == 0  # every shard that is read is on this host now
    far.steps.clear()
    key = far.ask(RUN, "resources.unsaved_minutes=0.005")
    far.at[6] = lambda: until(lambda: far.saved() == [4], "the first checkpoint is not stored")
    far.at[7] = lambda: far.out("reset", everything)
    far.at[9] = lambda: until(lambda: not _is_saving(), "it is tried for ever")
    assert far.train(key) == 2
    assert far.steps in (list(range(9)), list(range(10)))
    for said in ("resources.unsaved_minutes = 0.005", "step 8", "run the same command"):
        assert said in far.errors
    far.proxy.plan = undisturbing
    assert far.saved() == [4]
    far.steps.clear()
    assert far.train(key) == 0
    far.prove(calm, first_step=4)


def _is_saving() -> bool:
    return any("(_save)" in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize("is_back", [True, False])
def test_a_stop_while_a_save_fails_is_saved_if_the_store_is_back_before_the_limit(
    far: Far, calm: House, is_back: bool
) -> None:
    asked: list[int] = []

    def ask_to_stop() -> None:
        until(lambda: f"step 4 {NOT_STORED}" in far.listen(), "it was stored")
        asked.append(len(far.proxy.spoilt))
        os.kill(os.getpid(), signal.SIGTERM)

    far.at[5] = ask_to_stop
    far.out("500", writes, lambda _: is_back and asked and len(far.proxy.spoilt) > asked[0] + 20)
    key = far.ask(RUN, f"resources.unsaved_minutes={1 if is_back else 0.02}")
    assert far.train(key) == (0 if is_back else 2)
    far.proxy.plan = undisturbing
    assert far.saved()[-1:] == [7] * is_back
    if is_back:
        assert len(far.steps) == 7  # the one in which it was told
        assert "stopped after saving" in far.said
    else:
        assert "resources.unsaved_minutes = 0.02" in far.errors and "run the same command" in far.errors
        far.steps.clear()
    assert far.train(key) == 0
    far.prove(calm)


# In processes of their own, with the patience that they have


@pytest.mark.nightly
def test_a_minute_without_an_answer_costs_no_step(far: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    steps = 120
    settings = (f"train.max_steps={steps}", "train.validate_every_steps=20")
    calm, key = far.ask(CALM, *settings, AT_THE_END), far.ask(RUN, *settings)
    began: list[float] = []

    def plan(request: Request) -> Fault | None:
        if not began and RunKeys(RUN).checkpoints + "000008/" in request.path:
            began.append(time.monotonic())
        return "stall" if began and time.monotonic() < began[0] + STALL_SECONDS and of_the_run(request) else None

    with training(far.store, calm, 1, tmp_path / CALM) as process:
        assert process.wait() == 0, process.said()
    far.proxy.plan = plan
    with training(far.store, key, 1, tmp_path / RUN) as process:
        process.until(lambda: began)
        before = len(process.steps())
        until(lambda: time.monotonic() > began[0] + STALL_SECONDS, "", seconds=2 * STALL_SECONDS)
        assert before + 20 < len(process.steps()) < steps
        assert far.saved() == [4]
        assert process.wait() == 0, process.said()
        assert process.steps() == list(range(1, steps + 1))
    assert_equal_to(far.store, CALM, far.store)
    assert far.saved()[1] == 8 and len(far.saved()) > 3  # a minute is within the patience of one request


@pytest.mark.full
def test_two_ranks_end_with_the_message_of_the_one_that_saves(far: Far, tmp_path: Path) -> None:
    far.proxy.plan = spoils("flip up", lambda request: of(RunKeys(RUN).checkpoints)(request) and writes(request))
    key = far.house.ask(RUN, "train.max_steps=100000", "resources.unsaved_minutes=0.01")
    with training(far.store, key, 2, tmp_path) as process:
        assert process.wait() == 2, process.said()
        assert "resources.unsaved_minutes = 0.01" in process.errors() and "Traceback" not in process.errors()
        assert not processes_of(far.store, key)
