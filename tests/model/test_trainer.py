"""Training in real processes: it learns, ranks agree, kills leave no trace, and what is damaged is named."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load

from model.__main__ import run_job
from model.checkpoint import OPTIMIZER, WEIGHTS
from model.config import RunConfig
from model.distributed import DDPConfig
from model.history import CheckpointRecord, checkpoints, read_metrics
from model.job import Job, ask, read_job, read_result
from model.loader import WindowOrder
from model.metrics import MetricsLog
from model.run import pin_run, training_job
from model.trainer import Trainer
from storage import keys, sources
from storage.canonical import sha256
from storage.errors import CheckpointInvalid
from storage.layout import open_store
from storage.manifest import Manifest
from storage.store import Store, read_json
from tests.making import build_dataset, document, tiny_config, write_parquet

STEPS = 12
BATCH_TOKENS = 256  # steps of about 0.05 s: long enough to be killed in the middle
BATCH_WINDOWS = 8
SHORT = ("train.batch_tokens=64", "train.validate_every_steps=0")
REPAIR = "gpt2 dataset verify --repair"
PARENT = """
import os, signal, subprocess, sys
words = [sys.executable, "-m", "model", os.environ["STORE"], os.environ["JOB"], "--processes", "2"]
subprocess.Popen([*words, "--parent", str(os.getpid())], start_new_session=True)
signal.pause()
"""


class House(NamedTuple):
    """A store with a dataset; every test trains a run of its own in it."""

    store: Store
    source: str
    manifest: Manifest

    def config(self, run: str, *overrides: str) -> RunConfig:
        ours = [f"name={run}", f"train.batch_tokens={BATCH_TOKENS}", f"train.max_steps={STEPS}"]
        return tiny_config(self.store.url, self.source, *ours, *overrides)

    def ask(self, run: str, *overrides: str) -> str:
        """Pin a run and ask for its training. Returns the job's key."""
        return ask(
            self.store, training_job(pin_run(self.store, self.config(run, *overrides), self.manifest.digest, None))
        )

    def trained_here(self, run: str, *overrides: str) -> str:
        """A run that was trained in this very process."""
        assert run_job(self.store.url, self.ask(run, *overrides)) == 0
        return run

    def copy_without_runs(self, folder: Path) -> "House":
        shutil.copytree(self.store.url, folder, ignore=shutil.ignore_patterns("runs"))
        return House(open_store(str(folder)), self.source, self.manifest)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "REMEMBERED", folder / "digests")
        for index in range(2):
            texts = [document(index * 40 + number) for number in range(40)]
            write_parquet(folder / "source" / f"file_{index}.parquet", texts)
        store = open_store(str(folder / "store"), create=True)
        source = str(folder / "source" / "*.parquet")
        yield House(store, source, build_dataset(tiny_config(store.url, source)))


@pytest.fixture(scope="module")
def undisturbed(house: House, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """The name of a run that so many ranks trained from its first to its last step, in processes of their own."""

    @cache
    def trained(ranks: int) -> str:
        run = f"undisturbed-{ranks}"
        with training(house.store, house.ask(run), ranks, tmp_path_factory.mktemp(run)) as process:
            assert process.wait() == 0, process.said()
        return run

    return trained


def until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Poll for the condition; fail when it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.001)


class Training:
    """`python -m model` of one job, leader of its own session, with its output in files."""

    def __init__(self, store: Store, job_key: str, ranks: int, folder: Path) -> None:
        self._store, self._job_key, self._folder = store, job_key, folder
        words = [sys.executable, "-m", "model", store.url, job_key, "--processes", str(ranks)]
        with self._file("out").open("w") as out, self._file("err").open("w") as err:
            self._process = subprocess.Popen(words, stdout=out, stderr=err, cwd=folder, start_new_session=True)

    def _file(self, name: str) -> Path:
        return self._folder / name

    def said(self) -> str:
        return self._file("out").read_text() + self._file("err").read_text()

    def errors(self) -> str:
        return self._file("err").read_text()

    def steps(self) -> list[int]:
        return [int(step) for step in re.findall(r"^step +(\d+)/", self._file("out").read_text(), re.MULTILINE)]

    def wait(self) -> int:
        return self._process.wait(timeout=120)

    def until(self, condition: Callable[[], object]) -> None:
        """Poll for the condition while the training goes on."""
        until(lambda: condition() or self._process.poll() is not None, "the training neither came there nor ended")
        assert self._process.poll() is None, self.said()

    def terminate(self) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the group, and to the ranks, which torchrun gives sessions of their own."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        kill_all(self._store, self._job_key)


