"""GPT-2: pre-norm transformer blocks with a tied head. Knows no batches, no files and no ranks.

Names are those of the published weights (transformer.wte, h.0.attn.c_attn, …), so that they load.
Shapes: B batch, T time, C channels (width), H heads, D channels of a head, V vocabulary, N rows (B*T), S room, O out.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.tokenizer import VOCABULARY

PADDED_VOCABULARY = 50_304  # rows of the embedding, a multiple of 128 as GPUs want it; those beyond 50,257 stay 0
EMBEDDING = "transformer.wte.weight"
# Rows of x for which a processor's x W^T is faster as W x^T: 2 cores with AVX2 took 0.24 to 0.76 of the time for 4 to
# 16 rows, 0.62 to 0.85 for 64; 8 cores with AVX-512 0.37 to 1.0 for 16 and 32 rows, and up to 2.5 times as long below.
FEW_ROWS = {"AVX2": range(1, 65), "AVX512": range(16, 65)}.get(torch.backends.cpu.get_cpu_capability(), range(0))


def chunk_rows(rows: int) -> int:
    """Rows of one chunk of head and loss: a quarter of them, so that memory is saved, within what is fast.

    The logits of 1,024 rows are 206 MB in fp32. On 2 cores chunks of 256 to 1,024 were 1.05 to 1.15 times as fast as
    whole logits; torch's own choice ("auto") was 4 times slower there.
    """
    return min(max(rows // 4, 256), 1_024)


def unpadded(name: str, tensor: Tensor) -> Tensor:
    """A parameter, or what an optimizer keeps of one, as a view without the rows that no token has."""
    return tensor[:VOCABULARY] if name == EMBEDDING and tensor.dim() else tensor


def linear(x: Tensor, weight_OC: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear`: x W^T + b, … O of … C; the other way round where a few texts are written on a processor."""
    rows = x.numel() // x.shape[-1]
    if torch.is_grad_enabled() or x.device.type != "cpu" or not FEW_ROWS.start <= rows < FEW_ROWS.stop:
        return F.linear(x, weight_OC, bias_O)
    x_NC = x.reshape(rows, -1)
    if rows == 1:
        x_NC = torch.cat([x_NC, x_NC])  # 16 GB of weights a second, 13 with one vector: 1.2 times the tokens
    y_NO = (weight_OC @ x_NC.T).T[:rows].contiguous()
    return (y_NO if bias_O is None else y_NO.add_(bias_O)).view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """A layer of `linear`."""

    def forward(self, x_BTC: Tensor) -> Tensor:
        """B T O."""
        return linear(x_BTC, self.weight, self.bias)


