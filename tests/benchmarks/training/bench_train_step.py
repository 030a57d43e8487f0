"""One optimizer step of ours beside transformers' GPT-2 and a textbook one: tokens/s, peak memory. Prints one table.

    python tests/benchmarks/training/bench_train_step.py [--sizes A,B] [--dtypes fp32,bf16] [--modes eager,compile]
        [--steps 10] [--rounds 3] [--no-memory] [--device cuda --sizes 124M]

A step is zero_grad, forward, loss, backward, clip at 1.0, fused AdamW, on one batch that stays. In each round each
setting has a process of its own, in which the contenders begin with the same weights and take their steps in turn; the
first 2 steps (compilation) are not timed. Peak memory is that of a fresh process a contender, one step after an update
by gradients of 0, above what it had after the import of torch and transformers. A speed is judged by the median over
the turns of transformers' seconds by ours. transformers and the textbook have the published vocabulary of 50,257 rows,
ours its padding.

On a CPU that has no bf16 arithmetic one bf16 step of A takes minutes: ask for it apart, with --steps 1. On a GPU the
memory is what torch allocated there at most. Linux only.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig, TrainingConfig
from model.gpt import GPT, Block, unpadded
from model.tokenizer import VOCABULARY
from model.training.optimizer import make_optimizer
from tests.benchmarks import contest
from tests.benchmarks.contest import Outcome
from tests.benchmarks.tokenise.phases import forget_peak, megabytes

OURS, PEER, PLAIN = CONTENDERS = ("ours", "transformers", "plain")
UNTIMED_STEPS, AGREED_STEPS = 2, 10
LIMIT_SECONDS = 4 * 3_600.0  # of a process: bf16 on a CPU without it
LOSS_LIMIT = 1e-4
STRICT = ("A", "fp32", "eager")  # where the larger gains are asked for


class Size(NamedTuple):
    """A model and a batch: B sequences of T tokens."""

    layers: int
    heads: int
    width: int
    T: int
    B: int

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(layers=self.layers, heads=self.heads, width=self.width, context_tokens=self.T)


SIZES = {"A": Size(4, 4, 256, 256, 8), "B": Size(6, 6, 384, 256, 4), "124M": Size(12, 12, 768, 1_024, 16)}
DEVICE = os.environ.get("BENCH_DEVICE", "cpu")  # of a process of one setting


class Textbook(nn.Module):
    """GPT-2 with our blocks: all logits, then the cross-entropy of all rows."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, size.width)
        self.wpe = nn.Embedding(size.T, size.width)
        self.h = nn.ModuleList(Block(size.config, 0.0) for _ in range(size.layers))
        self.ln_f = nn.LayerNorm(size.width)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        x_BTC = self.wte(tokens_BT) + self.wpe(torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        for block in self.h:
            x_BTC = block(x_BTC)
        logits_NV = F.linear(self.ln_f(x_BTC), self.wte.weight).flatten(0, 1)
        return F.cross_entropy(logits_NV, targets_BT.flatten())


def make(who: str, size: Size) -> nn.Module:
    if who == OURS:
        return GPT(size.config)
    if who == PLAIN:
        return Textbook(size)
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=size.T, n_embd=size.width, n_layer=size.layers, n_head=size.heads,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="sdpa", use_cache=False,
        )
    )  # fmt: skip


@torch.no_grad()
def copy_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """The same weights, whatever their names: transformers keeps its matrices turned, and only ours has padding."""
    found = {name: unpadded(name, weight) for name, weight in ours.named_parameters()}
    for name, weight in theirs.named_parameters():
        mine = found.pop(name if name.startswith("transformer.") else f"transformer.{name}")
        owner = type(theirs.get_submodule(name.rpartition(".")[0])).__name__
        weight.copy_(mine.T if owner == "Conv1D" and weight.dim() > 1 else mine)
    assert not found, found.keys()