@contextmanager
def training(store: Store, job_key: str, ranks: int, folder: Path) -> Iterator[Training]:
    folder.mkdir(exist_ok=True)
    process = Training(store, job_key, ranks, folder)
    try:
        yield process
    finally:
        process.kill()


def processes_of(store: Store, job_key: str) -> list[int]:
    """The launcher and the ranks of a job, by the words they were started with."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                words = (folder / "cmdline").read_text().split("\0")
                if store.url in words and job_key in words:
                    found.append(int(folder.name))
    return found


def kill_all(store: Store, job_key: str) -> None:
    for process in processes_of(store, job_key):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    until(lambda: not processes_of(store, job_key), "a killed process is still there")


def history(store: Store, run: str) -> list[dict[str, Any]]:
    """All that was logged but for the speed, which no two runs share."""
    lines = [{name: line[name] for name in line if name != "tokens_per_second"} for line in read_metrics(store, run)]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return lines


def losses(store: Store, run: str) -> list[float]:
    return [line["loss"] for line in history(store, run)]


def final_weights(store: Store, run: str) -> bytes | bytearray | memoryview:
    last = checkpoints(store, run)[-1]
    assert last.step == STEPS
    return store.read(keys.checkpoint_file(run, last.step, last.attempt, WEIGHTS)).body


def assert_equal_runs(store: Store, run: str, other: str) -> None:
    assert history(store, run) == history(store, other)
    assert final_weights(store, run) == final_weights(store, other)


def copy_checkpoints(store: Store, run: str, other: str, last_step: int = STEPS) -> list[CheckpointRecord]:
    """Put a run's checkpoints up to a step under the name of another run. Returns them."""
    for listed in list(store.list(keys.checkpoints(run))):
        name = listed.key.removeprefix(keys.checkpoints(run))
        if int(name[:6]) <= last_step:
            store.put_new(keys.checkpoints(other) + name, store.read(listed.key).body)
    return checkpoints(store, other)


