"""A store that stalls, refuses requests or is down for a while costs a training no step and duplicates none.

The trainings use a real S3 server behind a fault-injecting proxy. In this process the retry deadline is half a second
instead of a minute. Each run must equal the undisturbed run: all metrics, and the sha256s of the last checkpoint.
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
from model.checkpoints.records import StepMetrics, checkpoints
from model.training import metrics, saver, trainer
from model.training.metrics import MetricsLog
from storage.keys import DatasetKeys, RunKeys
from storage.stores import retries, s3_client
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests import servers
from tests.conftest import S3Url
from tests.model.training_runs import StoredDataset, history, processes_of, training
from tests.polling import poll
from tests.proxy import Fault, Plan, Proxy, Request, running_proxy

STEPS = 20
UNDISTURBED, RUN = "undisturbed", "disturbed"
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
NOT_STORED = "is not stored yet, training goes on"
STALL_SECONDS = 60.0
Matches = Callable[[Request], bool]


def no_fault(_: Request) -> Fault | None:
    return None


def any_request(_: Request) -> bool:
    return True


def is_of_run(request: Request) -> bool:
    return RunKeys(RUN).prefix in request.path


def is_write(request: Request) -> bool:
    return request.method not in ("GET", "HEAD")


def has_key(key: str) -> Matches:
    return lambda request: key in request.path


def inject(fault: Fault, matches: Matches) -> Plan:
    return lambda request: fault if matches(request) else None


class FaultyStore:
    """A store with a dataset behind a fault-injecting proxy, and the trainings on it in this process."""

    def __init__(
        self, dataset: StoredDataset, proxy: Proxy, forget: Callable[[], None], capsys: pytest.CaptureFixture[str]
    ):
        self.dataset, self.proxy = dataset, proxy
        self.steps: list[int] = []  # in the order in which they ended
        self.after_step: dict[int, Callable[[], object]] = {}  # actions by step
        self.output = self.errors = ""
        self._forget, self._capsys = forget, capsys

    @property
    def store(self) -> Store:
        return self.dataset.store

    def put_job(self, run: str, *overrides: str) -> str:
        return self.dataset.put_job(run, *SETTINGS, *overrides)

    def train(self, key: str) -> int:
        """Train with short retry deadlines. Returns the exit code."""
        add = MetricsLog.add

        def watched(log: MetricsLog, step_metrics: StepMetrics) -> None:
            add(log, step_metrics)
            self.steps.append(step_metrics.step)
            self.after_step.pop(step_metrics.step, bool)()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MetricsLog, "add", watched)
            for module, name, seconds in SHORT_SECONDS:
                patch.setattr(module, name, seconds)
            self._forget()
            code = run_job(self.store.url, key)
        self._forget()
        self.read_output()
        return code

    def read_output(self) -> str:
        """All output so far."""
        captured = self._capsys.readouterr()
        self.output += captured.out
        self.errors += captured.err
        return self.output

    def saved(self) -> list[int]:
        return [record.step for record in checkpoints(self.store, RUN)]

    def inject_from_next_save(
        self, fault: Fault, matches: Matches, is_over: Callable[[int], object] = lambda _: False
    ) -> None:
        """Inject the fault into matching requests from the next save on, until `is_over` (given the steps so far)."""
        began: list[int] = []

        def plan(request: Request) -> Fault | None:
            if not began and matches(request) and RunKeys(RUN).checkpoints in request.path and is_write(request):
                began.append(len(self.steps))
            return fault if began and matches(request) and not is_over(began[0]) else None

        self.proxy.plan = plan

    def assert_equals(self, reference: StoredDataset, first_step: int = 0) -> None:
        """Assert that each step ran and was stored once, and that the run equals the undisturbed one."""
        self.proxy.plan = no_fault
        assert self.steps == list(range(first_step, STEPS))
        assert self.saved()[-1] == STEPS
        assert_equal_to(reference.store, UNDISTURBED, self.store)


def assert_equal_to(reference: Store, reference_run: str, store: Store) -> None:
    assert history(store, RUN) == history(reference, reference_run)
    assert checkpoints(store, RUN)[-1].files == checkpoints(reference, reference_run)[-1].files


@pytest.fixture(scope="module")
def reference(dataset: StoredDataset) -> Iterator[StoredDataset]:
    """The store with the undisturbed run. One thread, because two are ten times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dataset.train(UNDISTURBED, *SETTINGS, AT_THE_END)
    yield dataset
    torch.set_num_threads(threads)


