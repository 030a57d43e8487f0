"""The model equals GPT-2 in Hugging Face's transformers: logits, loss, gradients and ten optimizer steps."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from model.config import ModelConfig, TrainingConfig
from model.config_file import load_config
from model.gpt import GPT, unpadded
from model.tokenizer import VOCABULARY
from model.training.optimizer import make_optimizer

PRESETS = [  # the shape, and the attention implementation of transformers to compare with
    ("gpt2-124m", 12, 768, "eager"),
    ("gpt2-medium", 16, 1_024, "sdpa"),
    ("gpt2-large", 20, 1_280, "eager"),
    pytest.param("gpt2-xl", 25, 1_600, "sdpa", marks=pytest.mark.nightly),
]


def theirs_of(ours: GPT) -> GPT2LMHeadModel:
    """transformers' model with the same weights; its linear layers are transposed."""
    shape = ours.config
    config = GPT2Config(
        n_layer=shape.layers, n_head=shape.heads, n_embd=shape.width, n_positions=shape.context_tokens,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    with no_init_weights():  # saves 3 s for the largest model: the weights are replaced
        theirs = GPT2LMHeadModel(config)
    theirs.tie_weights()
    with torch.no_grad():
        for weight, part in pairs(ours, theirs).values():
            part.copy_(weight)
    return theirs


def pairs(ours: GPT, theirs: GPT2LMHeadModel, *, gradients: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
    """Every parameter (or gradient) of both models by name, as views of the same shape."""
    transposed = {f"{name}.weight" for name, module in theirs.named_modules() if isinstance(module, Conv1D)}
    own = dict(ours.named_parameters())
    tensors = {}
    assert own.keys() == dict(theirs.named_parameters()).keys()
    for name, weight in theirs.named_parameters():
        mine, other = (own[name].grad, weight.grad) if gradients else (own[name], weight)
        assert mine is not None and other is not None, name
        tensors[name] = unpadded(name, mine), other.T if name in transposed else other
    return tensors


def random_model(shape: ModelConfig, spread: float) -> GPT:
    """A model in which no weight is at its initial value, biases and norms included."""
    torch.manual_seed(11)
    model = GPT(shape)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            part = unpadded(name, weight)
            part.add_(torch.randn_like(part) * spread)
    return model


def batch(rows: int, tokens: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(5))


def mean_loss(model: GPT, ids_BT: Tensor) -> Tensor:
    loss: Tensor = model(ids_BT[:, :-1], ids_BT[:, 1:]) / ids_BT[:, 1:].numel()
    return loss


@pytest.mark.parametrize(("preset", "heads", "width", "attention"), PRESETS)
def test_logits_loss_and_gradients_equal_those_of_transformers(
    preset: str, heads: int, width: int, attention: str
) -> None:
    shape = load_config(Path(preset), []).model
    assert (shape.heads, shape.width) == (heads, width)
    ours = random_model(shape.model_copy(update={"layers": 2, "context_tokens": 20}), 0.04).train()
    theirs = theirs_of(ours).train()
    theirs.set_attn_implementation(attention)
    ids_BT = batch(2, 20)
    answer = theirs(input_ids=ids_BT, labels=ids_BT)  # transformers shifts the labels
    logits_BTV = ours.logits(ours.transformer(ids_BT))
    assert logits_BTV.std() > 1  # far from a fresh model's
    torch.testing.assert_close(logits_BTV, answer.logits, rtol=0, atol=1e-4)
    loss = mean_loss(ours, ids_BT)
    torch.testing.assert_close(loss, answer.loss, rtol=0, atol=1e-4)
    loss.backward()
    answer.loss.backward()
    for name, (mine, other) in pairs(ours, theirs, gradients=True).items():
        apart = mine - other
        assert apart.abs().max() <= 1e-4, name
        assert apart.norm() <= 1e-4 * other.norm(), name


def test_ten_optimizer_steps_equal_those_of_adamw_on_transformers() -> None:
    shape = ModelConfig(layers=4, heads=4, width=64, context_tokens=64)
    settings = TrainingConfig(learning_rate=3e-3, weight_decay=0.5, betas=(0.9, 0.95), clip=1.0)
    ours = random_model(shape, 0.02).train()
    theirs = theirs_of(ours).train()
    decayed = [weight for name, weight in theirs.named_parameters() if name.endswith("weight") and ".ln_" not in name]
    others = [weight for name, weight in theirs.named_parameters() if name.endswith("bias") or ".ln_" in name]
    groups = [{"params": decayed, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}]
    plain = AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, fused=False, foreach=False)
    optimizer = make_optimizer(ours, settings)
    ids_BT = batch(4, 64) % 500  # few distinct tokens, so that the model can learn
    losses: list[tuple[float, float]] = []
    norms = []
    for _ in range(10):
        optimizer.zero_grad()
        plain.zero_grad()
        loss, answer = mean_loss(ours, ids_BT), theirs(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        answer.backward()
        losses.append((loss.item(), answer.item()))
        norms.append(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0).item())
        torch.nn.utils.clip_grad_norm_(ours.parameters(), settings.clip)
        optimizer.step()
        plain.step()
    assert [ours for ours, _ in losses] == pytest.approx([theirs for _, theirs in losses], rel=0, abs=1e-4)
    assert losses[-1][0] < losses[0][0] - 1
    assert max(norms) > 1  # some gradient was clipped
