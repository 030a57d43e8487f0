"""AdamW with GPT-2's parameter groups, and the learning rate of each step: linear warm-up, then cosine decay."""

import math

import torch
from torch import nn

from model.config import TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the model's parameters: matrices and embeddings decay, biases and norms do not."""
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=1e-8, fused=True)


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The learning rate of a step, counted from 0."""
    if step < config.warmup_steps:  # as in build-nanogpt; nanoGPT divides by warm-up + 1
        return config.learning_rate * (step + 1) / config.warmup_steps
    if step >= config.max_steps:
        return config.min_learning_rate
    done = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    height = 0.5 * (1 + math.cos(math.pi * done))
    return config.min_learning_rate + height * (config.learning_rate - config.min_learning_rate)
