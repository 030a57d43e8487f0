"""The Evaluator: the losses of a model on val windows and on items with four endings. Does not train or sample.

Losses are sums over tokens, in nats, so that they do not depend on the batch size or the number of ranks.
Shapes: B batch, T time, C channels, V vocabulary, N scored tokens, U positions that predict them.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.data.loader import inputs_and_targets, widened
from model.evaluation.items import ENDINGS, Item
from model.evaluation.packing import batch_rows, pack_items, to_tensors
from model.gpt import EMBEDDING, GPT, unpadded
from model.processes.distributed import DDPConfig
from storage.loading.windows import Windows

PROGRESS_SECONDS = 5.0
EVALUATION_SEQUENCES = 8  # windows of one forward pass
BATCH_TOKENS = {"cpu": 4_096, "cuda": 32_768}  # of a forward pass over items; an H100 is 4.4 times slower with 4,096
HEAD_POSITIONS, HEAD_TOKENS = 512, 1_024  # logits computed at once: rows, and columns on the CPU


@dataclass(frozen=True)
class ValLoss:
    """The mean loss of a split's windows, in nats per token, and how many tokens were scored."""

    loss: float
    tokens: int
    left_out_tokens: int  # of windows that a limit left out
    unused_tokens: int  # at the ends of shards, in no window


class Evaluator:
    """Scores a model on its device. Leaves its weights unchanged."""

    def __init__(self, model: GPT, ddp: DDPConfig, precision: str = "auto", label: str = "") -> None:
        """The main rank's lines of progress begin with `label`. Without it there are none."""
        self.model, self.ddp, self._label = model, ddp, label
        self._shown_at = time.monotonic()
        self._sums_on = "cuda" if ddp.device.type == "cuda" else "cpu"  # float64 sums: MPS has no float64
        has_bf16 = ddp.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        self.precision = "bf16" if precision == "bf16" or (precision == "auto" and has_bf16) else "fp32"

    def show_progress(self, done: int, total: int) -> None:
        """Print how many of this rank's windows or rows, or of the prompts, are done, once per PROGRESS_SECONDS."""
        if self._label and self.ddp.is_main and time.monotonic() - self._shown_at > PROGRESS_SECONDS:
            self._shown_at = time.monotonic()
            print(f"{self._label}: {done:,} of {total:,} done", flush=True)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.ddp.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @torch.no_grad()
    def val_loss(self, split: Windows, limit_tokens: int, seed: int = 0) -> ValLoss:
        """The loss on the split's windows, or on a seeded choice of about `limit_tokens` tokens (0: all)."""
        mine = _chosen_windows(split, limit_tokens, seed)[self.ddp.rank :: self.ddp.ranks]
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self._sums_on)  # loss, tokens
        for start in range(0, len(mine), EVALUATION_SEQUENCES):
            windows = split.read_in_file_order(mine[start : start + EVALUATION_SEQUENCES])
            tokens_BT, targets_BT = inputs_and_targets(widened(windows, self.ddp.device), self.ddp.device)
            with self.autocast():
                sums[0] += self.model(tokens_BT, targets_BT).to(sums.device).double()
            sums[1] += targets_BT.numel()
            self.show_progress(min(start + EVALUATION_SEQUENCES, len(mine)), len(mine))
        total, tokens = self.ddp.sum(sums).tolist()
        window_tokens = split.order.epoch_windows * split.sequence_tokens
        return ValLoss(total / tokens, int(tokens), window_tokens - int(tokens), split.tokens - window_tokens)

    @torch.no_grad()
    def ending_losses(self, items: Sequence[Item]) -> np.ndarray:
        """The summed loss of each ending after its context, in nats: float64, one row per item, four columns."""
        self.model.eval()
        losses = np.zeros(len(items) * ENDINGS)
        mine = pack_items(items, self.model.config.context_tokens)[self.ddp.rank :: self.ddp.ranks]
        head_VC = unpadded(EMBEDDING, self.model.head_VC)
        done = 0
        for rows in batch_rows(mine, BATCH_TOKENS[self._sums_on]):
            batch = to_tensors(rows, self.ddp.device)
            with self.autocast():
                x_BTC = self.model.transformer(batch.tokens_BT, batch.positions_BT, batch.mask_B1TT)
            # The head once per predicting position, in fp32: the rounding of bf16 logits can make a loss negative
            x_UC = x_BTC.flatten(0, 1)[batch.predictors_U].float()
            normalisers_U = torch.cat([_logsumexp(part_UC, head_VC) for part_UC in torch.split(x_UC, HEAD_POSITIONS)])
            logits_N = (x_UC[batch.predictor_of_N] * head_VC[batch.targets_N]).sum(-1)
            losses_N = normalisers_U[batch.predictor_of_N.cpu()] - logits_N.cpu()
            np.add.at(losses, batch.slots_N.cpu().numpy(), losses_N.double().numpy())
            done += len(rows)
            self.show_progress(done, len(mine))
        return self.ddp.sum(torch.from_numpy(losses).to(self._sums_on)).cpu().numpy().reshape(-1, ENDINGS)


def _chosen_windows(split: Windows, limit_tokens: int, seed: int) -> np.ndarray:
    windows = split.order.epoch_windows
    count = max(limit_tokens // split.sequence_tokens, 1)
    if not limit_tokens or count >= windows:
        return np.arange(windows)
    return np.sort(np.random.PCG64(seed).random_raw(windows).argsort(kind="stable")[:count])


def _logsumexp(x_UC: Tensor, head_VC: Tensor) -> Tensor:
    """The logarithm of the summed exponentials of each position's logits, on the CPU.

    A CPU takes HEAD_TOKENS of the vocabulary at a time, so that logits stay in its cache, and subtracts the largest of
    the first HEAD_TOKENS logits only: 1.9 times as fast as `logsumexp` of whole logits on 2 cores.
    """
    columns = HEAD_TOKENS if x_UC.device.type == "cpu" else len(head_VC)
    sums_U = torch.zeros(len(x_UC), device=x_UC.device)
    largest_U: Tensor | None = None
    for part_VC in torch.split(head_VC, columns):
        logits_UV = F.linear(x_UC, part_VC)
        if largest_U is None:
            largest_U = logits_UV.amax(-1)
        sums_U += logits_UV.sub_(largest_U[:, None]).exp_().sum(-1)
    if largest_U is None or not sums_U.isfinite().all():  # a later logit is at least 88 above the first ones
        return F.linear(x_UC, head_VC).logsumexp(-1).cpu()
    # Through float64, so that equal sums give equal losses whichever code path takes the logarithm
    return sums_U.cpu().double().log_().float() + largest_U.cpu()
