"""GPT-2 124M takes three steps: its loss starts at a uniform guess and falls, and every gradient is finite."""

from pathlib import Path

import pytest
import torch

from model.gpt import GPT
from model.processes.distributed import DDPConfig
from model.runs.run import pin_run, training_job
from model.training.flops import parameter_count
from model.training.trainer import Trainer, TrainingResult
from storage.stores.opening import open_store
from tests.making import build_dataset, document, tiny_config, write_parquet

TOKENS = 256  # a step; 4,096 were tested by hand


@pytest.mark.nightly
def test_124m_begins_between_10_85_and_11_10_and_its_loss_falls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "source.parquet", [document(number, 200) for number in range(60)])
    config = tiny_config(
        str(tmp_path / "store"), str(tmp_path / "source.parquet"), "model.layers=12", "model.heads=12",
        "model.width=768", "model.context_tokens=1024", "train.sequence_tokens=128", f"train.batch_tokens={TOKENS}",
        "train.micro_batch_sequences=2", "train.max_steps=3", "train.warmup_steps=0", "train.learning_rate=6e-4",
        "train.min_learning_rate=6e-5",
        "train.validate_every_steps=0", "train.checkpoint_every_steps=3", "data.shard_tokens=4000", "data.val_shards=1",
    )  # fmt: skip
    store, manifest = open_store(str(tmp_path / "store"), create=True), build_dataset(config)
    trainer = Trainer(
        store, training_job(pin_run(store, config, manifest.digest, None)), DDPConfig(0, 1, torch.device("cpu"))
    )
    losses: list[float] = []
    finite: list[int] = []
    step = Trainer._train_step

    def recording(self: Trainer) -> object:
        taken = step(self)
        losses.append(taken[0].loss)
        finite.append(sum(bool(weight.grad.isfinite().all()) for weight in self.model.parameters()))
        return taken

    monkeypatch.setattr(Trainer, "_train_step", recording)
    assert trainer.fit() == TrainingResult(3, 3 * TOKENS, trainer.ddp.environment)
    assert isinstance(trainer.model, GPT)
    assert parameter_count(trainer.model.config) == 124_439_808
    assert 10.85 <= losses[0] <= 11.10
    assert losses[2] < losses[1] < losses[0]
    assert finite == [148] * 3
