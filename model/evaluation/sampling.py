"""Samples: text that a model writes after a prompt, seeded. Scores nothing.

python -m model.evaluation.sampling <store url> <run> --prompt "…"      streams samples of the run's newest checkpoint
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model import tokenizer
from model.checkpoints.records import checkpoints
from model.checkpoints.weights import load_weights
from model.config import EvaluationConfig, ModelConfig
from model.gpt import GPT
from model.processes.distributed import DDPConfig
from storage.errors import ObjectMissing, StorageError
from storage.stores.opening import open_store
from storage.stores.store import Store


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is drawn: see `EvaluationConfig` for what the numbers mean."""

    temperature: float
    top_k: int
    top_p: float


def sample_texts(
    model: GPT, prompt: str, sample_tokens: int, drawing: SamplingSettings, seeds: Sequence[int]
) -> list[list[int]]:
    """What follows the prompt, one text a seed, all at once: the ids that `grow` gives, up to `<|endoftext|>`."""
    if not seeds:  # of more ranks than samples one has nothing to do
        return []
    columns = list(generate(model, prompt, sample_tokens, drawing, seeds))
    texts = (list(ids) for ids in zip(*columns, strict=True)) if columns else ([] for _ in seeds)
    return [ids[: ids.index(tokenizer.EOT)] if tokenizer.EOT in ids else ids for ids in texts]


@torch.inference_mode()
def generate(
    model: GPT, prompt: str, sample_tokens: int, drawing: SamplingSettings, seeds: Sequence[int]
) -> Iterator[tuple[int, ...]]:
    """The next id of each text, `sample_tokens` times or until all have ended; of one that has it is `<|endoftext|>`.

    A text is its seed's alone, whatever is written beside it (but for the rounding of matrix products). An empty prompt
    starts a new document. A text that fills the model's context goes on from the last half of it, since positions are
    learnt: keys and values are made anew once in so many tokens, not for each. Raises ValueError for a prompt that is
    longer than the context.
    """
    model.eval()
    context_tokens, device = model.config.context_tokens, model.head_VC.device
    ids = prompt_ids(prompt, context_tokens)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    texts = [list(ids) for _ in seeds]
    past = model.no_past(len(seeds), min(len(ids) + sample_tokens, context_tokens))
    fed_BT = torch.tensor([ids], device=device)  # all begin alike: one row will do
    ended = [False] * len(seeds)
    for _ in range(sample_tokens):
        x_BC = model.hidden(fed_BT, past=past)[:, -1]
        chances = torch.cat([torch.rand(1, generator=one, dtype=torch.float64) for one in generators])
        drawn = next_tokens(model.logits(x_BC).float().expand(len(seeds), -1), drawing, chances).tolist()
        ended = [one or token == tokenizer.EOT for one, token in zip(ended, drawn, strict=True)]
        if all(ended):
            return
        yield tuple(tokenizer.EOT if one else token for one, token in zip(ended, drawn, strict=True))
        for text, token in zip(texts, drawn, strict=True):
            text.append(token)
        if past[0].length == context_tokens:
            past = model.no_past(len(seeds), context_tokens)
            fed_BT = torch.tensor([text[-max(context_tokens // 2, 1) :] for text in texts], device=device)
        else:
            fed_BT = torch.tensor(drawn, device=device)[:, None]


def prompt_ids(prompt: str, context_tokens: int) -> list[int]:
    """What the model is fed first: a document's beginning. Raises ValueError when that is longer than its context."""
    ids = [tokenizer.EOT, *tokenizer.encode(prompt).tolist()]
    if len(ids) > context_tokens:
        raise ValueError(
            f"the prompt {prompt!r:.40}: at most {context_tokens - 1:,} tokens fit before the first new one "
            f"(model.context_tokens less one for <|endoftext|>), found {len(ids) - 1:,}. Shorten it."
        )
    return ids


def next_tokens(logits_BV: Tensor, drawing: SamplingSettings, chances_B: Tensor) -> Tensor:
    """One token id a row: the likeliest at temperature 0, else drawn from the top k and top p by a chance in [0, 1)."""
    if drawing.temperature == 0:
        return logits_BV.argmax(-1).cpu()
    if drawing.top_k and drawing.top_k < logits_BV.shape[-1]:
        logits_BV, ids_BV = logits_BV.topk(drawing.top_k)
    elif drawing.top_p < 1:
        logits_BV, ids_BV = logits_BV.sort(descending=True)
    else:
        ids_BV = None
    odds_BV = (logits_BV.cpu().double() / drawing.temperature).softmax(-1)
    if drawing.top_p < 1:
        odds_BV[odds_BV.cumsum(-1) - odds_BV >= drawing.top_p] = 0  # the first one always stays
    below_BV = odds_BV.cumsum(-1)
    places_B1 = torch.searchsorted(below_BV, chances_B[:, None] * below_BV[:, -1:], right=True)
    return places_B1[:, 0] if ids_BV is None else ids_BV.cpu().gather(-1, places_B1)[:, 0]


def newest_model(store: Store, run: str) -> tuple[GPT, int]:
    """The model of the run's newest checkpoint, and its step. Raises ObjectMissing when there is none."""
    kept = checkpoints(store, run)
    if not kept:
        raise ObjectMissing(f"run {run!r} has no checkpoint in {store.url!r}. Train it first: gpt2 pretrain")
    model = GPT(ModelConfig.model_validate(kept[-1].model))
    load_weights(store, run, kept[-1], model)
    return model, kept[-1].step


def main() -> int:
    """Stream samples to the terminal. Returns the exit code."""
    defaults = EvaluationConfig()
    parser = argparse.ArgumentParser(
        prog="python -m model.evaluation.sampling", description="Write text with a run's newest model."
    )
    parser.add_argument("store_url")
    parser.add_argument("run")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=defaults.sample_tokens)
    parser.add_argument("--temperature", type=float, default=defaults.temperature)
    parser.add_argument("--top-k", type=int, default=defaults.top_k)
    parser.add_argument("--top-p", type=float, default=defaults.top_p)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    try:
        EvaluationConfig(
            temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p, sample_tokens=asked.tokens
        )
        model, _ = newest_model(open_store(asked.store_url), asked.run)
        prompt_ids(asked.prompt, model.config.context_tokens)  # is refused before anything is shown
        model.to(DDPConfig.detect({}, asked.device).device)
    except (ValueError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    drawing = SamplingSettings(asked.temperature, asked.top_k, asked.top_p)
    for index in range(asked.samples):
        _show(asked.prompt, generate(model, asked.prompt, asked.tokens, drawing, [asked.seed + index]))
        sys.stdout.write("\n\n" if index + 1 < asked.samples else "\n")
    return 0


def _show(prompt: str, drawn: Iterator[tuple[int, ...]]) -> None:
    """The prompt and each token as it comes, once it completes a character."""
    sys.stdout.write(prompt)
    sys.stdout.flush()
    waiting: list[int] = []
    for ids in drawn:
        waiting += ids
        text = tokenizer.decode(waiting)
        if not text.endswith("\ufffd"):  # half a character: wait for its other tokens
            sys.stdout.write(text)
            sys.stdout.flush()
            waiting = []
    sys.stdout.write(tokenizer.decode(waiting))


if __name__ == "__main__":
    sys.exit(main())
