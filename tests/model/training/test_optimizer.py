"""The learning rate of every step equals build-nanogpt's, and only matrices decay."""

import math

import pytest
import torch

from model.config import ModelConfig, TrainingConfig
from model.gpt import GPT
from model.training.optimizer import learning_rate, make_optimizer

DEFAULT = TrainingConfig()  # 6e-4 to 6e-5, warm-up 715, 19,073 steps
PUBLISHED = {
    0: 8.3916083916e-07,
    1: 1.6783216783e-06,
    357: 3.0041958042e-04,
    714: 6.0000000000e-04,
    715: 6.0000000000e-04,
    716: 5.9999999605e-04,
    1_000: 5.9967893984e-04,
    5_000: 5.3060375144e-04,
    9_894: 3.3000000000e-04,
    10_000: 3.2510254652e-04,
    15_000: 1.2297343086e-04,
    19_072: 6.0000003954e-05,
    19_073: 6.0000000000e-05,
    25_000: 6.0000000000e-05,
}


@pytest.mark.parametrize(("step", "rate"), PUBLISHED.items())
def test_rate_equals_the_published_one_to_all_digits(step: int, rate: float) -> None:
    assert learning_rate(step, DEFAULT) == pytest.approx(rate, rel=1e-10, abs=0)


def test_warm_up_is_linear() -> None:
    for step in range(715):
        assert learning_rate(step, DEFAULT) == pytest.approx(6e-4 * (step + 1) / 715, rel=1e-12, abs=0)


def test_after_the_warm_up_the_rate_is_a_cosine() -> None:
    for step in range(715, 19_073, 101):
        angle = math.pi * (step - 715) / (19_073 - 715)
        assert learning_rate(step, DEFAULT) == pytest.approx(6e-5 + 2.7e-4 * (1 + math.cos(angle)), rel=1e-12, abs=0)
    assert learning_rate(9_894, DEFAULT) == pytest.approx(3.3e-4, rel=1e-12, abs=0)


@pytest.mark.parametrize(("warmup_steps", "max_steps"), [(0, 5), (5, 5), (1, 1), (0, 1)])
def test_rate_stays_within_its_bounds_when_a_phase_is_empty(warmup_steps: int, max_steps: int) -> None:
    config = TrainingConfig(warmup_steps=warmup_steps, max_steps=max_steps)
    rates = [learning_rate(step, config) for step in range(max_steps + 3)]
    assert all(0 < rate <= config.learning_rate for rate in rates)
    assert max(rates) == config.learning_rate
    assert rates[-1] == config.min_learning_rate


def test_default_model_has_50_decayed_and_98_undecayed_tensors() -> None:
    with torch.device("meta"):
        model = GPT(ModelConfig())
    optimizer = make_optimizer(model, DEFAULT)
    sizes = {
        group["weight_decay"]: (len(group["params"]), sum(weight.numel() for weight in group["params"]))
        for group in optimizer.param_groups
    }
    assert sizes == {0.1: (50, 124_354_560), 0.0: (98, 121_344)}  # the embedding padded to 50,304 rows


def test_biases_and_norms_do_not_decay_and_everything_is_optimized_once() -> None:
    model = GPT(ModelConfig(layers=1, heads=2, width=16, context_tokens=8))
    optimizer = make_optimizer(model, TrainingConfig(weight_decay=0.3, betas=(0.8, 0.9)))
    decay = {weight: group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for name, weight in model.named_parameters():
        assert decay[weight] == (0.0 if name.endswith("bias") or ".ln_" in name else 0.3), name
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}