class KeyValues:
    """The keys and values of one block for up to S positions of B texts that grow together: none is made twice."""

    def __init__(self, config: ModelConfig, texts: int, positions: int, like: Tensor) -> None:
        shape_BHSD = (texts, config.heads, positions, config.width // config.heads)
        self.k_BHSD, self.v_BHSD = like.new_empty(shape_BHSD), like.new_empty(shape_BHSD)
        self.length = 0

    def extended(self, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all positions so far, these T among them. The first ones may be of one text that all begin with."""
        assert k_BHTD.shape[2] == 1 or self.length == 0
        end = self.length + k_BHTD.shape[2]
        self.k_BHSD[:, :, self.length : end], self.v_BHSD[:, :, self.length : end] = k_BHTD, v_BHTD
        if self.length:
            k_BHTD, v_BHTD = self.k_BHSD[:, :, :end], self.v_BHSD[:, :, :end]
        self.length = end
        return k_BHTD, v_BHTD


class CausalSelfAttention(nn.Module):
    """Every position looks at itself and what came before, or at what a mask leaves of that."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = dropout
        self.c_attn = Linear(config.width, 3 * config.width)
        self.c_proj = Linear(config.width, config.width)

    def forward(self, x_BTC: Tensor, mask_B1TT: Tensor | None = None, past: KeyValues | None = None) -> Tensor:
        """Mixed values, B T C. The mask is true where a position (the last but one axis) looks at another."""
        B, T, C = x_BTC.shape
        q_BHTD, k_BHTD, v_BHTD = self.c_attn(x_BTC).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        if past is not None:
            k_BHTD, v_BHTD = past.extended(k_BHTD, v_BHTD)
        causal = mask_B1TT is None and k_BHTD.shape[2] == T  # else one new position, which looks at all
        dropout = self.dropout if self.training else 0.0
        y_BHTD = F.scaled_dot_product_attention(
            q_BHTD, k_BHTD, v_BHTD, attn_mask=mask_B1TT, dropout_p=dropout, is_causal=causal
        )
        return F.dropout(self.c_proj(y_BHTD.transpose(1, 2).reshape(B, T, C)), self.dropout, self.training)


class MLP(nn.Module):
    """Four times as wide inside, with the tanh form of GELU."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.c_fc = Linear(config.width, 4 * config.width)
        self.c_proj = Linear(4 * config.width, config.width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """B T C again."""
        y_BTC: Tensor = self.c_proj(F.gelu(self.c_fc(x_BTC), approximate="tanh"))
        return F.dropout(y_BTC, self.dropout, self.training)


class Block(nn.Module):
    """Attention, then MLP, each on a normalised copy that is added to the stream."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = CausalSelfAttention(config, dropout)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config, dropout)

    def forward(self, x_BTC: Tensor, mask_B1TT: Tensor | None = None, past: KeyValues | None = None) -> Tensor:
        """The stream after this block, B T C."""
        mixed_BTC: Tensor = x_BTC + self.attn(self.ln_1(x_BTC), mask_B1TT, past)
        new_BTC: Tensor = mixed_BTC + self.mlp(self.ln_2(mixed_BTC))
        return new_BTC


class Transformer(nn.Module):
    """Embeddings, blocks and the last norm."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.wte = nn.Embedding(PADDED_VOCABULARY, config.width)
        self.wpe = nn.Embedding(config.context_tokens, config.width)
        self.h = nn.ModuleList(Block(config, dropout) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        mask_B1TT: Tensor | None = None,
        past: list[KeyValues] | None = None,
    ) -> Tensor:
        """The normalised stream, B T C; `past` holds what came before these tokens, a block each."""
        if positions_BT is None:
            first = past[0].length if past else 0
            positions_BT = torch.arange(first, first + tokens_BT.shape[1], device=tokens_BT.device)
        x_BTC = F.dropout(self.wte(tokens_BT) + self.wpe(positions_BT), self.dropout, self.training)
        for number, block in enumerate(self.h):
            x_BTC = block(x_BTC, mask_B1TT, past[number] if past else None)
        normal_BTC: Tensor = self.ln_f(x_BTC)
        return normal_BTC


class GPT(nn.Module):
    """The language model. Its head is the token embedding itself, so it has no weights of its own."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, dropout)
        # Added to the logits: the softmax sees no row that is no token, and such a row's gradient is exactly 0.
        padding_V = torch.zeros(PADDED_VOCABULARY)
        padding_V[VOCABULARY:] = -math.inf
        self.register_buffer("padding_V", padding_V, persistent=False)
        self.padding_V: Tensor
        nn.init.zeros_(self.transformer.wte.weight)
        for name, padded in self.named_parameters():
            weight = unpadded(name, padded)
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif ".ln_" not in name:
                # GPT-2's initialisation; the 2 L projections that add to the stream are scaled so that their sum is not
                scale = 1 / math.sqrt(2 * config.layers) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(weight, std=0.02 * scale)

    @property
    def head_VC(self) -> Tensor:
        """The tied head: the token embedding, padded."""
        return self.transformer.wte.weight

    @property
    def parameter_count(self) -> int:
        """Numbers that are learnt: 124,439,808 of the 124M model, its padding not counted."""
        return sum(unpadded(name, weight).numel() for name, weight in self.named_parameters())

    def hidden(self, tokens_BT: Tensor, **laid: Any) -> Tensor:
        """The normalised stream before the head, B T C; `laid` is what else `Transformer` may be told."""
        stream_BTC: Tensor = self.transformer(tokens_BT, **laid)
        return stream_BTC

    def no_past(self, texts: int, positions: int) -> list[KeyValues]:
        """What is grown by `hidden` while so many texts are written, of so many tokens each: 74 kB a token at 124M."""
        return [KeyValues(self.config, texts, positions, self.head_VC) for _ in range(self.config.layers)]

    def logits(self, x_BTC: Tensor) -> Tensor:
        """Scores of the next token, … V."""
        return linear(x_BTC, unpadded(EMBEDDING, self.head_VC))

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The summed cross-entropy of the targets, in nats."""
        x_NC = self.hidden(tokens_BT).flatten(0, 1)
        # Chunks where they were measured to help; on CUDA whole logits, which torch.compile fuses with the loss.
        chunked = self.training and x_NC.device.type == "cpu"
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_rows(len(x_NC))) if chunked else None
        return F.linear_cross_entropy(
            x_NC, self.head_VC, targets_BT.flatten(), linear_bias=self.padding_V, reduction="sum", options=options
        )
