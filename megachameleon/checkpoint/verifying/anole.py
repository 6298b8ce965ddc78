"""The other side for checkpoints of anole's fork: Hugging Face's names, Meta's order of rows and Meta's formula.

transformers does not load them. The fork computes what Meta's formula does with one rank: it permutes queries and keys
behind their norms, when it runs.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megachameleon.checkpoint.verifying.huggingface import StoredFiles
from megachameleon.checkpoint.verifying.meta import Formula, run_formula
from megachameleon.checkpoint.verifying.streaming import Advance, Trace
from megachameleon.files import read_json

NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "layers": "model.layers",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_normalization": "self_attn.q_norm",
    "attention.k_normalization": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def is_anole(folder: Path) -> bool:
    """Whether a Hugging Face folder holds one vector of QK-norm for all heads, as the fork writes it."""
    files, name = StoredFiles(folder), "model.layers.0.self_attn.q_norm.weight"
    return name in files and files.read(name).dim() == 1


def anole_trace(folder: Path, tokens: Tensor, rounding: torch.dtype, advance: Advance) -> Trace:
    """What such a checkpoint computes, on the CPU, in fp32, from token ids [b, s].

    Raises:
        ValueError: tensors are missing or damaged.
    """
    settings = read_json(folder / "config.json")
    formula = Formula(
        layers=settings["num_hidden_layers"],
        query_heads=settings["num_attention_heads"],
        key_heads=settings.get("num_key_value_heads") or settings["num_attention_heads"],
        eps=settings.get("rms_norm_eps", 1e-5),
        theta=(settings.get("rope_parameters") or settings).get("rope_theta", 10_000.0),
        qk_norm=True,
        swin=settings.get("swin_norm", False),
    )
    return run_formula(formula, [partial(_read, StoredFiles(folder), rounding)], tokens, advance)


def _read(files: StoredFiles, rounding: torch.dtype, name: str) -> Tensor:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("layers."):
        _, number, rest = stem.split(".", 2)
        stored = f"{NAMES['layers']}.{number}.{NAMES[rest]}"
    else:
        stored = NAMES[stem]
    return files.read(f"{stored}.{kind}").to(rounding).float()