@pytest.fixture
def faulty(
    reference: StoredDataset,
    running: Callable[[str], servers.Server],
    s3_url: S3Url,
    monkeypatch: pytest.MonkeyPatch,
    forget_client: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
) -> Iterator[FaultyStore]:
    url = s3_url("seaweedfs")
    with running_proxy(running("seaweedfs").endpoint, no_fault) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        forget_client()
        store = open_store(url, create=True)
        for listed in reference.store.list(DatasetKeys("small").prefix):
            store.put_new(listed.key, reference.store.read(listed.key).body)
        yield FaultyStore(StoredDataset(store, reference.source, reference.manifest), proxy, forget_client, capsys)


# Temporary faults


@pytest.mark.parametrize(("fault", "matches"), [("stall", is_of_run), ("503", is_write), ("lost", is_of_run)])
def test_a_training_continues_while_a_checkpoint_cannot_be_stored(
    faulty: FaultyStore, reference: StoredDataset, fault: Fault, matches: Matches
) -> None:
    faulty.inject_from_next_save(fault, matches, lambda began: len(faulty.steps) >= began + 10)  # for ten steps
    faulty.after_step[12] = lambda: poll(lambda: NOT_STORED in faulty.read_output(), failure="no message")
    assert faulty.train(faulty.put_job(RUN, "resources.unsaved_minutes=1")) == 0
    faulty.assert_equals(reference)
    assert len(faulty.saved()) > 1  # later checkpoints were stored as usual


@pytest.mark.parametrize(
    ("fault", "key"),
    [("500", RunKeys(RUN).metrics), ("lost", RunKeys(RUN).checkpoint_record(STEPS))],
)
def test_a_save_resumes_where_it_was_interrupted(
    faulty: FaultyStore, reference: StoredDataset, key: str, fault: Fault
) -> None:
    """It is stored once: half an hour of repeated writes would fill any store. A "lost" write has succeeded."""
    failing = inject(fault, has_key(key))
    faulty.proxy.plan = lambda request: failing(request) if len(faulty.proxy.injected) < 30 else None
    assert faulty.train(faulty.put_job(RUN, AT_THE_END)) == 0
    assert len(faulty.proxy.injected) == 30 and NOT_STORED in faulty.output
    faulty.assert_equals(reference)
    assert len(list(faulty.store.list(RunKeys(RUN).checkpoints))) == 3  # weights, optimizer, record


def test_a_checkpoint_that_is_never_stored_is_replaced_by_the_next(
    faulty: FaultyStore, reference: StoredDataset
) -> None:
    faulty.proxy.plan = inject("500", lambda request: "000004/" in request.path and is_write(request))
    faulty.after_step[6] = lambda: poll(lambda: f"step 4 {NOT_STORED}" in faulty.read_output(), failure="no message")
    assert faulty.train(faulty.put_job(RUN)) == 0
    faulty.assert_equals(reference)
    assert 8 <= faulty.saved()[0] < STEPS


def test_old_checkpoints_that_cannot_be_deleted_do_not_stop_the_training(
    faulty: FaultyStore, reference: StoredDataset
) -> None:
    faulty.proxy.plan = inject(
        "500", lambda request: request.method == "DELETE" and has_key(RunKeys(RUN).checkpoints)(request)
    )
    assert faulty.train(faulty.put_job(RUN, "train.keep_last=1", "train.keep_every_steps=0")) == 0
    assert "could not be deleted" in faulty.output
    assert len(faulty.saved()) > 1
    faulty.assert_equals(reference)


@pytest.mark.parametrize("fault", ["500", "stall"])
def test_progress_that_cannot_be_stored_never_stops_the_training(
    faulty: FaultyStore, reference: StoredDataset, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "PROGRESS_SECONDS", 0.0)
    faulty.proxy.plan = inject(fault, has_key(RunKeys(RUN).progress))
    assert faulty.train(faulty.put_job(RUN, "train.checkpoint_every_steps=10")) == 0
    assert "progress could not be shown" in faulty.output
    faulty.assert_equals(reference)


# Permanent faults


