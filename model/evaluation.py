"""The Evaluator: what a model scores on val windows and on items with four endings. Trains nothing, draws nothing.

Losses are sums over tokens, in nats, so that they depend neither on the batch size nor on the number of ranks.
Shapes: B batch, T time, C channels, V vocabulary, N scored positions.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from model.completion import Item
from model.distributed import DDPConfig
from model.gpt import GPT
from model.loader import DataLoader, inputs_and_targets, widened

EVALUATION_SEQUENCES = 8  # windows in one forward pass


class Evaluator:
    """A model on its device, asked without being changed."""

    def __init__(self, model: GPT, ddp: DDPConfig, precision: str = "auto") -> None:
        self.model, self.ddp = model, ddp
        bf16_here = ddp.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        self.precision = "bf16" if precision == "bf16" or (precision == "auto" and bf16_here) else "fp32"

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic of the forward pass: bf16 where it is wanted and there, else fp32."""
        return torch.autocast(self.ddp.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    @torch.no_grad()
    def val_loss(self, loader: DataLoader, limit_tokens: int, seed: int = 0) -> dict[str, float]:
        """Mean loss of the split's windows, or of a seeded choice of `limit_tokens` of them (0: all).

        Returns loss (nats a token), tokens scored, and tokens that no window covers. The ranks share the windows.
        """
        order = loader.order
        wanted = (
            min(limit_tokens // loader.sequence_tokens, order.epoch_windows) if limit_tokens else order.epoch_windows
        )
        chosen = np.arange(order.epoch_windows)
        if wanted < order.epoch_windows:
            chosen = np.sort(
                np.random.PCG64(seed).random_raw(order.epoch_windows).argsort(kind="stable")[: max(wanted, 1)]
            )
        mine = chosen[self.ddp.rank :: self.ddp.ranks]
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device="cuda" if self.ddp.device.type == "cuda" else "cpu")
        for start in range(0, len(mine), EVALUATION_SEQUENCES):
            windows = loader.windows_in_file_order(mine[start : start + EVALUATION_SEQUENCES])
            tokens_BT, targets_BT = inputs_and_targets(widened(windows, self.ddp.device), self.ddp.device)
            with self.autocast():
                sums[0] += self.model(tokens_BT, targets_BT).to(sums.device).double()
            sums[1] += targets_BT.numel()
        total, tokens = self.ddp.sum(sums).tolist()
        unused = loader.tokens - order.epoch_windows * loader.sequence_tokens
        return {"loss": total / tokens, "tokens": int(tokens), "unused_tokens": unused}

    @torch.no_grad()
    def ending_losses(self, item: Item) -> list[tuple[float, int]]:
        """For each ending of the item: its summed loss after the context, and its number of tokens.

        A context that is too long for the model is cut on the left; no padded position is scored.
        """
        self.model.eval()
        longest = max(len(ending) for ending in item.endings)
        room = self.model.config.context_tokens + 1 - longest
        if room < 1:
            raise ValueError(
                f"an ending of {longest} tokens was to be scored, the model's context (model.context_tokens) is "
                f"{self.model.config.context_tokens}. Leave that item out, or evaluate a model with a longer context."
            )
        context = item.context[-room:]
        rows = [context + ending for ending in item.endings]
        width = len(context) + longest
        padded_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.ddp.device)
        with self.autocast():
            x_BTC = self.model.hidden(padded_BT[:, :-1])
            losses = []
            for x_TC, row, ending in zip(x_BTC, rows, item.endings, strict=True):
                first = len(context) - 1
                logits_NV = self.model.logits(x_TC[first : first + len(ending)]).float()
                targets_N = torch.tensor(row[len(context) :], device=self.ddp.device)
                losses.append((float(F.cross_entropy(logits_NV, targets_N, reduction="sum")), len(ending)))
        return losses
