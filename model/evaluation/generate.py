"""Streams samples of a run's newest checkpoint to the terminal.

python -m model.evaluation.generate <store url> <run> --prompt "…"
"""

import argparse
import sys
from collections.abc import Iterator

from model import tokenizer
from model.checkpoints.records import checkpoints
from model.checkpoints.weights import load_weights
from model.config import EvaluationConfig, ModelConfig
from model.evaluation.sampling import SamplingSettings, generate, prompt_ids
from model.gpt import GPT
from model.processes.distributed import DDPConfig
from storage.errors import ObjectMissing, StorageError
from storage.stores.opening import open_store
from storage.stores.store import Store


def newest_model(store: Store, run: str) -> tuple[GPT, int]:
    """The model of the run's newest checkpoint, and its step. Raises ObjectMissing when the run has no checkpoint."""
    records = checkpoints(store, run)
    if not records:
        raise ObjectMissing(f"run {run!r} has no checkpoint in {store.url!r}. Train it first: gpt2 pretrain")
    model = GPT(ModelConfig.model_validate(records[-1].model))
    load_weights(store, run, records[-1], model)
    return model, records[-1].step


def main() -> int:
    """Print samples as they are drawn. Returns the exit code."""
    defaults = EvaluationConfig()
    parser = argparse.ArgumentParser(
        prog="python -m model.evaluation.generate", description="Write text with a run's newest checkpoint."
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
    arguments = parser.parse_args()
    try:
        settings = _checked_settings(arguments)
        model, _ = newest_model(open_store(arguments.store_url), arguments.run)
        prompt_ids(arguments.prompt, model.config.context_tokens)  # refuses a long prompt before anything is printed
        model.to(DDPConfig.detect({}, arguments.device).device)
    except (ValueError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for index in range(arguments.samples):
        _print(
            arguments.prompt, generate(model, arguments.prompt, arguments.tokens, settings, [arguments.seed + index])
        )
        sys.stdout.write("\n\n" if index + 1 < arguments.samples else "\n")
    return 0


def _checked_settings(arguments: argparse.Namespace) -> SamplingSettings:
    """The sampling settings. Raises ValueError for values that `EvaluationConfig` refuses."""
    checked = EvaluationConfig(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        sample_tokens=arguments.tokens,
    )
    return SamplingSettings(checked.temperature, checked.top_k, checked.top_p)


def _print(prompt: str, drawn: Iterator[tuple[int, ...]]) -> None:
    """Print the prompt, then each token as soon as it completes a character."""
    sys.stdout.write(prompt)
    sys.stdout.flush()
    pending: list[int] = []
    for ids in drawn:
        pending += ids
        text = tokenizer.decode(pending)
        if not text.endswith("\ufffd"):  # the bytes of a character may be spread over several tokens
            sys.stdout.write(text)
            sys.stdout.flush()
            pending = []
    sys.stdout.write(tokenizer.decode(pending))


if __name__ == "__main__":
    sys.exit(main())
