"""What is asked in the tests of evaluations: small models, and a rank among many that are not there."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.config import ModelConfig
from model.gpt import GPT
from model.processes.distributed import DDPConfig

SHAPE = ModelConfig(layers=1, heads=2, width=16, context_tokens=32)
CPU = torch.device("cpu")
ALONE = DDPConfig(0, 1, CPU)
T = 32


@dataclass(frozen=True)
class OneOfMany(DDPConfig):
    """A rank that keeps what it would add, and is told the sum of all by the test."""

    mine: list[Tensor] = field(default_factory=list)
    told: list[Tensor] = field(default_factory=list)

    def sum(self, values: Tensor) -> Tensor:
        self.mine.append(values.clone())
        return self.told[0] if self.told else torch.ones_like(values)


def small_model() -> GPT:
    torch.manual_seed(11)
    model = GPT(SHAPE)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return model


def unigram_model(chances: dict[int, float]) -> GPT:
    """A model that gives every token the same probability after any context."""
    model = GPT(SHAPE)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.transformer.ln_f.bias[0] = 1
        model.transformer.wte.weight[:, 0] = -50
        for token, chance in chances.items():
            model.transformer.wte.weight[token, 0] = math.log(chance)
    return model
