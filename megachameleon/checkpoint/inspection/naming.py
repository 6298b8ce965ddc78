"""Which layer and which part of a model a tensor belongs to, by its name in any format."""

import re

from megachameleon.checkpoint.formats.huggingface.names import PICTURES

IN_LAYERS = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d{1,6})\.(.+)$")
STACKED = re.compile(r"^(.*decoder\.layers)\.(.+)@(\d{1,6})(?:,\d+)*$")
PARTS = ("embedding", "attention", "QK-norm", "feed-forward", "norms", "head", "picture encoder", "other")
"""Of a decoder, in the order in which they are told."""
PLAIN = {
    **{"embedding": "embedding", "head": "head", "final_norm": "norms", "attention_norm": "norms", "ffn_norm": "norms"},
    **dict.fromkeys("qkvo", "attention"),
    **dict.fromkeys(("gate", "up", "down"), "feed-forward"),
    **dict.fromkeys(("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"), "QK-norm"),
}
PATTERNS = (
    (re.compile(r"vqmodel|vqgan|quant_conv|quantize\."), "picture encoder"),
    (re.compile(r"[qk]_?(norm|normalization|layernorm)\b"), "QK-norm"),
    (re.compile(r"norm|ln_|bda"), "norms"),
    (re.compile(r"embed|wte|wpe"), "embedding"),
    (re.compile(r"lm_head|output_layer|^output\."), "head"),
    (re.compile(r"attn|attention"), "attention"),
    (re.compile(r"mlp|feed_forward|ffn"), "feed-forward"),
)
"""For names of files; the first that fits."""


def layer_and_kind(name: str) -> tuple[int | None, str]:
    """The layer (None: none) and what the tensor is there, such as `(3, "q")`."""
    if name.startswith(PICTURES):
        return None, name
    if stacked := STACKED.match(name):
        return int(stacked[3]), stacked[2].removesuffix(".weight")
    found = IN_LAYERS.search(name)
    return (int(found[1]), found[2].removesuffix(".weight")) if found else (None, name.partition("@")[0])


def part_of(name: str) -> str:
    """One of `PARTS`."""
    _, kind = layer_and_kind(name)
    for candidate in (kind, f"{kind}.weight"):  # QK-norm has a weight and a bias, so there the ending counts
        if candidate in PLAIN:
            return PLAIN[candidate]
    return next((part for pattern, part in PATTERNS if pattern.search(name)), "other")
