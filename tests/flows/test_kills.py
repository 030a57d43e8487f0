"""Everything killed at once, in the middle of each stage: the next run goes on, and ends as if nothing had happened."""

import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from model.checkpoints.records import checkpoints, read_metrics
from storage.datasets.manifest import latest_manifest
from storage.digests import sha256
from storage.keys import RunKeys
from storage.stores.opening import open_store
from tests.flows.client import gpt2, run_gpt2
from tests.making import document, write_parquet
from tests.polling import poll
from tests.processes import children, family, kill

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

TINY = [
    "name=tiny", "data.dataset=small", "data.source=source/*.parquet", "data.shard_tokens=1500", "data.val_shards=4",
    "resources.workers=1", "resources.processes=2", "model.layers=1", "model.heads=2", "model.width=32",
    "model.context_tokens=64", "train.sequence_tokens=64", "train.micro_batch_sequences=2", "train.batch_tokens=512",
    "train.max_steps=60", "train.warmup_steps=2", "train.learning_rate=1e-2", "train.checkpoint_every_steps=10",
    "train.validate_every_steps=0", "evaluation.hellaswag=", "evaluation.completion_items=8",
    "evaluation.sample_tokens=8", "evaluation.samples=1",
]  # fmt: skip
PRETRAIN = ["pretrain", *(word for setting in TINY for word in ("--set", setting))]


@dataclass(frozen=True)
class Outcome:
    """All that a run must end with, whatever happened on the way."""

    manifest: str
    losses: list[float]
    weights: str
    evaluations: dict[str, str]


def outcome(folder: Path) -> Outcome:
    store = open_store(str(folder / "data"))
    manifest = latest_manifest(store, "small")
    assert manifest is not None
    last = checkpoints(store, "tiny")[-1]
    evaluations = {
        listed.key: sha256(store.read(listed.key).body)
        for listed in store.list(RunKeys("tiny").evaluations + f"{60:06d}/")
    }
    losses = [line.loss for line in read_metrics(store, "tiny")]
    return Outcome(manifest.digest, losses, last.files["model.safetensors"].sha256, evaluations)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A folder in which everything went well, and what came of it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for index in range(4):
        texts = [document(index * 100 + number, 100) for number in range(100)]
        write_parquet(folder / "source" / f"file_{index}.parquet", texts)
    code, said = run_gpt2(*PRETRAIN, cwd=folder)
    assert code == 0, said
    return folder, outcome(folder)


def records(folder: Path) -> int:
    return len(list((folder / "data" / "datasets" / "small" / "shards").glob("*.json")))


def results(folder: Path) -> int:
    return len(
        [
            path
            for path in (folder / "data" / "runs" / "tiny" / "jobs").glob("*.result.json")
            if "train" not in path.name
        ]
    )


MOMENTS: dict[str, tuple[Callable[[Path], bool], Callable[[Path], bool]]] = {  # when to kill, and what is not done yet
    "tokenising": (
        lambda folder: records(folder) > 3,
        lambda folder: not (folder / "data/datasets/small/latest.json").exists(),
    ),
    "training": (
        lambda folder: len(list((folder / "data/runs/tiny/checkpoints").glob("*.json"))) > 1,
        lambda folder: not list((folder / "data/runs/tiny/jobs").glob("train-*.result.json")),
    ),
    "evaluation": (lambda folder: results(folder) > 0, lambda folder: results(folder) < 3),
}  # fmt: skip


def test_killed_in_each_stage_it_goes_on_to_the_same_end(tmp_path: Path, undisturbed: tuple[Path, Outcome]) -> None:
    calm, expected = undisturbed
    shutil.copytree(calm / "source", tmp_path / "source")
    for stage, (reached, unfinished) in MOMENTS.items():
        process = gpt2(*PRETRAIN, cwd=tmp_path)
        poll(lambda reached=reached, process=process: reached(tmp_path) or process.poll() is not None)
        kill(family(process.pid))
        process.communicate()
        assert process.returncode == -signal.SIGKILL, stage
        assert unfinished(tmp_path), f"{stage}: the kill came too late to prove anything"
    code, output = run_gpt2(*PRETRAIN, cwd=tmp_path)
    assert code == 0, output
    assert outcome(tmp_path) == expected


def test_a_shard_and_prefects_database_deleted_cost_one_job(undisturbed: tuple[Path, Outcome], tmp_path: Path) -> None:
    calm, expected = undisturbed
    folder = shutil.copytree(calm, tmp_path / "copy")
    shutil.rmtree(folder / ".gpt2")
    shards = sorted((folder / "data/datasets/small/shards").glob("*.bin"))
    shards[7].unlink()
    shards[7].with_suffix(".json").unlink()
    kept = [path for path in (folder / "data").rglob("*") if path.suffix in {".bin", ".safetensors"}]
    written = [path.stat().st_mtime_ns for path in kept]
    code, said = run_gpt2(*PRETRAIN, cwd=folder)
    assert code == 0, said
    assert f"{len(shards)} of {len(shards)} shards done, 1 of them built now" in said
    assert "already done" in said
    assert [path.stat().st_mtime_ns for path in kept] == written
    assert outcome(folder) == expected


@pytest.mark.parametrize(
    "signum",
    [
        pytest.param(signal.SIGINT, id="Ctrl-C", marks=pytest.mark.nightly),
        pytest.param(signal.SIGKILL, id="console killed"),
    ],
)
def test_no_process_outlives_the_console(tmp_path: Path, undisturbed: tuple[Path, Outcome], signum: int) -> None:
    shutil.copytree(undisturbed[0] / "source", tmp_path / "source")
    process = gpt2(*PRETRAIN, cwd=tmp_path)
    poll(lambda: MOMENTS["training"][0](tmp_path))
    members = set(family(process.pid)) - {process.pid}
    assert len(members) >= 4  # the server, torchrun and two ranks
    process.send_signal(signum)
    process.communicate()
    poll(lambda: not any(Path(f"/proc/{pid}").exists() for pid in members))


def test_the_console_ends_soon_after_its_server_and_the_next_command_continues(
    tmp_path: Path, undisturbed: tuple[Path, Outcome]
) -> None:
    calm, expected = undisturbed
    shutil.copytree(calm / "source", tmp_path / "source")
    process = gpt2(*PRETRAIN, "--set", "train.checkpoint_every_steps=1000", cwd=tmp_path)
    poll((tmp_path / "data/runs/tiny/progress.json").exists)
    members = set(family(process.pid)) - {process.pid}
    trainers = [pid for pid in members if "\0model\0" in Path(f"/proc/{pid}/cmdline").read_text()]
    [server] = set(children(process.pid)) - set(trainers)
    kill([server])
    output, _ = process.communicate()
    assert (process.returncode, "error: " in output, "Traceback" in output) == (1, True, False), output
    assert not any(Path(f"/proc/{pid}/cmdline").read_text() for pid in members if Path(f"/proc/{pid}").exists())
    assert checkpoints(open_store(str(tmp_path / "data")), "tiny")
    code, output = run_gpt2(*PRETRAIN, cwd=tmp_path)
    assert code == 0, output
    assert outcome(tmp_path) == expected
