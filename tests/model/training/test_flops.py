"""Model FLOPs and MFU: the published figures of GPT-2 124M."""

import pytest

from model.config import ModelConfig
from model.training.flops import PEAK_FLOPS, flops_per_token, peak_flops


def test_124m_takes_855_million_flops_a_token() -> None:
    assert flops_per_token(ModelConfig(), 1_024) == 855_166_464


@pytest.mark.parametrize(
    ("name", "gpus", "step_seconds", "published"),
    [("NVIDIA A100-SXM4-80GB", 8, 0.300, 0.599), ("NVIDIA H100 80GB HBM3", 8, 0.140, 0.405)],
)
def test_mfu_equals_that_of_llm_c_runs(name: str, gpus: int, step_seconds: float, published: float) -> None:
    peak = peak_flops(name)
    assert peak is not None
    speed = 524_288 / step_seconds
    assert speed * flops_per_token(ModelConfig(), 1_024) / (gpus * peak) == pytest.approx(published, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA L4", "L4"), ("NVIDIA L40S", "L40S"), ("NVIDIA A10G", "A10G"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA RTX A6000", "A6000"), ("NVIDIA H200", "H200"),
    ],
)  # fmt: skip
def test_the_longest_matching_name_counts(name: str, known: str) -> None:
    assert peak_flops(name) == PEAK_FLOPS[known]


@pytest.mark.parametrize("name", ["cpu", "mps", "Tesla T4", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A1000"])
def test_an_unknown_device_has_no_peak(name: str) -> None:
    assert peak_flops(name) is None
