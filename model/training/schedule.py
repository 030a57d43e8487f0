"""The learning-rate schedule: linear warm-up, then cosine decay."""

import math

from model.config import TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The learning rate of a step, counted from 0.

    The first step has `learning_rate / warmup_steps`, as in build-nanogpt (nanoGPT divides by warm-up + 1).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if step >= config.max_steps:
        return config.min_learning_rate
    done = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    height = 0.5 * (1 + math.cos(math.pi * done))
    return config.min_learning_rate + height * (config.learning_rate - config.min_learning_rate)