def losses_of(who: str, model: Callable[..., Any], tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """The mean loss, as the contender's own forward gives it; ours scaled as the trainer does."""
    if who == OURS:
        return model(tokens_BT, targets_BT) * (1 / targets_BT.numel())
    if who == PLAIN:
        return model(tokens_BT, targets_BT)
    # labels that are shifted already: all T targets count, as with the others
    return model(input_ids=tokens_BT, labels=targets_BT, shift_labels=targets_BT).loss


class Contender:
    """A model with its optimizer, and what its steps have taken so far."""

    def __init__(self, who: str, size: Size, dtype: str, mode: str) -> None:
        self.who = who
        self.model = make(who, size).train().to(DEVICE)
        self.called: Any = torch.compile(self.model) if mode == "compile" else self.model
        self.optimizer = make_optimizer(self.model, TrainingConfig())
        self.autocast = torch.autocast(DEVICE, torch.bfloat16) if dtype == "bf16" else nullcontext()
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def step(self, tokens_BT: Tensor, targets_BT: Tensor) -> None:
        began = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            loss = losses_of(self.who, self.called, tokens_BT, targets_BT)
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - began)


def batch(size: Size) -> tuple[Tensor, Tensor]:
    """Seeded ids, frequent ones among them as in a text: their gradients meet in few rows of the embedding."""
    uniform = torch.rand(size.B, size.T + 1, generator=torch.Generator().manual_seed(1))
    ids_BT = (VOCABULARY**uniform).long() - 1
    return ids_BT[:, :-1].contiguous().to(DEVICE), ids_BT[:, 1:].contiguous().to(DEVICE)


# A process of one setting, and one of a contender's memory


def take_steps(name: str, dtype: str, mode: str, steps: int) -> dict[str, Any]:
    size = SIZES[name]
    torch.manual_seed(1)
    contenders = [Contender(who, size, dtype, mode) for who in CONTENDERS]
    for other in contenders[1:]:
        copy_weights(contenders[0].model, other.model)
    tokens_BT, targets_BT = batch(size)
    begin = time.monotonic()
    for step in range(steps):
        first = step % len(contenders)
        for one in contenders[first:] + contenders[:first]:
            one.step(tokens_BT, targets_BT)
            print(f"step {step}: {one.who}: {one.seconds[-1]:.3f} s, loss {one.losses[-1]:.5f}", flush=True)
    return {"begin": begin, "end": time.monotonic()} | {one.who: [one.seconds, one.losses] for one in contenders}


def take_memory(name: str, dtype: str, mode: str, who: str) -> dict[str, Any]:
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401  # of every contender, so that it counts for none

    begin = time.monotonic()
    forget_peak()
    before = megabytes("VmHWM")
    one = Contender(who, SIZES[name], dtype, mode)
    for parameter in one.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    one.optimizer.step()  # its state is there from the second step on, and that step has the peak
    one.step(*batch(SIZES[name]))
    peak = torch.cuda.max_memory_allocated() / 1e6 if DEVICE == "cuda" else megabytes("VmHWM") - before
    return {"begin": begin, "end": time.monotonic(), "peak_megabytes": peak}


# The contest


class Setting(NamedTuple):
    """A row of the contest: a size, a dtype, a mode."""

    size: str
    dtype: str
    mode: str

    @property
    def speed_wanted(self) -> float:
        return 1.2 if self == STRICT else 0.95

    @property
    def memory_allowed(self) -> float:
        return 0.6 if self == STRICT else 1.0


def ask(what: str, setting: Setting, last: str, folder: Path) -> Outcome:
    words = [sys.executable, str(Path(__file__).absolute()), what, *setting, last]
    try:
        return contest.run(words, folder / "work", dict(os.environ))
    finally:
        shutil.rmtree(folder / "work", ignore_errors=True)


def verdict(kept: bool, said: str) -> str:
    return f"{said}: {'yes' if kept else '**no**'}"


