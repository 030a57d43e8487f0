"""The device of a process: what is asked for, else the best there is; what is not there is refused."""

import pytest
import torch

from model.processes.distributed import DDPConfig
from model.runs.job import read_job
from model.training.trainer import Trainer
from tests.model.training_runs import House

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> object:
    """A function that says how many GPUs there are, and whether there is MPS; `set_device` is noted."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)

    def have(gpus: int, mps: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return have


@pytest.mark.parametrize(
    ("gpus", "mps", "environment", "asked", "device"),
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
def test_the_device_is_the_one_asked_for_else_the_best(
    there: object, gpus: int, mps: bool, environment: dict[str, str], asked: str, device: str
) -> None:
    there(gpus, mps)  # type: ignore[operator]
    found = DDPConfig.detect(environment, asked)
    assert found.device == torch.device(device)
    assert (found.rank, found.ranks) == ((3, 4) if environment else (0, 1))


@pytest.mark.parametrize(
    ("gpus", "mps", "environment", "asked", "said"),
    [
        (0, False, {}, "cuda", ("resources.device = 'cuda'", "found cpu", "resources.device=auto")),
        (0, True, {}, "cuda", ("found mps, cpu",)),
        (0, False, {}, "mps", ("resources.device = 'mps'", "found cpu")),
        (0, True, TORCHRUN, "mps", ("training of one process", "found cpu")),
        (1, False, TORCHRUN, "auto", ("process 1 of this host", "found 1 GPUs", "resources.processes=1")),
    ],
)
def test_what_is_not_there_is_refused(
    there: object, gpus: int, mps: bool, environment: dict[str, str], asked: str, said: tuple[str, ...]
) -> None:
    there(gpus, mps)  # type: ignore[operator]
    with pytest.raises(ValueError, match="resources") as caught:
        DDPConfig.detect(environment, asked)
    for word in said:
        assert word in str(caught.value)


@pytest.mark.parametrize(("others", "agreed"), [(7, True), (8, False), (6, False)])
def test_ranks_agree_when_all_have_one_value(monkeypatch: pytest.MonkeyPatch, others: int, agreed: bool) -> None:
    def with_others(bounds: torch.Tensor, op: object) -> None:
        assert op == torch.distributed.ReduceOp.MAX
        bounds.copy_(torch.maximum(bounds, torch.tensor([others, -others])))

    monkeypatch.setattr(torch.distributed, "all_reduce", with_others)
    assert DDPConfig(0, 2, torch.device("cpu")).agree(7) is agreed
    assert DDPConfig(0, 1, torch.device("cpu")).agree(7)


def test_ranks_that_found_different_checkpoints_do_not_train(house: House) -> None:
    class Apart(DDPConfig):
        def agree(self, value: int) -> bool:
            assert value == 0
            return False

    key = house.ask("apart")
    with pytest.raises(ValueError, match="another process is still saving"):
        Trainer(house.store, read_job(house.store, key), Apart(0, 1, torch.device("cpu")))
