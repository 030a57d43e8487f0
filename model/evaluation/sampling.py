"""Samples: seeded text that a model writes after a prompt. Scores nothing.

Shapes: B texts that are written together, T time, C channels, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model import tokenizer
from model.gpt import GPT


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen, as `EvaluationConfig` describes it."""

    temperature: float
    top_k: int
    top_p: float


def sample_texts(
    model: GPT, prompt: str, sample_tokens: int, settings: SamplingSettings, seeds: Sequence[int]
) -> list[list[int]]:
    """The token ids that follow the prompt, one text for each seed, each up to its `<|endoftext|>`."""
    if not seeds:  # a rank without a sample
        return []
    columns = list(generate(model, prompt, sample_tokens, settings, seeds))
    texts = (list(ids) for ids in zip(*columns, strict=True)) if columns else ([] for _ in seeds)
    return [ids[: ids.index(tokenizer.EOT)] if tokenizer.EOT in ids else ids for ids in texts]


@torch.inference_mode()
def generate(
    model: GPT, prompt: str, sample_tokens: int, settings: SamplingSettings, seeds: Sequence[int]
) -> Iterator[tuple[int, ...]]:
    """Yields the next token id of every text, `sample_tokens` times or until all texts have ended.

    A text that has ended goes on as `<|endoftext|>`. A text depends on its seed only, not on its neighbours (but for
    the rounding of matrix products). An empty prompt starts a new document. When a text fills the model's context, the
    last half of it becomes the new context: positions are learnt, so keys and values have to be computed again, but
    only once in half a context. Raises ValueError for a prompt that is longer than the context.
    """
    model.eval()
    context_tokens, device = model.config.context_tokens, model.head_VC.device
    ids = prompt_ids(prompt, context_tokens)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    texts = [list(ids) for _ in seeds]
    past = model.no_past(len(seeds), min(len(ids) + sample_tokens, context_tokens))
    fed_BT = torch.tensor([ids], device=device)  # all texts begin alike, so one row will do
    ended = [False] * len(seeds)
    for _ in range(sample_tokens):
        x_BC = model.hidden(fed_BT, past=past)[:, -1]
        uniform_B = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
        drawn = next_tokens(model.logits(x_BC).float().expand(len(seeds), -1), settings, uniform_B).tolist()
        ended = [before or token == tokenizer.EOT for before, token in zip(ended, drawn, strict=True)]
        if all(ended):
            return
        yield tuple(tokenizer.EOT if over else token for over, token in zip(ended, drawn, strict=True))
        for text, token in zip(texts, drawn, strict=True):
            text.append(token)
        if past[0].length == context_tokens:
            past = model.no_past(len(seeds), context_tokens)
            fed_BT = torch.tensor([text[-max(context_tokens // 2, 1) :] for text in texts], device=device)
        else:
            fed_BT = torch.tensor(drawn, device=device)[:, None]


def prompt_ids(prompt: str, context_tokens: int) -> list[int]:
    """The prompt as the beginning of a document. Raises ValueError when it is longer than the model's context."""
    ids = [tokenizer.EOT, *tokenizer.encode(prompt).tolist()]
    if len(ids) > context_tokens:
        raise ValueError(
            f"the prompt {prompt!r:.40} has {len(ids) - 1:,} tokens, the model takes at most {context_tokens - 1:,} "
            f"tokens (model.context_tokens less one for <|endoftext|>). Shorten it."
        )
    return ids


def next_tokens(logits_BV: Tensor, settings: SamplingSettings, uniform_B: Tensor) -> Tensor:
    """One token id a row: the likeliest at temperature 0, else sampled with a number in [0, 1) from top k and top p."""
    if settings.temperature == 0:
        return logits_BV.argmax(-1).cpu()
    ids_BV: Tensor | None = None
    if settings.top_k and settings.top_k < logits_BV.shape[-1]:
        logits_BV, ids_BV = logits_BV.topk(settings.top_k)
    elif settings.top_p < 1:
        logits_BV, ids_BV = logits_BV.sort(descending=True)
    probabilities_BV = (logits_BV.cpu().double() / settings.temperature).softmax(-1)
    if settings.top_p < 1:
        before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
        probabilities_BV[before_BV >= settings.top_p] = 0  # the first token always stays
    cumulative_BV = probabilities_BV.cumsum(-1)
    drawn_B1 = torch.searchsorted(cumulative_BV, uniform_B[:, None] * cumulative_BV[:, -1:], right=True)
    return drawn_B1[:, 0] if ids_BV is None else ids_BV.cpu().gather(-1, drawn_B1)[:, 0]
