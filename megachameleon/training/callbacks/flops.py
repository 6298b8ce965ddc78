"""What a token costs, and what a device could do: the two sides of model FLOPs utilisation (MFU)."""

import torch

from megachameleon.config import ModelConfig

PEAK_TFLOPS = {
    "A100": 312,
    "A800": 312,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H800": 989,
    "H200": 989,
    "H20": 148,
    "GB200": 2500,
    "B200": 2250,
}
"""Dense bf16, 1e12 FLOP/s, from NVIDIA's data sheets. The first name that is part of the device's counts."""


# Not the planner's formula, for planning imports training; a test holds the two equal.
def flops_per_token(model: ModelConfig, sequence_length: int) -> tuple[float, float]:
    """FLOPs of a token, forward and backward, nothing computed twice: with the visible half of attention, with all.

    6 for each matrix parameter, the head among them, and 12 x layers x sequence length x width of all heads for whole
    attention; the embedding is a look-up. The first is what NeMo and Megatron-Bridge count, the second what
    Korthikanti et al. (arXiv 2205.05198, appendix A) do. Documents that do not see each other cost less than either.
    """
    width = model.num_attention_heads * model.head_dim
    keys_and_values = 2 * model.num_query_groups * model.head_dim
    block = model.hidden_size * (2 * width + keys_and_values + 3 * model.ffn_hidden_size)
    matrices = 6.0 * (model.num_layers * block + model.vocab_size * model.hidden_size)
    attention = 12.0 * model.num_layers * sequence_length * width
    return matrices + attention / 2, matrices + attention


def peak_flops(device: torch.device, tflops: float) -> float | None:
    """FLOP/s of one device: as configured, or else by its name; None where nobody knows."""
    if tflops:
        return tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)
