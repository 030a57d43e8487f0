"""A process's device: the configured one or the best available; an unavailable device is refused."""

from collections.abc import Callable

import pytest
import torch

from model.processes.distributed import DDPConfig
from model.runs.job import read_job
from model.training.trainer import Trainer
from tests.model.training_runs import StoredDataset

SetHardware = Callable[[int, bool], None]
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}


@pytest.fixture
def set_hardware(monkeypatch: pytest.MonkeyPatch) -> SetHardware:
    """A function that sets how many GPUs torch finds, and whether it finds MPS."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)

    def set_hardware(gpus: int, mps: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return set_hardware


@pytest.mark.parametrize(
    ("gpus", "mps", "environment", "setting", "device"),
    [
        (0, False, {}, "auto", "cpu"),
        (0, True, {}, "auto", "mps"),
        (0, True, TORCHRUN, "auto", "cpu"),  # MPS has no collectives
        (2, True, {}, "auto", "cuda:0"),
        (2, False, TORCHRUN, "auto", "cuda:1"),
        (2, False, TORCHRUN, "cpu", "cpu"),
        (0, True, {}, "cpu", "cpu"),
        (0, True, {}, "mps", "mps"),
        (1, False, {}, "cuda", "cuda:0"),
    ],
)
def test_the_device_is_the_configured_one_or_the_best(
    set_hardware: SetHardware, gpus: int, mps: bool, environment: dict[str, str], setting: str, device: str
) -> None:
    set_hardware(gpus, mps)
    ddp = DDPConfig.detect(environment, setting)
    assert ddp.device == torch.device(device)
    assert (ddp.rank, ddp.ranks) == ((3, 4) if environment else (0, 1))


@pytest.mark.parametrize(
    ("gpus", "mps", "environment", "setting", "facts"),
    [
        (0, False, {}, "cuda", ("resources.device = 'cuda'", "only cpu.", "resources.device=auto")),
        (0, True, {}, "cuda", ("only mps, cpu.",)),
        (0, False, {}, "mps", ("resources.device = 'mps'", "only cpu.")),
        (0, True, TORCHRUN, "mps", ("single process", "only cpu.")),
        (1, False, TORCHRUN, "auto", ("process 1 of this host", "the host has 1", "resources.processes=1")),
    ],
)
def test_an_unavailable_device_is_refused(
    set_hardware: SetHardware, gpus: int, mps: bool, environment: dict[str, str], setting: str, facts: tuple[str, ...]
) -> None:
    set_hardware(gpus, mps)
    with pytest.raises(ValueError, match="resources") as caught:
        DDPConfig.detect(environment, setting)
    for fact in facts:
        assert fact in str(caught.value)


@pytest.mark.parametrize(("others", "agreed"), [(7, True), (8, False), (6, False)])
def test_ranks_agree_when_all_have_the_same_value(monkeypatch: pytest.MonkeyPatch, others: int, agreed: bool) -> None:
    def with_others(bounds: torch.Tensor, op: object) -> None:
        assert op == torch.distributed.ReduceOp.MAX
        bounds.copy_(torch.maximum(bounds, torch.tensor([others, -others])))

    monkeypatch.setattr(torch.distributed, "all_reduce", with_others)
    assert DDPConfig(0, 2, torch.device("cpu")).agree(7) is agreed
    assert DDPConfig(0, 1, torch.device("cpu")).agree(7)


def test_ranks_that_resume_different_checkpoints_do_not_train(dataset: StoredDataset) -> None:
    class Disagreeing(DDPConfig):
        def agree(self, value: int) -> bool:
            assert value == 0
            return False

    key = dataset.put_job("apart")
    with pytest.raises(ValueError, match="another process is still saving"):
        Trainer(dataset.store, read_job(dataset.store, key), Disagreeing(0, 1, torch.device("cpu")))
