"""A mixed run pins every dataset. A run without a mix stores exactly what it stored before there were mixes."""

import json
from pathlib import Path

import pytest

from model.checkpoints.records import WEIGHTS, CheckpointFile, CheckpointRecord, Cursor, StepMetrics, put_checkpoint
from model.config import RunConfig
from model.runs.run import evaluation_jobs, find_mix, find_run, pin_run, pinned_run, training_job
from storage.errors import DatasetMismatch, ObjectMissing
from storage.keys import RunKeys
from storage.loading.mix import Share
from storage.stores.store import Store
from tests.conftest import BuildDataset
from tests.making import build_other, tiny_config
from tests.storage.sealing import IDENTITY, built, seal, source_file

MANIFEST = "a" * 64
MIX = 'train.mix=["small:8", "code:2"]'  # normalised
BEFORE_MIXES = ["train-969c8917", "val_loss-a1b7059b", "completion-0256280f", "samples-bfcc9b85"]


def record(cursor: Cursor | None = None) -> CheckpointRecord:
    model = tiny_config("./store", "*.parquet").model.model_dump()
    return CheckpointRecord(12, "train-x", model, {}, cursor, attempt="a", files={WEIGHTS: CheckpointFile(1, "b" * 64)})


def test_without_a_mix_recipes_and_stored_json_are_those_of_earlier_versions(store: Store) -> None:
    """The ids, keys and the digest are those of the last version without mixes."""
    config = tiny_config("./store", "*.parquet")
    run = pin_run(store, config, MANIFEST, None)
    jobs = [training_job(run), *evaluation_jobs(config, record(), MANIFEST, None)]
    assert [job.job_id for job in jobs] == BEFORE_MIXES
    default = RunConfig()
    assert training_job(pin_run(store, default, MANIFEST, None)).job_id == "train-00efcf0d"
    stored = json.loads(store.read(RunKeys("tiny").config).body)
    assert sorted(stored) == ["code_version", "commit", "config", "items", "manifest", "name", "start"]
    assert "mix" not in stored["config"]["train"]
    put_checkpoint(store, "tiny", {WEIGHTS: b"x"}, record(Cursor("small", MANIFEST, 1337, 32, 96)))
    digest = "79ffe12fca89e8237a20c5082c040477ca93ead66f6f9aa36bc4660a84267475"
    assert store.read(RunKeys("tiny").checkpoint_record(12)).sha256 == digest
    metrics = StepMetrics(step=0, loss=1.0, learning_rate=1.0, gradient_norm=1.0).model_dump()
    assert not {"epochs", "val_losses"} & metrics.keys()


def test_a_mixed_run_is_pinned_to_every_dataset(store: Store, config: RunConfig, build: BuildDataset) -> None:
    small, code = build(config), build_other(config.store_url, "code", range(100, 130))
    mixed = tiny_config(config.store_url, config.data.source, MIX)
    run = pin_run(store, mixed, small.digest, None)
    assert run.mix == {"code": Share(code.digest, 1), "small": Share(small.digest, 4)}
    newer = build_other(config.store_url, "code", range(130, 140))
    assert newer.parent == code.digest
    assert pin_run(store, mixed, small.digest, None) == pinned_run(store, mixed) == find_run(store, "tiny") == run
    assert find_mix(store, mixed)["code"] == Share(newer.digest, 1)  # what another run would be pinned to
    ids = {training_job(run).job_id}
    for number, other in enumerate(('train.mix=["small:8", "code:3"]', "train.mix=[]", MIX)):  # the last: newer code
        overrides = (other, f"name=other-{number}")
        ids.add(training_job(pin_run(store, tiny_config(config.store_url, "x", *overrides), small.digest, None)).job_id)
    assert len(ids) == 4
    for other in ("train.mix=[]", 'train.mix=["small:7", "code:2"]'):
        with pytest.raises(DatasetMismatch, match=r"train\.mix"):
            pinned_run(store, tiny_config(config.store_url, config.data.source, other))
    cursor = Cursor("small", small.digest, 1337, 32, 96, run.mix)
    recipe = evaluation_jobs(mixed, record(cursor), small.digest, None)[0].recipe
    assert recipe["mix"]["code"] == {"manifest": code.digest, "weight": 1}


def test_a_mix_without_the_runs_own_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.mix does not name(.|\n)*'small'"):
        tiny_config("./store", "*.parquet", 'train.mix=["web:0.5", "code:0.5"]')
    with pytest.raises(ValueError, match="'web:-1'"):
        tiny_config("./store", "*.parquet", 'train.mix=["small:1", "web:-1"]')


def test_an_unsealed_dataset_and_one_of_another_tokenizer_are_refused_and_named(store: Store, tmp_path: Path) -> None:
    config = tiny_config(store.url, "*.parquet", MIX)
    with pytest.raises(ObjectMissing, match=r"'code'(.|\n)*gpt2 dataset build --set data\.dataset=code"):
        find_mix(store, config)
    shards = built(store, source_file(tmp_path, 1), dataset="code")
    seal(store, "code", shards, tokenizer=IDENTITY | {"name": "llama", "sha256": "f" * 64})
    with pytest.raises(DatasetMismatch, match=r"'code' was made with another tokenizer, llama"):
        pin_run(store, config, MANIFEST, None)
    assert find_run(store, "tiny") is None
