"""Samples are seeded, follow the settings, end at `<|endoftext|>` and continue past the context."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import tokenizer
from model.__main__ import run_job
from model.checkpoints.records import chosen
from model.checkpoints.weights import load_model
from model.config import EvaluationConfig, ModelConfig, RunConfig
from model.evaluation import generate
from model.evaluation.generate import next_tokens, sample_texts
from model.gpt import GPT
from model.runs.job import put_job
from model.runs.run import pin_run, training_job
from model.tokenizer import EOT
from storage.datasets.manifest import Manifest
from storage.errors import ObjectMissing
from storage.stores.store import Store
from tests.making import tiny_config


def sampling(temperature: float, top_k: int, top_p: float) -> EvaluationConfig:
    return EvaluationConfig(temperature=temperature, top_k=top_k, top_p=top_p)


ANY = sampling(1.0, 0, 1.0)
LIKELIEST = sampling(0.0, 0, 1.0)
PROBABILITIES = torch.tensor([0.05, 0.5, 0.15, 0.3])


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(5)
    model = GPT(ModelConfig(layers=1, heads=2, width=16, context_tokens=8))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
        model.transformer.wte.weight[EOT] = 0  # never the likeliest
    return model


def drawn(settings: EvaluationConfig, logits_V: Tensor | None = None, times: int = 2_000) -> Counter[int]:
    uniform_B = torch.rand(times, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits_V = PROBABILITIES.log() if logits_V is None else logits_V
    return Counter(next_tokens(logits_V.expand(times, -1), settings, uniform_B).tolist())


def ids_of(model: GPT, prompt: str, count: int, settings: EvaluationConfig = ANY, seed: int = 0) -> list[int]:
    return texts_of(model, prompt, count, settings, [seed])[0]


def texts_of(model: GPT, prompt: str, count: int, settings: EvaluationConfig, seeds: Sequence[int]) -> list[list[int]]:
    return sample_texts(model, prompt, settings.model_copy(update={"sample_tokens": count}), seeds)


@torch.no_grad()
def likeliest_ids(model: GPT, prompt: str, count: int) -> list[int]:
    """Greedy decoding without a cache; a full context of 8 continues from its last half."""
    ids = [EOT, *tokenizer.encode(prompt).tolist()]
    written: list[int] = []
    for _ in range(count):
        ids = ids[-4:] if len(ids) > 8 else ids
        written.append(int(model.logits(model.transformer(torch.tensor([ids]))[0, -1]).argmax()))
        ids.append(written[-1])
    return written


# One token


def test_tokens_are_drawn_with_their_probabilities() -> None:
    counts = drawn(ANY, times=8_000)
    for token, probability in enumerate(PROBABILITIES.tolist()):
        assert counts[token] / 8_000 == pytest.approx(probability, abs=0.02)


def test_temperature_scales_the_logits() -> None:
    for temperature in (0.5, 2.0):
        expected = (PROBABILITIES.log() / temperature).softmax(0).tolist()
        counts = drawn(sampling(temperature, 0, 1.0), times=8_000)
        assert [counts[token] / 8_000 for token in range(4)] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("settings", [LIKELIEST, sampling(0.0, 3, 0.9), sampling(1.0, 1, 1.0), sampling(9.0, 1, 0.1)])
def test_temperature_0_and_top_k_1_take_the_likeliest(settings: EvaluationConfig) -> None:
    for seed in range(50):
        logits_V = torch.randn(1_000, generator=torch.Generator().manual_seed(seed))
        uniform_B = torch.rand(1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert next_tokens(logits_V[None], settings, uniform_B).tolist() == [int(logits_V.argmax())]


@pytest.mark.parametrize(
    ("top_k", "kept"), [(1, {1}), (2, {1, 3}), (3, {1, 2, 3}), (4, {0, 1, 2, 3}), (9, {0, 1, 2, 3})]
)
def test_top_k_keeps_the_k_likeliest(top_k: int, kept: set[int]) -> None:
    assert set(drawn(sampling(1.0, top_k, 1.0))) == kept


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, {1}), (0.49, {1}), (0.51, {1, 3}), (0.79, {1, 3}), (0.81, {1, 2, 3}), (0.96, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_smallest_set_that_suffices(top_p: float, kept: set[int]) -> None:
    assert set(drawn(sampling(1.0, 0, top_p))) == kept


def test_top_p_applies_to_the_tokens_that_top_k_keeps() -> None:
    assert set(drawn(sampling(1.0, 2, 0.62))) == {1}  # 0.5 of 0.8 is 0.625
    assert set(drawn(sampling(1.0, 2, 0.63))) == {1, 3}


def test_an_impossible_token_is_never_drawn() -> None:
    logits_V = torch.tensor([0.0, float("-inf"), 0.0])
    assert set(drawn(ANY, logits_V)) == {0, 2}


# A text


def test_a_text_is_determined_by_its_seed(model: GPT) -> None:
    assert ids_of(model, "Hello", 20, seed=3) == ids_of(model, "Hello", 20, seed=3)
    assert ids_of(model, "Hello", 20, seed=3) != ids_of(model, "Hello", 20, seed=4)


def test_the_seeds_of_many_samples_wrap_at_64_bits(model: GPT) -> None:
    assert ids_of(model, "Hello", 5, seed=2**64 + 3) == ids_of(model, "Hello", 5, seed=3)


def test_a_text_depends_on_its_seed_and_not_on_the_global_generator(model: GPT) -> None:
    expected = ids_of(model, "Hello", 10)
    torch.manual_seed(99)
    torch.rand(7)
    assert ids_of(model.train(), "Hello", 10) == expected


@pytest.mark.parametrize("prompt", ["", "Hello", "one two three four five", "one two three four five six seven"])
def test_a_text_continues_past_the_context_from_its_last_half(model: GPT, prompt: str) -> None:
    ids = ids_of(model, prompt, 30, LIKELIEST)
    assert len(ids) == 30
    assert ids == likeliest_ids(model, prompt, 30)


def test_a_model_of_one_position_generates_text() -> None:
    model = GPT(ModelConfig(layers=1, heads=1, width=8, context_tokens=1))
    assert len(ids_of(model, "", 5)) == 5


def test_a_prompt_that_is_longer_than_the_context_is_refused(model: GPT) -> None:
    assert len(ids_of(model, "one two three four five six seven", 1)) == 1
    with pytest.raises(ValueError, match=r"has 8 tokens.*at most 7 tokens.*Shorten it"):
        ids_of(model, "one two three four five six seven eight", 1)


@pytest.mark.parametrize("texts", [2, 3, 16])
@pytest.mark.parametrize("settings", [ANY, sampling(0.8, 20, 1.0), sampling(1.2, 0, 0.7), LIKELIEST])
def test_a_text_does_not_depend_on_the_others_in_its_batch(model: GPT, texts: int, settings: EvaluationConfig) -> None:
    """Also past the end of the context, where keys and values are recomputed."""
    seeds = range(40, 40 + texts)
    together = texts_of(model, "Hello", 20, settings, seeds)
    assert together == [ids_of(model, "Hello", 20, settings, seed) for seed in seeds]
    assert len({tuple(ids) for ids in together}) == (1 if settings is LIKELIEST else texts)


def test_a_text_that_has_ended_waits_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(ModelConfig(layers=1, heads=2, width=16, context_tokens=8))
    tokens = iter([[7, 7], [EOT, 8], [9, 9], [9, EOT], [1, 1]])
    monkeypatch.setattr(generate, "next_tokens", lambda *_: torch.tensor(next(tokens)))
    assert texts_of(model, "Hello", 50, ANY, [0, 1]) == [[7], [7, 8, 9]]
    assert next(tokens) == [1, 1]  # nothing was drawn once both had ended


@pytest.mark.parametrize("before", [0, 3])
def test_a_text_ends_before_endoftext(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(ModelConfig(layers=1, heads=2, width=16, context_tokens=8))
    tokens = iter([7] * before + [EOT, 8])
    monkeypatch.setattr(generate, "next_tokens", lambda *_: torch.tensor([next(tokens)]))
    assert ids_of(model, "Hello", 50) == [7] * before


def test_a_model_that_predicts_endoftext_writes_nothing() -> None:
    model = GPT(ModelConfig(layers=1, heads=2, width=16, context_tokens=8))
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.transformer.ln_f.bias[0] = 1
        model.transformer.wte.weight[EOT, 0] = 50
    assert ids_of(model, "Hello", 50) == []


# The command


@pytest.fixture
def trained(store: Store, config: RunConfig, build: Callable[[RunConfig], Manifest]) -> Store:
    """A store with the run `tiny` of one step."""
    quick = tiny_config(store.url, config.data.source, "train.max_steps=1", "train.warmup_steps=0")
    assert run_job(store.url, put_job(store, training_job(pin_run(store, quick, build(quick).digest, None)))) == 0
    return store


def command(store: Store, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "model.evaluation.generate", store.url, *arguments]
    return subprocess.run(argv, capture_output=True, text=True, cwd=cwd, check=False)


def test_the_command_writes_samples_of_the_newest_checkpoint(trained: Store, tmp_path: Path) -> None:
    prompt = "Once upon a time"
    ended = command(trained, "tiny", "--prompt", prompt, "--tokens", "6", "--samples", "2", "--seed", "8", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    record = chosen(trained, "tiny")[0]
    assert record.step == 1
    model = load_model(trained, "tiny", record)
    texts = [prompt + tokenizer.decode(ids) for ids in texts_of(model, prompt, 6, EvaluationConfig(), [8, 9])]
    assert all(text.rstrip("\ufffd") in ended.stdout for text in texts)


def test_the_command_refuses_an_unknown_run_by_name(trained: Store, tmp_path: Path) -> None:
    ended = command(trained, "nowhere", "--prompt", "x", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "nowhere" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_command_ends_in_silence_with_the_reader_of_its_output(trained: Store) -> None:
    argv = [sys.executable, "-m", "model.evaluation.generate", trained.url, "tiny", "--prompt", "x"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.communicate()[1] == b""
    assert process.returncode == 1


def test_a_run_without_a_checkpoint_has_no_model(store: Store) -> None:
    with pytest.raises(ObjectMissing, match="tiny"):
        chosen(store, "tiny")[0]


def test_text_is_printed_token_by_token_and_in_whole_characters(
    trained: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = " smiles 🙂 naïvely, 日本語."
    ids = tokenizer.encode(text).tolist()
    assert len(ids) > len(text) // 2  # some characters need several tokens
    shown = ""

    def token_by_token(*_: Any) -> Iterator[tuple[int]]:
        nonlocal shown
        for count, token in enumerate(ids):
            shown += capsys.readouterr().out
            complete = tokenizer.decode(ids[:count])
            if not complete.endswith("\ufffd"):
                assert shown == "She" + complete
            yield (token,)

    monkeypatch.setattr(generate, "generate", token_by_token)
    monkeypatch.setattr(sys, "argv", ["generate", trained.url, "tiny", "--prompt", "She"])
    assert generate.main() == 0
    assert (shown + capsys.readouterr().out).rstrip("\n") == "She" + text


@pytest.mark.parametrize(
    "option",
    [
        ("--top-p", "0"), ("--top-p", "1.5"), ("--temperature", "-1"), ("--temperature", "nan"), ("--top-k", "-1"),
        ("--seed", "-1"), ("--seed", str(2**64)), ("--tokens", "0"), ("--tokens", str(10**12)), ("--samples", "0"),
    ],
)  # fmt: skip
def test_invalid_settings_are_refused(
    trained: Store, option: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["generate", trained.url, "tiny", "--prompt", "She", *option])
    try:
        code: object = generate.main()
    except SystemExit as error:  # argparse refuses it
        code = error.code
    assert code == 2
    error = capsys.readouterr().err.replace("-", "_")
    assert option[0].strip("-").replace("-", "_") in error
    assert "Give another value." in error
    assert "validation error" not in error
