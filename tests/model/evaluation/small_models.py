"""Small models for the tests of evaluations, and a rank whose other ranks are simulated."""

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
class SimulatedRank(DDPConfig):
    """A rank that records what it adds to a sum; the test supplies the sum over all ranks."""

    added: list[Tensor] = field(default_factory=list)
    total: list[Tensor] = field(default_factory=list)

    def sum(self, values: Tensor) -> Tensor:
        self.added.append(values.clone())
        return self.total[0] if self.total else torch.ones_like(values)


def small_model() -> GPT:
    torch.manual_seed(11)
    model = GPT(SHAPE)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return model


def unigram_model(probabilities: dict[int, float]) -> GPT:
    """A model whose token probabilities do not depend on the context."""
    model = GPT(SHAPE)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.transformer.ln_f.bias[0] = 1
        model.transformer.wte.weight[:, 0] = -50
        for token, probability in probabilities.items():
            model.transformer.wte.weight[token, 0] = math.log(probability)
    return model
