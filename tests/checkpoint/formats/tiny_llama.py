"""A Llama as transformers saves it, with a tokenizer beside it, and what transformers makes of it."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tokens"))
from llama_tokenizers import train_like_llama

from megachameleon.tokens.text.llama_importing import import_llama_tokenizer

GRID = (2, 4)
CODES = 16


def save_llama(folder, *, seed=0, dtype=torch.float32, tokenizer=None, **settings):
    """Drawn weights at the scale of trained ones; the heads of queries and keys have scales of their own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "vocab_size": 500,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**config, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.rand_like(parameter) + 0.5)
                continue
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                heads = parameter.unflatten(0, (-1, model.config.head_dim))
                heads *= torch.rand(len(heads), 1, 1) * 2 + 0.5
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tokenizer or train_like_llama())
    return folder


def import_tokenizer(llama, folder):
    """Our text tokenizer of its tokenizer."""
    return import_llama_tokenizer(llama / "tokenizer.model", folder, num_image_codes=CODES, image_grid=GRID)


def llama_logits(folder, tokens):
    """fp32 [b, s, Llama's ids]."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits
