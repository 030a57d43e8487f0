"""GPT-2: pre-norm transformer blocks between an embedding and a tied head. Independent of files and ranks.

    token ids ─▶ token + position embedding ─▶ L x (attention ─▶ MLP) ─▶ layer norm ─▶ head ─▶ V logits

Parameters have the names of the published weights (transformer.wte, h.0.attn.c_attn, …), which load unchanged.
Shapes: B batch, T time, C channels (width), H heads, D channels of a head, V vocabulary, N rows (B*T), S cache size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.tokenizer import VOCABULARY

PADDED_VOCABULARY = 50_304  # 50,257 rounded up to a multiple of 128, which GPUs multiply faster
EMBEDDING = "transformer.wte.weight"


class KeyValues:
    """The key-value cache of one block: keys and values of the earlier tokens of B texts, up to S positions each."""

    def __init__(self, config: ModelConfig, texts: int, positions: int, like: Tensor) -> None:
        self._kv_2BHSD = like.new_empty(2, texts, config.heads, positions, config.width // config.heads)
        self.length = 0

    def append(self, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, ...]:
        """Add new positions; return the keys and values of all so far. The first call may pass B = 1 for all texts."""
        assert k_BHTD.shape[2] == 1 or self.length == 0
        start, self.length = self.length, self.length + k_BHTD.shape[2]
        self._kv_2BHSD[:, :, :, start : self.length] = torch.stack((k_BHTD, v_BHTD))
        return self._kv_2BHSD[:, :, :, : self.length].unbind() if start else (k_BHTD, v_BHTD)


class CausalSelfAttention(nn.Module):
    """Lets each position read from itself and the positions before it.

    A position has a query (what it looks for), a key (what it offers) and a value (what it passes on).
    The softmax of query * key / sqrt(D) over the earlier positions weights their values.
    H heads do this side by side, each on D of the C channels.
    """

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, dropout
        self.c_attn = nn.Linear(config.width, 3 * config.width)
        self.c_proj = nn.Linear(config.width, config.width)

    def forward(self, x_BTC: Tensor, mask_B1TT: Tensor | None = None, past: KeyValues | None = None) -> Tensor:
        """The mixed values, B T C. A mask is true where a query (second last axis) may read a key (last axis)."""
        B, T, C = x_BTC.shape
        q_BHTD, k_BHTD, v_BHTD = self.c_attn(x_BTC).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        if past is not None:
            k_BHTD, v_BHTD = past.append(k_BHTD, v_BHTD)
        causal = mask_B1TT is None and k_BHTD.shape[2] == T  # a single new token reads all of its past
        dropout = self.dropout if self.training else 0.0
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, mask_B1TT, dropout, is_causal=causal)
        y_BTC = y_BHTD.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y_BTC), self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers, four times as wide inside, with the tanh approximation of GELU between them."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.c_fc = nn.Linear(config.width, 4 * config.width)
        self.c_proj = nn.Linear(4 * config.width, config.width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x_BTC), approximate="tanh")), self.dropout, self.training)


class Block(nn.Module):
    """Attention, then MLP. Each reads a normalised copy of the residual stream and adds its result to the stream."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = CausalSelfAttention(config, dropout)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config, dropout)

    def forward(self, x_BTC: Tensor, mask_B1TT: Tensor | None = None, past: KeyValues | None = None) -> Tensor:
        x_BTC = x_BTC + self.attn(self.ln_1(x_BTC), mask_B1TT, past)
        after_BTC: Tensor = x_BTC + self.mlp(self.ln_2(x_BTC))
        return after_BTC


class Transformer(nn.Module):
    """Token and position embeddings, the blocks, and the final layer norm."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.wte = nn.Embedding(PADDED_VOCABULARY, config.width)
        self.wpe = nn.Embedding(config.context_tokens, config.width)
        self.h = nn.ModuleList(Block(config, dropout) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)

    def forward(
        self, tokens_BT: Tensor, positions_BT: Tensor | None = None, mask_B1TT: Tensor | None = None,
        past: list[KeyValues] | None = None,
    ) -> Tensor:  # fmt: skip
        """The normalised stream, B T C. `past` holds a cache per block, to which these tokens are added."""
        if positions_BT is None:
            first = past[0].length if past else 0
            positions_BT = torch.arange(first, first + tokens_BT.shape[1], device=tokens_BT.device)
        x_BTC = F.dropout(self.wte(tokens_BT) + self.wpe(positions_BT), self.dropout, self.training)
        for index, block in enumerate(self.h):
            x_BTC = block(x_BTC, mask_B1TT, past[index] if past else None)
        normalised_BTC: Tensor = self.ln_f(x_BTC)
        return normalised_BTC


class GPT(nn.Module):
    """The language model: token ids in, the loss of the next tokens out.

    The head is tied: the logit of a token is the dot product of the stream with that token's embedding.
    One matrix therefore serves as input and output: 38.6M of the 124.4M parameters.
    The matrix has 47 padding rows, which belong to no token and stay 0: their logits are -inf, so they get no gradient.
    """

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, dropout)
        padding_V = torch.zeros(PADDED_VOCABULARY)
        padding_V[VOCABULARY:] = -math.inf
        self.padding_V = nn.Buffer(padding_V, persistent=False)  # added to the logits
        # GPT-2's initial weights: the 2 L projections into the stream are smaller, because their results add up
        nn.init.zeros_(self.transformer.wte.weight)
        for name, padded in self.named_parameters():
            weight = unpadded(name, padded)
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(weight, std=0.02 * (1 / math.sqrt(2 * config.layers)))
            elif ".ln_" not in name:
                nn.init.normal_(weight, std=0.02)

    @property
    def head_VC(self) -> Tensor:
        """The tied head: the token embedding, padding included."""
        return self.transformer.wte.weight

    def logits(self, x_BTC: Tensor) -> Tensor:
        """The next token's logits, … V without padding, from the transformer's output."""
        return F.linear(x_BTC, unpadded(EMBEDDING, self.head_VC))

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The cross-entropy of the targets, summed, in nats."""
        x_NC = self.transformer(tokens_BT).flatten(0, 1)
        in_chunks = self.training and x_NC.device.type == "cpu"  # on CUDA torch.compile fuses the logits with the loss
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_rows(len(x_NC))) if in_chunks else None
        return F.linear_cross_entropy(
            x_NC, self.head_VC, targets_BT.flatten(), linear_bias=self.padding_V, reduction="sum", options=options
        )

    def no_past(self, texts: int, positions: int) -> list[KeyValues]:
        """Empty caches for `texts` texts of up to `positions` tokens: 74 kB per token for the 124M model."""
        return [KeyValues(self.config, texts, positions, self.head_VC) for _ in range(self.config.layers)]


def unpadded(name: str, tensor: Tensor) -> Tensor:
    """A view of a parameter, or of its optimizer state, without padding rows."""
    return tensor[:VOCABULARY] if name == EMBEDDING and tensor.dim() else tensor


def chunk_rows(rows: int) -> int:
    """Rows of logits to compute at once on a CPU. The logits of 1,024 rows take 206 MB.

    On 2 cores, 256 to 1,024 rows were 1.05 to 1.15 times as fast as all rows; torch's "auto" was 2 to 6 times slower.
    """
    return min(max(rows // 4, 256), 1_024)
