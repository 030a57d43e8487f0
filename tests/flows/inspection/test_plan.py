"""What a run will take, before it starts."""

from pathlib import Path

import pytest

from flows.console import planning
from flows.inspection import plan as module
from flows.inspection.plan import plan
from model.config import RunConfig
from model.config_file import load_config
from model.runs.job import put_job
from model.runs.run import pin_run, training_job
from storage.stores.opening import open_store
from tests.flows.in_process import Gpt2
from tests.making import build_dataset, document, tiny_config, write_parquet

GPT2 = load_config(Path("gpt2-124m"), ["resources.price_per_gpu_hour=2.5"])


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gpu_names", lambda: ["NVIDIA H100 80GB HBM3"])


@pytest.mark.usefixtures("h100")
def test_the_default_run_takes_what_it_took_on_an_h100() -> None:
    """One H100 trained 476,000 tokens/s with 32 x 1,024, so 6 hours, and used 15.6 GiB; 8 x 512 used 3.8 GiB."""
    longer = load_config(Path("gpt2-124m"), ["train.sequence_tokens=1024", "train.micro_batch_sequences=32"])
    planned = plan(longer)
    assert planned.tokens == 19_073 * 524_288
    assert planned.tokens_per_second == pytest.approx(476_005, rel=0.1)
    assert planned.hours == pytest.approx(5.84, rel=0.1)
    assert planned.gpu_memory_bytes == pytest.approx(15.6 * 2**30, rel=0.05)
    smaller = plan(load_config(Path("gpt2-124m"), ["train.micro_batch_sequences=8"]))
    assert smaller.gpu_memory_bytes == pytest.approx(3.8 * 2**30, rel=0.1)


@pytest.mark.usefixtures("h100")
def test_eight_gpus_take_an_eighth_of_the_time_for_the_same_price() -> None:
    one = plan(GPT2)
    many = GPT2.model_copy(update={"resources": GPT2.resources.model_copy(update={"processes": 8})})
    eight = plan(many)
    assert one.hours is not None
    assert eight.hours == pytest.approx(one.hours / 8)
    assert eight.price == pytest.approx(one.price)
    assert one.price == pytest.approx(one.hours * 2.5)


def test_an_unknown_speed_is_said_and_a_measured_speed_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gpu_names", list)
    unknown = plan(GPT2)
    assert (unknown.tokens_per_second, unknown.hours, unknown.price) == (None, None, None)
    assert "gpt2 plan --measure" in unknown.lines()["speed"]
    assert unknown.lines()["time"] == "unknown"
    measured = plan(GPT2, lambda _config, _gpus: 1e6)
    validated = 76 * 10_485_760 / 3
    assert measured.hours == pytest.approx((19_073 * 524_288 + validated) / 1e6 / 3600)


def test_a_sealed_dataset_and_an_earlier_run_make_the_plan_exact(tmp_path: Path) -> None:
    write_parquet(tmp_path / "source" / "a.parquet", [document(number, 90) for number in range(60)])
    config = tiny_config(str(tmp_path / "store"), str(tmp_path / "source"))
    before = plan(config)
    assert before.source_bytes == (tmp_path / "source" / "a.parquet").stat().st_size
    manifest, store = build_dataset(config), open_store(config.store_url)
    planned = plan(config)
    assert planned.epochs == config.train.max_steps * config.train.batch_tokens / manifest.totals["train"]["tokens"]
    mixed = config.model_copy(update={"train": config.train.model_copy(update={"mix": ("small:1", "other:3")})})
    assert plan(mixed).epochs == planned.epochs / 4
    assert plan(mixed, lambda *_: 1.0).hours > plan(config, lambda *_: 1.0).hours  # two val sets
    assert (planned.source_bytes, planned.shard_bytes) == (before.source_bytes, 2 * manifest.tokens)
    assert planned.tokens_per_second is None
    from model.__main__ import run_job  # torch

    put = put_job(store, training_job(pin_run(store, config, manifest.digest, None)))
    assert run_job(config.store_url, put) == 0
    other = plan(config.model_copy(update={"name": "other"}))
    assert other.tokens_per_second
    assert other.basis == "as run tiny trained"
    two = config.resources.model_copy(update={"processes": 2})
    assert plan(config.model_copy(update={"name": "two", "resources": two})).tokens_per_second is None
    narrower = config.model_copy(update={"model": config.model.model_copy(update={"width": 64}), "name": "narrower"})
    assert plan(narrower).tokens_per_second is None


@pytest.mark.full
def test_a_measurement_trains_a_few_steps_and_leaves_nothing(tmp_path: Path, gpt2: Gpt2) -> None:
    config = tiny_config(str(tmp_path / "store"), "missing")
    speed = planning.tokens_per_second(config, 1)
    assert speed > 100
    assert list(tmp_path.iterdir()) == []


def test_the_verb_prints_lines_or_json(gpt2: Gpt2, tmp_path: Path) -> None:
    outcome = gpt2("plan", "--config", "demo", cwd=tmp_path)
    assert "650 steps, 332,800 tokens" in outcome.out
    [values] = gpt2("plan", "--config", "gpt2-124m", "--json", cwd=tmp_path).json_lines
    assert RunConfig().train.max_steps == values["steps"] == 19_073
