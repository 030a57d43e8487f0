"""The model is GPT-2: sizes, names, causality, logits, loss and initial weights, against a plain forward pass."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import gpt
from model.config import ModelConfig, TrainingConfig
from model.config_file import load_config
from model.gpt import GPT, PADDED_VOCABULARY, unpadded
from model.tokenizer import VOCABULARY
from model.training.flops import parameter_count
from model.training.optimizer import make_optimizer

SMALL = ModelConfig(layers=3, heads=4, width=32, context_tokens=24)
BLOCK = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def small_model(config: ModelConfig = SMALL, dropout: float = 0.0) -> GPT:
    """A model whose weights are all far from their initial values, biases and norms included."""
    torch.manual_seed(7)
    model = GPT(config, dropout)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return model


def batch(rows: int = 2, tokens: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCABULARY, (rows, tokens + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def plain_logits(weights: dict[str, Tensor], config: ModelConfig, tokens_BT: Tensor) -> Tensor:
    """GPT-2 written out: one head at a time, explicit softmax, no code shared with the model."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return normed(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    T, D = tokens_BT.shape[1], config.width // config.heads
    x_BTC = weights["transformer.wte.weight"][tokens_BT] + weights["transformer.wpe.weight"][:T]
    future_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
    for layer in range(config.layers):
        block = f"transformer.h.{layer}"
        q_BTC, k_BTC, v_BTC = linear(norm(x_BTC, f"{block}.ln_1"), f"{block}.attn.c_attn").split(config.width, -1)
        heads = []
        for head in range(config.heads):
            mine = slice(head * D, (head + 1) * D)
            scores_BTT = q_BTC[..., mine] @ k_BTC[..., mine].transpose(1, 2) / math.sqrt(D)
            powers_BTT = scores_BTT.masked_fill(future_TT, -math.inf).exp()
            heads.append(powers_BTT / powers_BTT.sum(-1, keepdim=True) @ v_BTC[..., mine])
        x_BTC = x_BTC + linear(torch.cat(heads, -1), f"{block}.attn.c_proj")
        inner = tanh_gelu(linear(norm(x_BTC, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
        x_BTC = x_BTC + linear(inner, f"{block}.mlp.c_proj")
    return norm(x_BTC, "transformer.ln_f") @ weights["transformer.wte.weight"][:VOCABULARY].T


def default_on_meta() -> GPT:
    with torch.device("meta"):
        return GPT(ModelConfig())


@pytest.mark.parametrize(
    ("file", "parameters"),
    [
        ("gpt2-124m", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_presets_have_the_sizes_of_the_published_models(file: str, parameters: int) -> None:
    with torch.device("meta"):
        model = GPT(load_config(Path(file), []).model)
    assert sum(unpadded(name, weight).numel() for name, weight in model.named_parameters()) == parameters
    assert parameter_count(model.config) == parameters


def test_padding_rows_of_the_embedding_stay_zero() -> None:
    model = GPT(SMALL).train()
    padding = model.head_VC[VOCABULARY:]
    assert len(model.head_VC) == PADDED_VOCABULARY == 50_304
    optimizer = make_optimizer(model, TrainingConfig(weight_decay=0.5))
    for training in (True, False):
        model.train(training)(*batch()).backward()
        assert model.head_VC.grad is not None
        assert not model.head_VC.grad[VOCABULARY:].any()
        assert model.head_VC.grad[:VOCABULARY].any()
        optimizer.step()
        assert not padding.any()
    assert model.logits(model.transformer(batch()[0])).shape[-1] == VOCABULARY


def test_parameters_have_the_names_of_the_published_weights() -> None:
    blocks = {f"transformer.h.{n}.{part}.{kind}" for n in range(12) for part in BLOCK for kind in ("weight", "bias")}
    ends = {f"transformer.{name}" for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")}
    assert {name for name, _ in default_on_meta().named_parameters()} == blocks | ends


def test_no_position_depends_on_a_later_token() -> None:
    model = small_model()
    embedded: list[Tensor] = []
    model.transformer.wte.register_forward_hook(lambda _module, _tokens, output: embedded.append(output))
    tokens_BT, _ = batch(rows=1, tokens=10)
    logits_TV = model.logits(model.transformer(tokens_BT))[0]
    direction_V = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0))
    for position in range(10):
        (gradient_BTC,) = torch.autograd.grad(logits_TV[position] @ direction_V, embedded[0], retain_graph=True)
        reach_T = gradient_BTC[0].abs().sum(-1)
        assert (reach_T[: position + 1] > 0).all()
        assert (reach_T[position + 1 :] == 0).all()


@pytest.mark.parametrize("tokens", [1, 2, 24])
def test_logits_equal_those_of_a_plain_forward_pass(tokens: int) -> None:
    model = small_model()
    tokens_BT, _ = batch(rows=3, tokens=tokens)
    with torch.no_grad():
        expected = plain_logits(dict(model.named_parameters()), SMALL, tokens_BT)
        logits = model.logits(model.transformer(tokens_BT))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("chunk_rows", [1_024, 48, 7])
def test_loss_is_the_summed_cross_entropy_of_the_logits(
    training: bool, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpt, "chunk_rows", lambda _: chunk_rows)
    model = small_model().train(training)
    tokens_BT, targets_BT = batch()
    logits_BTV = model.logits(model.transformer(tokens_BT))
    expected = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")
    torch.testing.assert_close(model(tokens_BT, targets_BT), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("chunk_rows", [47, 16, 1])
def test_gradients_of_the_chunked_loss_equal_those_of_the_plain_loss(
    chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpt, "chunk_rows", lambda _: chunk_rows)
    model = small_model().train()
    tokens_BT, targets_BT = batch()
    logits_BTV = model.logits(model.transformer(tokens_BT))
    plain = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")
    weights = list(model.parameters())
    expected = torch.autograd.grad(plain / 48, weights)
    gradients = torch.autograd.grad(model(tokens_BT, targets_BT) / 48, weights)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_dropout_applies_in_training_only() -> None:
    model = small_model(dropout=0.5)
    tokens_BT, targets_BT = batch()
    with torch.no_grad():
        assert model.train()(tokens_BT, targets_BT) != model(tokens_BT, targets_BT)
        assert model.eval()(tokens_BT, targets_BT) == small_model().eval()(tokens_BT, targets_BT)


def test_initial_weights_have_the_standard_deviations_of_gpt2() -> None:
    torch.manual_seed(1)
    config = ModelConfig(layers=3, heads=2, width=128, context_tokens=256)
    for name, weight in GPT(config).named_parameters():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif ".ln_" in name:
            assert (weight == 1).all(), name
        else:
            spread = 0.02 / math.sqrt(2 * config.layers) if name.endswith("c_proj.weight") else 0.02
            assert weight.std().item() == pytest.approx(spread, rel=0.03), name
            assert abs(weight.mean().item()) < 0.03 * spread, name


def test_the_initial_loss_is_that_of_a_uniform_guess() -> None:
    torch.manual_seed(2)
    model = GPT(ModelConfig(layers=1, context_tokens=256)).eval()
    tokens_BT, targets_BT = batch(rows=4, tokens=256)
    with torch.no_grad():
        loss = model(tokens_BT, targets_BT).item() / targets_BT.numel()
    assert 10.85 <= loss <= 11.1  # ln 50,257 = 10.825, plus half the variance of the logits
