"""Tokens a second that are written after a prompt, fp32 on the processor: ours beside transformers. Prints one table.

    python tests/benchmarks/evaluation/bench_generate.py [--tokens 200] [--rounds 5] [--sizes small,124M] [--texts 1,8]

Both have the same seeded weights, a key-value cache, temperature 0.9 and top k 50, and take turns in one process; every
text is written to its full length. At temperature 0 both must write the same ids.
"""

import argparse
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

from model import tokenizer
from model.checkpoints.huggingface import CONV1D
from model.config import EvaluationConfig, ModelConfig
from model.evaluation.generate import sample_texts
from model.gpt import GPT

PROMPT = "The history of the English language, as far as it is known, begins with"
TARGET = 1.5
SIZES = {"small": ModelConfig(layers=4, heads=4, width=256), "124M": ModelConfig()}


def pair(config: ModelConfig) -> tuple[GPT, GPT2LMHeadModel]:
    """The same weights on both sides; <|endoftext|> is never drawn."""
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        GPT2Config(n_layer=config.layers, n_head=config.heads, n_embd=config.width, n_positions=config.context_tokens)
    ).eval()
    ours = GPT(config).eval()
    with torch.no_grad():
        weights = {name: weight for name, weight in theirs.named_parameters() if name != "lm_head.weight"}
        weights["transformer.wte.weight"] += 0.1  # with the bias below its logit is far below all others
        weights["transformer.wte.weight"][tokenizer.EOT] = -1
        weights["transformer.ln_f.bias"] += 0.1
        for name, weight in ours.named_parameters():
            theirs_of_it = weights[name].T if name.endswith(CONV1D) else weights[name]
            weight[: len(theirs_of_it)] = theirs_of_it
    return ours, theirs


def peer(model: GPT2LMHeadModel, texts: int, tokens: int, *, draw: bool) -> list[list[int]]:
    prompt = torch.tensor([[tokenizer.EOT, *tokenizer.encode(PROMPT).tolist()]])
    how = {"do_sample": True, "temperature": 0.9, "top_k": 50} if draw else {"do_sample": False}
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = model.generate(
            prompt.expand(texts, -1), attention_mask=torch.ones(texts, prompt.shape[1]), max_new_tokens=tokens,
            min_new_tokens=tokens, pad_token_id=tokenizer.EOT, use_cache=True, **how,
        )  # fmt: skip
    return ids[:, prompt.shape[1] :].tolist()


def seconds(write: Callable[[], list[list[int]]], texts: int, tokens: int) -> float:
    began = time.perf_counter()
    written = write()
    took = time.perf_counter() - began
    assert [len(ids) for ids in written] == [tokens] * texts
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", default="small,124M")
    parser.add_argument("--texts", default="1,8")
    asked = parser.parse_args()
    drawing = EvaluationConfig(sample_tokens=asked.tokens, temperature=0.9, top_k=50, top_p=1.0)
    likeliest = drawing.model_copy(update={"temperature": 0.0, "top_k": 0})
    print(f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {asked.rounds} rounds, {asked.tokens} tokens a text, "
          f"Python {platform.python_version()}, torch {torch.__version__}, "
          f"transformers {transformers.__version__}\n")  # fmt: skip
    print("| size | texts at once | ours, tokens/s | transformers, tokens/s | ratio (median of rounds) | rounds "
          "| same ids at temperature 0 |\n| --- | ---: | ---: | ---: | ---: | --- | --- |", flush=True)  # fmt: skip
    for size in asked.sizes.split(","):
        ours, theirs = pair(SIZES[size])
        greedy = sample_texts(ours, PROMPT, likeliest, [0])
        same = greedy == peer(theirs, 1, asked.tokens, draw=False)
        for texts in map(int, asked.texts.split(",")):
            both: list[tuple[float, float]] = []
            for number in range(asked.rounds + 1):  # the first one warms up
                seeds = range(texts * number, texts * (number + 1))
                mine = seconds(lambda: sample_texts(ours, PROMPT, drawing, seeds), texts, asked.tokens)  # noqa: B023
                both.append((mine, seconds(lambda: peer(theirs, texts, asked.tokens, draw=True), texts, asked.tokens)))  # noqa: B023
            ratios = [theirs_took / took for took, theirs_took in both[1:]]
            rates = [texts * asked.tokens / median(one[who] for one in both[1:]) for who in (0, 1)]
            reached = "yes" if median(ratios) >= TARGET else "**no**"
            cells = [
                size,
                str(texts),
                *(f"{rate:.1f}" for rate in rates),
                f"{median(ratios):.2f} ({reached}, ≥ {TARGET})",
            ]
            cells += [", ".join(f"{one:.2f}" for one in ratios), "yes" if same else "**no**"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