def show(setting: Setting, rounds: list[Outcome], peaks: dict[str, float]) -> None:
    """Three rows of the table."""
    size = SIZES[setting.size]
    seconds = {
        who: [taken for one in rounds for taken in one.result[who][0][UNTIMED_STEPS:] or one.result[who][0][-1:]]
        for who in CONTENDERS
    }
    losses = {who: rounds[0].result[who][1] for who in CONTENDERS}
    for who in CONTENDERS:
        faster = median(theirs / mine for theirs, mine in zip(seconds[PEER], seconds[who], strict=True))
        smaller = peaks[who] / peaks[PEER] if peaks else 0.0
        verdicts = []
        if who == OURS:
            verdicts.append(verdict(faster >= setting.speed_wanted, f"speed ≥ {setting.speed_wanted}"))
            if peaks:
                verdicts.append(verdict(smaller <= setting.memory_allowed, f"memory ≤ {setting.memory_allowed}"))
            if setting.size == "A" and setting.dtype == "fp32" and len(losses[who]) >= AGREED_STEPS:
                apart = abs(losses[who][AGREED_STEPS - 1] - losses[PEER][AGREED_STEPS - 1])
                verdicts.append(verdict(apart <= LOSS_LIMIT, f"loss within {LOSS_LIMIT:.0e} ({apart:.0e})"))
        cells = [
            *setting,
            who,
            f"{size.B * size.T / min(seconds[who]):,.0f}",
            f"{size.B * size.T / median(seconds[who]):,.0f}",
            f"{min(seconds[PEER]) / min(seconds[who]):.2f}",
            f"{faster:.2f}",
            f"{losses[who][0]:.5f}",
            f"{losses[who][-1]:.5f}",
            f"{peaks[who]:,.0f}" if peaks else "",
            f"{smaller:.2f}" if peaks else "",
            f"{median(one.foreign for one in rounds):.0%}",
            ", ".join(verdicts),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def words_of(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def words(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: one or more of {','.join(known)}")
        return text.split(",")

    return words


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=words_of(tuple(SIZES)), default=["A", "B"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtypes", type=words_of(("fp32", "bf16")), default=["fp32", "bf16"])
    parser.add_argument("--modes", type=words_of(("eager", "compile")), default=["eager", "compile"])
    parser.add_argument("--steps", type=int, default=10, help=f"of each contender in a round, {UNTIMED_STEPS} untimed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true")
    asked = parser.parse_args()
    contest.LIMIT_SECONDS = LIMIT_SECONDS
    os.environ["BENCH_DEVICE"] = asked.device
    device = torch.cuda.get_device_name() if asked.device == "cuda" else torch.backends.cpu.get_cpu_capability()
    settings = [Setting(size, dtype, mode) for size in asked.sizes for dtype in asked.dtypes for mode in asked.modes]
    rounds: dict[Setting, list[Outcome]] = {setting: [] for setting in settings}
    with tempfile.TemporaryDirectory(prefix="bench-train-step-") as name:
        folder = Path(name)
        for number in range(asked.rounds):
            for setting in settings:
                rounds[setting].append(found := ask("steps", setting, str(asked.steps), folder))
                print(f"round {number + 1}: {' '.join(setting)}: {found.work_seconds:.0f} s, others had "
                      f"{found.foreign:.0%} of the machine", file=sys.stderr)  # fmt: skip
        peaks: dict[Setting, dict[str, float]] = {setting: {} for setting in settings}
        for setting in [] if asked.no_memory else settings:  # after the rounds: compiled code is kept by then
            peaks[setting] = {who: ask("memory", setting, who, folder).result["peak_megabytes"] for who in CONTENDERS}
    print(f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {asked.rounds} "
          f"rounds of {asked.steps} steps, Python {platform.python_version()}, torch {torch.__version__}, "
          f"transformers {version('transformers')}, {device}\n\n"
          f"| size | dtype | mode | contender | tokens/s, best step | tokens/s, median | best, of transformers "
          f"| median of turns, of transformers | loss, first step | loss, step {asked.steps} | peak MB above imports "
          f"| of transformers | others' share | target |\n"
          f"| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")  # fmt: skip  # noqa: E501
    for setting in settings:
        show(setting, rounds[setting], peaks[setting])


if __name__ == "__main__":
    if sys.argv[1:2] in (["steps"], ["memory"]):
        what, size, dtype, mode, last = sys.argv[1:]
        found = take_memory(size, dtype, mode, last) if what == "memory" else take_steps(size, dtype, mode, int(last))
        Path(contest.RESULT).write_text(json.dumps(found))
    else:
        main()
