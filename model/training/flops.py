"""Model FLOPs utilisation (MFU): the share of a GPU's peak that training uses, as in PaLM, appendix B."""

from model.config import ModelConfig
from model.tokenizer import VOCABULARY

# Dense bf16 FLOP/s without sparsity, from NVIDIA's and AMD's data sheets; the longest matching name counts.
PEAK_FLOPS = {
    "A10": 125e12, "A10G": 70e12, "A30": 165e12, "A40": 149.7e12, "A100": 312e12, "A6000": 154.8e12,
    "L4": 121e12, "L40": 181e12, "L40S": 362e12, "RTX 3090": 71.2e12, "RTX 4090": 165.2e12, "RTX 5090": 209.5e12,
    "RTX 6000 Ada": 364.2e12, "H100": 989.4e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200": 989.4e12,
    "GH200": 989.4e12, "B200": 2_250e12, "MI250X": 383e12, "MI300X": 1_307.4e12,
}  # fmt: skip


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the model: 124,439,808 for GPT-2 124M. The head shares the token embedding."""
    of_block = 12 * config.width**2 + 13 * config.width
    return (VOCABULARY + config.context_tokens + 2) * config.width + config.layers * of_block


def flops_per_token(config: ModelConfig, sequence_tokens: int) -> int:
    """FLOPs of one training step per token: 6 per weight in a matrix product, and 12 L C T for attention."""
    multiplying = parameter_count(config) - config.context_tokens * config.width  # without the position embedding
    return 6 * multiplying + 12 * config.layers * config.width * sequence_tokens


def peak_flops(device_name: str) -> float | None:
    """The peak bf16 FLOP/s of a GPU by its name, or None if unknown. Laptop GPUs have other limits."""
    padded_name = f" {device_name.replace('-', ' ')} "
    known = [name for name in PEAK_FLOPS if f" {name} " in padded_name and "Laptop" not in padded_name]
    return PEAK_FLOPS[max(known, key=len)] if known else None
