"""Generates text: seeded samples after a prompt. python -m model.evaluation.generate STORE RUN --prompt "…" prints it.

Shapes: B texts that are generated together, T time, C channels, V vocabulary.
"""

import argparse
import codecs
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model import tokenizer
from model.checkpoints.records import chosen
from model.checkpoints.weights import load_model
from model.config import EvaluationConfig
from model.config_file import config_of
from model.gpt import GPT
from model.processes.distributed import DDPConfig
from model.processes.output import discard_output, fail
from model.runs.job import USER_ERROR
from storage.errors import StorageError, printable
from storage.stores.opening import open_store


def sample_texts(model: GPT, prompt: str, settings: EvaluationConfig, seeds: Sequence[int]) -> list[list[int]]:
    """The token ids that follow the prompt, one text for each seed, each up to its `<|endoftext|>`."""
    drawn = list(generate(model, prompt, settings, seeds))
    return [[ids[row] for ids in drawn if ids[row] != tokenizer.EOT] for row in range(len(seeds))]


@torch.inference_mode()
def generate(model: GPT, prompt: str, settings: EvaluationConfig, seeds: Sequence[int]) -> Iterator[list[int]]:
    """Yields the next token id of every text, `sample_tokens` times or until all texts have ended.

    A text that has ended continues with `<|endoftext|>`. A text depends only on its seed (and rounding in matrix
    products). When a text fills the model's context, its last half becomes the new context: positions are learnt, so
    keys and values are computed again. Raises ValueError for a prompt that is longer than the context.
    """
    if not seeds:  # a rank without a sample
        return
    model.eval()
    context_tokens, device = model.config.context_tokens, model.head_VC.device
    ids = prompt_ids(prompt, context_tokens)
    generators = [torch.Generator().manual_seed(seed % 2**64) for seed in seeds]
    texts = [list(ids) for _ in seeds]
    past = model.no_past(len(seeds), min(len(ids) + settings.sample_tokens, context_tokens))
    fed_BT = torch.tensor([ids], device=device)  # all texts start the same, so one row suffices
    ended = [False] * len(seeds)
    for _ in range(settings.sample_tokens):
        x_BC = model.transformer(fed_BT, past=past)[:, -1]
        uniform_B = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
        sampled = next_tokens(model.logits(x_BC).float().expand(len(seeds), -1), settings, uniform_B).tolist()
        tokens = [tokenizer.EOT if over else token for over, token in zip(ended, sampled, strict=True)]
        ended = [token == tokenizer.EOT for token in tokens]
        if all(ended):
            return
        yield tokens
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        if past[0].length == context_tokens:
            past = model.no_past(len(seeds), context_tokens)
            fed_BT = torch.tensor([text[-max(context_tokens // 2, 1) :] for text in texts], device=device)
        else:
            fed_BT = torch.tensor(tokens, device=device)[:, None]


def prompt_ids(prompt: str, context_tokens: int) -> list[int]:
    """The prompt as the beginning of a document. Raises ValueError when it is longer than the model's context."""
    ids = [tokenizer.EOT, *tokenizer.encode(prompt).tolist()]
    if len(ids) > context_tokens:
        most = f"{context_tokens - 1:,} tokens (model.context_tokens less one for <|endoftext|>)"
        problem = f"the prompt {prompt!r:.40} has {len(ids) - 1:,} tokens, but the model takes at most {most}"
        raise ValueError(f"{problem}. Shorten it.")
    return ids


def next_tokens(logits_BV: Tensor, settings: EvaluationConfig, uniform_B: Tensor) -> Tensor:
    """One token id per row: the likeliest at temperature 0, else drawn from top k and top p with `uniform_B`."""
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


def main() -> int:
    """Print samples as they are drawn. Returns the exit code."""
    defaults = EvaluationConfig()
    parser = argparse.ArgumentParser("python -m model.evaluation.generate", description="Print samples of a run.")
    parser.add_argument("store_url")
    parser.add_argument("run")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--device", default="auto")
    numbers = {"samples": 1, "seed": 0, "tokens": defaults.sample_tokens}
    for option, default in (numbers | defaults.model_dump(include={"temperature", "top_k", "top_p"})).items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=type(default), default=default)
    args = parser.parse_args()
    try:
        sampling = {name: getattr(args, name) for name in ("samples", "temperature", "top_k", "top_p")}
        values = {"evaluation": sampling | {"sample_tokens": args.tokens}, "train": {"seed": args.seed}}
        settings = config_of(values, []).evaluation
        store = open_store(args.store_url)
        model = load_model(store, args.run, chosen(store, args.run)[0])
        prompt_ids(args.prompt, model.config.context_tokens)  # refuses a long prompt before anything is printed
        model.to(DDPConfig.detect({}, args.device).device)
        for index in range(args.samples):
            if index:
                print()
            _print(args.prompt, generate(model, args.prompt, settings, [args.seed + index]))
    except (ValueError, StorageError) as error:
        return fail(f"error: {error}", USER_ERROR)
    except BrokenPipeError:
        discard_output()
        return 1
    return 0


def _print(prompt: str, generated: Iterator[list[int]]) -> None:
    """Print the prompt, then each token as soon as it completes a character."""
    print(printable(prompt, lines=True), end="", flush=True)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character's bytes may be spread over several tokens
    for ids in generated:
        print(printable(decoder.decode(tokenizer.decode_bytes(ids)), lines=True), end="", flush=True)
    print(printable(decoder.decode(b"", final=True), lines=True))


if __name__ == "__main__":
    sys.exit(main())