def flip_a_byte(store: Store, key: str) -> tuple[str, str]:
    """Damage an object but for its size. Returns its sha256 before and after."""
    path = store.local_path(key)
    assert path is not None
    body = bytearray(path.read_bytes())
    before = sha256(body)
    body[len(body) // 2] ^= 1
    path.write_bytes(body)
    return before, sha256(body)


def everything(store: Store) -> dict[str, float]:
    return {listed.key: listed.modified for listed in store.list("")}


# Learning


def test_the_loss_begins_at_that_of_a_guess_and_falls(house: House, undisturbed: Callable[[int], str]) -> None:
    found = losses(house.store, undisturbed(1))
    assert len(found) == STEPS
    assert 10.6 <= found[0] <= 11.1
    assert found[-1] < found[0] - 1
    assert all(later < earlier for earlier, later in pairwise(found))


def test_a_finished_training_answers_with_its_last_step(house: House, undisturbed: Callable[[int], str]) -> None:
    run = undisturbed(2)
    assert read_result(house.store, read_job(house.store, house.ask(run))) == {
        "step": STEPS,
        "tokens": STEPS * BATCH_TOKENS,
    }
    assert [record.step for record in checkpoints(house.store, run)] == [4, 8, 12]
    assert (read_json(house.store, keys.run_latest(run)) or {})["step"] == STEPS
    assert [line["step"] for line in history(house.store, run) if "val_loss" in line] == [5, 11]


@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_are_the_same_for_any_number_of_ranks(
    house: House, undisturbed: Callable[[int], str], ranks: int
) -> None:
    alone, shared = history(house.store, undisturbed(1)), history(house.store, undisturbed(ranks))
    for ours, theirs in zip(shared, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=0)


def test_losses_are_the_same_for_another_micro_batch(house: House, undisturbed: Callable[[int], str]) -> None:
    run = house.trained_here("micro", "train.micro_batch_sequences=1")
    assert losses(house.store, run) == pytest.approx(losses(house.store, undisturbed(1)), rel=1e-5, abs=0)


# Going on


@pytest.mark.parametrize("ranks", [1, 2])
def test_three_kills_leave_no_trace(
    house: House, undisturbed: Callable[[int], str], ranks: int, tmp_path: Path
) -> None:
    run = f"killed-{ranks}"
    store, key = house.store, house.ask(run)
    saving = keys.checkpoints(run) + "000008/"
    moments: list[Callable[[Training], object]] = [
        lambda process: 2 in process.steps(),  # before there is any checkpoint
        lambda _: list(store.list(saving)),  # while the second one is being saved
        lambda process: 9 in process.steps(),  # between checkpoints, in a process that resumed
    ]
    for number, reached in enumerate(moments):
        with training(store, key, ranks, tmp_path / str(number)) as process:
            process.until(lambda process=process, reached=reached: reached(process))
            process.kill()
        assert read_result(store, read_job(store, key)) is None
    with training(store, key, ranks, tmp_path / "last") as process:
        assert process.wait() == 0, process.said()
        assert process.steps()[0] in (5, 9)
    assert_equal_runs(store, run, undisturbed(ranks))


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_and_ends_well_and_the_run_goes_on_from_there(
    house: House, undisturbed: Callable[[int], str], ranks: int, tmp_path: Path
) -> None:
    run = f"stopped-{ranks}"
    store, key = house.store, house.ask(run)
    with training(store, key, ranks, tmp_path / "first") as process:
        process.until(lambda: 2 in process.steps())
        process.terminate()
        assert process.wait() == 0, process.said()
        stopped_at = process.steps()[-1]
    assert 2 <= stopped_at < STEPS
    assert checkpoints(store, run)[-1].step == stopped_at
    assert read_result(store, read_job(store, key)) is None
    with training(store, key, ranks, tmp_path / "second") as process:
        assert process.wait() == 0, process.said()
        assert process.steps() == list(range(stopped_at + 1, STEPS + 1))
    assert_equal_runs(store, run, undisturbed(ranks))


def test_a_run_of_two_ranks_goes_on_with_one(house: House, undisturbed: Callable[[int], str]) -> None:
    run, key = "fewer", house.ask("fewer")
    copy_checkpoints(house.store, undisturbed(2), run, last_step=8)
    assert run_job(house.store.url, key) == 0
    assert losses(house.store, run) == pytest.approx(losses(house.store, undisturbed(2)), rel=1e-5, abs=0)


def test_a_finished_job_is_not_done_again(house: House, undisturbed: Callable[[int], str], tmp_path: Path) -> None:
    key, before = house.ask(undisturbed(1)), everything(house.store)
    started = time.monotonic()
    with training(house.store, key, 1, tmp_path) as process:
        assert process.wait() == 0
        assert process.said() == ""
    assert time.monotonic() - started < 30
    assert everything(house.store) == before


def test_killed_between_the_last_checkpoint_and_the_result_only_the_result_is_written(
    house: House, undisturbed: Callable[[int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, key = "unanswered", house.ask("unanswered")
    copy_checkpoints(house.store, undisturbed(1), run)
    before = everything(house.store)
    assert run_job(house.store.url, key) == 0
    job = read_job(house.store, key)
    assert set(everything(house.store)) - set(before) == {keys.result(run, job.job_id)}
    assert "step " not in capsys.readouterr().out


def test_dropout_goes_on_bit_for_bit_after_a_crash(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.trained_here("dropped", *SHORT, "train.dropout=0.2")
    key = house.ask("dropped-crashed", *SHORT, "train.dropout=0.2")
    add = MetricsLog.add

    def crash(log: MetricsLog, line: dict[str, Any]) -> None:
        if line["step"] == 6:
            raise RuntimeError("pulled the plug")
        add(log, line)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "add", crash)
        assert run_job(house.store.url, key) == 1
    assert [record.step for record in checkpoints(house.store, "dropped-crashed")] == [4]
    assert run_job(house.store.url, key) == 0
    assert_equal_runs(house.store, "dropped-crashed", "dropped")
    whole = losses(house.store, house.trained_here("undropped", *SHORT))
    assert losses(house.store, "dropped") != pytest.approx(whole, rel=1e-5, abs=0)


# Not outliving its parent


def test_every_rank_ends_when_the_process_that_started_them_is_killed(house: House, tmp_path: Path) -> None:
    key = house.ask("orphaned", "train.max_steps=100000")
    environment = os.environ | {"STORE": house.store.url, "JOB": key}
    with (tmp_path / "out").open("w") as out:
        parent = subprocess.Popen([sys.executable, "-c", PARENT], env=environment, stdout=out, stderr=out)
    try:
        until(lambda: "step " in (tmp_path / "out").read_text(), "no step was made")
        assert len(processes_of(house.store, key)) == 3  # the launcher and two ranks
        parent.kill()
        parent.wait()
        until(lambda: not processes_of(house.store, key), "a rank outlives the process that started it", seconds=30)
    finally:
        parent.kill()
        parent.wait()
        kill_all(house.store, key)


def test_a_process_whose_parent_is_gone_already_does_not_begin() -> None:
    code = "from model.parent import end_with_parent; end_with_parent(1); print('went on')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 1
    assert not found.stdout


# What is damaged or does not belong


def test_a_flipped_byte_in_a_shard_is_named_with_its_remedy(house: House, tmp_path: Path) -> None:
    copy = house.copy_without_runs(tmp_path / "store")
    key = copy.ask("spoilt")
    rows = list(copy.manifest.rows("train"))
    order = WindowOrder([row.tokens for row in rows], 32, copy.config("spoilt").train.seed)
    row = rows[int(order.locate(0, 1)[0][0])]
    before, after = flip_a_byte(copy.store, keys.shard("small", row.shard_id))
    with training(copy.store, key, 1, tmp_path / "process") as process:
        assert process.wait() == 2, process.said()
        for said in (row.shard_id, before, after, REPAIR):
            assert said in process.errors()
        assert "Traceback" not in process.errors()
    assert not checkpoints(copy.store, "spoilt")


def test_a_flipped_byte_that_only_the_second_rank_reads_is_named_too(house: House, tmp_path: Path) -> None:
    copy = house.copy_without_runs(tmp_path / "store")
    rows = list(copy.manifest.rows("train"))
    for seed in range(1_000):
        order = WindowOrder([row.tokens for row in rows], 32, seed)
        first, second = (set(order.locate(at, BATCH_WINDOWS // 2)[0].tolist()) for at in (0, BATCH_WINDOWS // 2))
        if second - first:
            break
    row = rows[min(second - first)]
    before, after = flip_a_byte(copy.store, keys.shard("small", row.shard_id))
    key = copy.ask("spoilt", f"train.seed={seed}")
    with training(copy.store, key, 2, tmp_path / "process") as process:
        assert process.wait() == 2, process.said()
        for said in (row.shard_id, before, after, REPAIR):
            assert said in process.errors()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.layers=2", ("model", "'layers': 1", "'layers': 2")),
        ("train.learning_rate=2e-2", ("train",)),
        ("train.seed=5", ("seed",)),
        ("data.dataset=other", ("dataset", "manifest", "small", "other")),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    house: House,
    undisturbed: Callable[[int], str],
    override: str,
    said: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, _, _ = override.partition("=")
    run = f"foreign-{name}"
    config = house.config(run, override)
    manifest = house.manifest
    if name == "data.dataset":
        manifest = build_dataset(house.config(run, override, "data.shard_tokens=900"))
    key = ask(house.store, training_job(pin_run(house.store, config, manifest.digest, None)))
    copy_checkpoints(house.store, undisturbed(1), run)
    before = everything(house.store)
    assert run_job(house.store.url, key) == 2
    message = capsys.readouterr().err
    for word in (run, "12", *said):
        assert word in message
    assert everything(house.store) == before


@pytest.mark.parametrize("file", [WEIGHTS, OPTIMIZER])
def test_a_damaged_checkpoint_is_named_and_the_remedy_works(
    house: House, undisturbed: Callable[[int], str], file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"damaged-{file}"
    key = house.ask(run)
    newest = copy_checkpoints(house.store, undisturbed(1), run, last_step=8)[-1]
    damaged = keys.checkpoint_file(run, newest.step, newest.attempt, file)
    before, after = flip_a_byte(house.store, damaged)
    assert run_job(house.store.url, key) == 2
    message = capsys.readouterr().err
    for said in (damaged, before, after, keys.checkpoint_record(run, 8)):
        assert said in message
    house.store.delete(keys.checkpoint_record(run, 8))
    assert run_job(house.store.url, key) == 0
    assert losses(house.store, run) == pytest.approx(losses(house.store, undisturbed(1)), rel=1e-5, abs=0)


@pytest.mark.parametrize(("file", "harm"), [(WEIGHTS, "missing"), (OPTIMIZER, "cut")])
def test_a_record_without_its_whole_files_does_not_count_and_the_run_goes_on(
    house: House, undisturbed: Callable[[int], str], file: str, harm: str
) -> None:
    run = f"{harm}-{file}"
    key = house.ask(run)
    newest = copy_checkpoints(house.store, undisturbed(1), run, last_step=8)[-1]
    path = house.store.local_path(keys.checkpoint_file(run, newest.step, newest.attempt, file))
    assert path is not None
    body = path.read_bytes()
    path.unlink()
    if harm == "cut":
        path.write_bytes(body[:1_000])
    assert [record.step for record in checkpoints(house.store, run)] == [4]
    assert run_job(house.store.url, key) == 0
    assert losses(house.store, run) == pytest.approx(losses(house.store, undisturbed(1)), rel=1e-5, abs=0)


def test_two_trainings_of_one_run_do_not_mix(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The slower one is told so at its next save, and the faster one's checkpoints stay."""
    key = house.ask("twice", *SHORT)
    slow = Trainer(house.store, read_job(house.store, key), DDPConfig(0, 1, torch.device("cpu")))
    assert run_job(house.store.url, key) == 0
    before = everything(house.store)
    with pytest.raises(CheckpointInvalid, match="twice"):
        slow.fit()
    kept = {name: at for name, at in everything(house.store).items() if name in before and "/checkpoints/" in name}
    assert kept == {name: at for name, at in before.items() if "/checkpoints/" in name}


# Retention, and numbers that are none


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(2, 5, [5, 10, 11, 12]), (1, 0, [12]), (3, 12, [10, 11, 12]), (1, 4, [4, 8, 12]), (50, 0, list(range(1, 13)))],
)
def test_the_newest_and_the_multiples_are_kept(house: House, keep_last: int, keep_every: int, kept: list[int]) -> None:
    run = house.trained_here(
        f"kept-{keep_last}-{keep_every}", f"train.keep_last={keep_last}", f"train.keep_every_steps={keep_every}",
        "train.checkpoint_every_steps=1", *SHORT,
    )  # fmt: skip
    assert [record.step for record in checkpoints(house.store, run)] == kept
    assert len(list(house.store.list(keys.checkpoints(run)))) == len(kept) * 3  # nothing of the others is left
    assert len(losses(house.store, run)) == STEPS  # but their metrics are


def test_there_is_a_checkpoint_at_every_moment_of_a_retention(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    run, key = "always", house.ask("always", "train.keep_last=1", "train.keep_every_steps=0", *SHORT)
    found: list[int] = []
    delete = type(house.store).delete

    def watched(store: Store, deleted: str) -> None:
        delete(store, deleted)  # type: ignore[arg-type]
        if deleted.startswith(keys.checkpoints(run)):
            found.append(checkpoints(store, run)[-1].step)

    monkeypatch.setattr(type(house.store), "delete", watched)
    assert run_job(house.store.url, key) == 0
    assert found == [8] * 3 + [12] * 3


def test_a_loss_that_is_no_number_stops_the_run(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    key = house.ask(
        "exploded", *SHORT, "train.learning_rate=1e30", "train.warmup_steps=0", "train.checkpoint_every_steps=1"
    )
    assert run_job(house.store.url, key) == 2
    assert "train.learning_rate" in capsys.readouterr().err
    newest = checkpoints(house.store, "exploded")[-1]
    body = house.store.read(keys.checkpoint_file("exploded", newest.step, newest.attempt, WEIGHTS)).body
    assert all(tensor.isfinite().all() for tensor in load(bytes(body)).values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_never_saved(house: House, value: float) -> None:
    run = f"poisoned-{value}"
    job: Job = read_job(house.store, house.ask(run))
    trainer = Trainer(house.store, job, DDPConfig(0, 1, torch.device("cpu")))
    with torch.no_grad():
        trainer.model.transformer.wte.weight[0] = value
    with pytest.raises(ValueError, match=run):
        trainer.fit()
    assert not checkpoints(house.store, run)