def test_a_store_that_stays_down_ends_the_training_with_a_message_and_the_run_resumes_later(
    faulty: FaultyStore, reference: StoredDataset
) -> None:
    """It ends when the limit is reached, not when the next checkpoint is due."""
    assert faulty.train(faulty.put_job(UNDISTURBED, AT_THE_END)) == 0  # caches every shard on this host
    faulty.steps.clear()
    key = faulty.put_job(RUN, "resources.unsaved_minutes=0.005")
    faulty.after_step[6] = lambda: poll(lambda: faulty.saved() == [4], failure="the first checkpoint is not stored")
    faulty.after_step[7] = lambda: faulty.inject_from_next_save("reset", any_request)
    faulty.after_step[9] = lambda: poll(lambda: not _is_saving(), failure="the save still retries")
    assert faulty.train(key) == 2
    assert faulty.steps in (list(range(9)), list(range(10)))
    for fact in ("resources.unsaved_minutes = 0.005", "step 8", "run the same command"):
        assert fact in faulty.errors
    faulty.proxy.plan = no_fault
    assert faulty.saved() == [4]
    faulty.steps.clear()
    assert faulty.train(key) == 0
    faulty.assert_equals(reference, first_step=4)


def _is_saving() -> bool:
    return any("(_save)" in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize("is_back", [True, False])
def test_a_stop_during_a_failing_save_is_saved_if_the_store_recovers_before_the_limit(
    faulty: FaultyStore, reference: StoredDataset, is_back: bool
) -> None:
    faults_at_stop: list[int] = []

    def request_stop() -> None:
        poll(lambda: f"step 4 {NOT_STORED}" in faulty.read_output(), failure="no message")
        faults_at_stop.append(len(faulty.proxy.injected))
        os.kill(os.getpid(), signal.SIGTERM)

    faulty.after_step[5] = request_stop
    faulty.inject_from_next_save(
        "500", is_write, lambda _: is_back and faults_at_stop and len(faulty.proxy.injected) > faults_at_stop[0] + 20
    )
    key = faulty.put_job(RUN, f"resources.unsaved_minutes={1 if is_back else 0.02}")
    assert faulty.train(key) == (0 if is_back else 2)
    faulty.proxy.plan = no_fault
    assert faulty.saved()[-1:] == [7] * is_back
    if is_back:
        assert len(faulty.steps) == 7  # the step that received SIGTERM
        assert "stopped after saving" in faulty.output
    else:
        assert "resources.unsaved_minutes = 0.02" in faulty.errors and "run the same command" in faulty.errors
        faulty.steps.clear()
    assert faulty.train(key) == 0
    faulty.assert_equals(reference)


# In child processes, with the default deadlines


@pytest.mark.nightly
def test_a_minute_without_a_response_costs_no_step(
    faulty: FaultyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    steps = 120
    settings = (f"train.max_steps={steps}", "train.validate_every_steps=20")
    undisturbed_key, key = faulty.put_job(UNDISTURBED, *settings, AT_THE_END), faulty.put_job(RUN, *settings)
    began: list[float] = []

    def plan(request: Request) -> Fault | None:
        if not began and RunKeys(RUN).checkpoints + "000008/" in request.path:
            began.append(time.monotonic())
        return "stall" if began and time.monotonic() < began[0] + STALL_SECONDS and is_of_run(request) else None

    with training(faulty.store, undisturbed_key, 1, tmp_path / UNDISTURBED) as process:
        assert process.wait() == 0, process.output()
    faulty.proxy.plan = plan
    with training(faulty.store, key, 1, tmp_path / RUN) as process:
        process.wait_until(lambda: began)
        before = len(process.steps())
        poll(lambda: time.monotonic() > began[0] + STALL_SECONDS, 2 * STALL_SECONDS)
        assert before + 20 < len(process.steps()) < steps
        assert faulty.saved() == [4]
        assert process.wait() == 0, process.output()
        assert process.steps() == list(range(1, steps + 1))
    assert_equal_to(faulty.store, UNDISTURBED, faulty.store)
    assert faulty.saved()[1] == 8 and len(faulty.saved()) > 3  # a minute is within the deadline of one request


@pytest.mark.full
def test_two_ranks_end_with_the_message_of_the_one_that_saves(faulty: FaultyStore, tmp_path: Path) -> None:
    faulty.proxy.plan = inject(
        "flip up", lambda request: has_key(RunKeys(RUN).checkpoints)(request) and is_write(request)
    )
    key = faulty.dataset.put_job(RUN, "train.max_steps=100000", "resources.unsaved_minutes=0.01")
    with training(faulty.store, key, 2, tmp_path) as process:
        assert process.wait() == 2, process.output()
        assert "resources.unsaved_minutes = 0.01" in process.errors() and "Traceback" not in process.errors()
        assert not processes_of(faulty.store, key)
