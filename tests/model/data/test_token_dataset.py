"""A dataset for other trainers: this project's batches in torch's own DataLoader, with workers, ranks and resumes."""

import pickle
import re
import shutil
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import data
from torch.utils.data import DistributedSampler

from model.__main__ import run_job
from model.checkpoints.records import read_metrics
from model.config import RunConfig
from model.data.loader import DataLoader, TokenStream
from model.gpt import GPT
from model.runs.job import put_job
from model.runs.run import pin_run, training_job
from model.training.optimizer import learning_rate, make_optimizer
from storage.datasets.manifest import Manifest
from storage.errors import ObjectMissing, ShardCorrupt
from storage.keys import DatasetKeys
from storage.loading.token_dataset import TokenDataset
from storage.loading.windows import Windows
from storage.sources import reading
from storage.stores.opening import open_store
from tests.damage import flip_bit
from tests.making import build_other, tiny_config

T, B, STEPS = 32, 2, 10
Batch = tuple[Tensor, Tensor]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # on 2 cores


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Manifest]:
    """A dataset in the store ./data of a folder."""
    folder = tmp_path_factory.mktemp("tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "REMEMBERED", folder / "digests")
        manifest = build_other(str(folder / "data"), "tokens", range(60))
    ours = ("data.dataset=tokens", f"train.batch_tokens={2 * B * T}", f"train.max_steps={STEPS}")
    return tiny_config(str(folder / "data"), str(folder / "source-tokens"), "name=like-others", *ours), manifest


@pytest.fixture
def dataset(built: tuple[RunConfig, Manifest]) -> TokenDataset:
    """Two passes over the train split."""
    return TokenDataset(built[0].store_url, "tokens", sequence_tokens=T, epochs=2)


@pytest.fixture
def expected(built: tuple[RunConfig, Manifest]) -> Callable[..., list[Batch]]:
    """A function that gives the first batches of the trainer's own loader."""
    config, manifest = built
    windows = Windows(open_store(config.store_url), "tokens", manifest, "train", sequence_tokens=T, seed=1337)

    def batches(count: int, rank: int = 0, ranks: int = 1) -> list[Batch]:
        share = {"batch_windows": B * ranks, "size": B, "rank": rank, "ranks": ranks, "ahead": 0}
        loader = DataLoader(windows, torch.device("cpu"), step=0, **share)
        return [loader.next() for _ in range(count)]

    return batches


def are_equal(read: list[Batch], expected: list[Batch]) -> bool:
    """Whether all tensors are equal, and int64 as cross-entropy requires."""
    tensors = zip(chain.from_iterable(read), chain.from_iterable(expected), strict=True)
    return all(ours.dtype == torch.int64 and torch.equal(ours, theirs) for ours, theirs in tensors)


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_a_map_style_loader_gives_the_trainers_batches(
    dataset: TokenDataset, expected: Callable[..., list[Batch]], workers: int
) -> None:
    read = [tuple(batch) for batch in data.DataLoader(dataset, batch_size=B, num_workers=workers)]
    assert len(read) * B == len(dataset) > 100  # 50 batches, and the next epoch in another order
    assert are_equal(read, expected(len(read)))


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_a_stream_resumes_in_the_middle_of_an_epoch(
    dataset: TokenDataset, expected: Callable[..., list[Batch]], workers: int
) -> None:
    def batches(state: dict[str, int], count: int) -> tuple[list[Batch], dict[str, int]]:
        stream = TokenStream(dataset, B)
        stream.load_state_dict(state)
        return list(islice(data.DataLoader(stream, batch_size=None, num_workers=workers), count)), stream.state_dict()

    first, state = batches({"batch": 0}, 17)
    assert state == {"batch": 0 if workers else 17}  # with workers, only the loop knows how many it has taken
    rest, _ = batches({"batch": 17}, 60)
    assert are_equal(first + rest, expected(77))


def test_a_worker_that_is_given_its_own_state_goes_on_with_its_own_batches(
    dataset: TokenDataset, expected: Callable[..., list[Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a loader does that saves the state of each worker."""
    worker = type("Worker", (), {"id": 1, "num_workers": 3})
    monkeypatch.setattr("model.data.loader.get_worker_info", lambda: worker)
    before, after = TokenStream(dataset, B), TokenStream(dataset, B)
    read = list(islice(before, 4))
    after.load_state_dict(before.state_dict())
    assert are_equal(read + list(islice(after, 3)), expected(22)[1::3][:7])


def test_each_rank_gets_its_share(dataset: TokenDataset, expected: Callable[..., list[Batch]]) -> None:
    for rank in range(2):
        assert are_equal(list(islice(TokenStream(dataset, B, rank, 2), 30)), expected(30, rank, 2))
        sampler = DistributedSampler(dataset, 2, rank, shuffle=False)  # type: ignore[arg-type, var-annotated]  # any sized dataset
        read = torch.cat([inputs for inputs, _ in data.DataLoader(dataset, batch_size=B, sampler=sampler)])
        whole = torch.cat([inputs for inputs, _ in expected(len(dataset) // B)])
        assert torch.equal(read[: len(dataset) // 2], whole[rank::2])


def test_a_pickled_dataset_is_the_same_version(dataset: TokenDataset, built: tuple[RunConfig, Manifest]) -> None:
    """As a spawned worker receives it. `latest` may have moved meanwhile."""
    body = pickle.dumps(dataset)
    assert built[1].digest.encode() in body
    copied = pickle.loads(body)  # noqa: S301  # made two lines above
    assert len(copied) == len(dataset)
    assert all(np.array_equal(copied[index], dataset[index]) for index in (0, 70, -1))


@pytest.mark.parametrize("style", ["plain", "nanogpt"])
def test_another_loop_trains_with_the_trainers_losses(
    built: tuple[RunConfig, Manifest], dataset: TokenDataset, style: str
) -> None:
    config, manifest = built
    store = open_store(config.store_url)
    assert run_job(store.url, put_job(store, training_job(pin_run(store, config, manifest.digest, None)))) == 0
    trained = [line.loss for line in read_metrics(store, config.name)]
    torch.manual_seed(config.train.seed)
    model = GPT(config.model).train()
    optimizer = make_optimizer(model, config.train)
    batches = iter(data.DataLoader(dataset, batch_size=B))
    stream = iter(TokenStream(dataset, B))

    def get_batch() -> Batch:
        x, y = next(stream) if style == "nanogpt" else next(batches)
        return x, y

    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.train)
        losses.append(0.0)
        for _ in range(2):  # micro-batches of a step
            x, y = get_batch()
            loss = model(x, y) / config.train.batch_tokens
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert losses == pytest.approx(trained, rel=1e-5)


def test_the_readmes_example_works(built: tuple[RunConfig, Manifest], expected: Callable[..., list[Batch]]) -> None:
    [example] = re.findall(r"^```python\n(.*?)^```", Path("storage/README.md").read_text(), re.MULTILINE | re.DOTALL)
    small = {"fineweb-edu-10b": "tokens", "1_024": str(T), "batch_size=8": f"batch_size={B}"}
    for written, here in (small | {"./data": built[0].store_url}).items():
        assert written in example
        example = example.replace(written, here)
    read: list[Batch] = []
    exec(example, {"model": lambda *batch: read.append(batch)})  # noqa: S102  # the README's own example
    assert len(read) > 20
    assert are_equal(read[:20], expected(20))


@pytest.mark.parametrize("wrong", [{"split": "test"}, {"sequence_tokens": 0}, {"sequence_tokens": -3}, {"epochs": 0}])
def test_wrong_arguments_are_refused(built: tuple[RunConfig, Manifest], wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        TokenDataset(built[0].store_url, "tokens", **{"sequence_tokens": T} | wrong)


def test_a_damaged_shard_and_an_unknown_dataset_are_refused(built: tuple[RunConfig, Manifest], tmp_path: Path) -> None:
    config, manifest = built
    with pytest.raises(ObjectMissing, match="'none'"):
        TokenDataset(config.store_url, "none")
    copied = shutil.copytree(config.store_url, tmp_path / "copied")
    for row in manifest.rows("train"):
        flip_bit(open_store(str(copied)), DatasetKeys("tokens").shard(row.shard_id))
    with pytest.raises(ShardCorrupt, match=r"sha256|digest"):
        TokenDataset(str(copied), "tokens", sequence_tokens=T)[0]
