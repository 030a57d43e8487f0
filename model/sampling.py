"""Samples: text that a model writes after a prompt, seeded. Scores nothing.

python -m model.sampling <store url> <run> --prompt "…"      streams samples of the run's newest checkpoint
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model import tokenizer
from model.checkpoint import load_weights
from model.config import EvaluationConfig, ModelConfig
from model.gpt import GPT
from model.history import checkpoints
from storage.errors import ObjectMissing, StorageError
from storage.layout import open_store
from storage.store import Store


@dataclass(frozen=True)
class Drawing:
    """How the next token is drawn: see `EvaluationConfig` for what the numbers mean."""

    temperature: float
    top_k: int
    top_p: float


@torch.no_grad()
def sample(model: GPT, prompt: str, sample_tokens: int, drawing: Drawing, seed: int) -> Iterator[int]:
    """New token ids after the prompt, up to `sample_tokens` or `<|endoftext|>`. The same seed gives the same ids.

    A text that grows beyond the model's context goes on from its last `context_tokens` tokens. An empty prompt starts
    a new document.
    """
    model.eval()
    ids = [tokenizer.EOT, *tokenizer.encode(prompt).tolist()]
    generator = torch.Generator().manual_seed(seed)
    device = model.head_VC.device
    for _ in range(sample_tokens):
        tokens_BT = torch.tensor([ids[-model.config.context_tokens :]], device=device)
        logits_V = model.logits(model.hidden(tokens_BT)[0, -1]).float().cpu()
        drawn = draw(logits_V, drawing, generator)
        if drawn == tokenizer.EOT:
            return
        ids.append(drawn)
        yield drawn


def draw(logits_V: Tensor, drawing: Drawing, generator: torch.Generator) -> int:
    """One token id: the likeliest at temperature 0, else drawn from the top k and top p."""
    if drawing.temperature == 0:
        return int(logits_V.argmax())
    sorted_V, ids_V = (logits_V / drawing.temperature).sort(descending=True, stable=True)
    chances_V = sorted_V.softmax(0)
    if drawing.top_k:
        chances_V[drawing.top_k :] = 0
    chances_V[chances_V.cumsum(0) - chances_V >= drawing.top_p * chances_V.sum()] = 0  # the first one always stays
    return int(ids_V[torch.multinomial(chances_V, 1, generator=generator)])


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
        prog="python -m model.sampling", description="Write text with a run's newest model."
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
    asked = parser.parse_args()
    try:
        EvaluationConfig(
            temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p, sample_tokens=asked.tokens
        )
        model, _ = newest_model(open_store(asked.store_url), asked.run)
    except (ValueError, StorageError) as error:
        print(error, file=sys.stderr)
        return 2
    drawing = Drawing(asked.temperature, asked.top_k, asked.top_p)
    for index in range(asked.samples):
        sys.stdout.write(asked.prompt)
        ids: list[int] = []
        shown = ""
        for drawn in sample(model, asked.prompt, asked.tokens, drawing, asked.seed + index):
            ids.append(drawn)
            text = tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # half a character: wait for its other tokens
                sys.stdout.write(text[len(shown) :])
                sys.stdout.flush()
                shown = text
        sys.stdout.write("\n\n" if index + 1 < asked.samples else "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
