"""One set of weights as plain tensors, and our decoder filled with it without any converter.

Heads stand apart: `q` is [heads, head_dim, hidden], `k` and `v` are [key/value heads, head_dim, hidden], `o` is
[hidden, heads, head_dim], QK-norm vectors are [groups, head_dim]. Everything else has the shape of the formula.
"""

import torch
from cases import parallel_context

from megachameleon.config import load_config
from megachameleon.parallel.seeding import seed_step

WIDE = ["model.vocab_size=96", "model.hidden_size=128", "model.ffn_hidden_size=160", "model.num_layers=3"]
CASES = {
    "pre-norm, 1 group": [*WIDE, "model.num_attention_heads=8", "model.num_query_groups=8"],
    "swin, 4 groups": [
        *(*WIDE, "model.norm_order=swin"),
        *("model.num_attention_heads=16", "model.num_query_groups=8", "model.qk_norm_groups=4"),
    ],
}


def draw(model, seed=0):
    """Random weights, none of them one or zero.

    Embeddings, queries and keys are so small that eps counts in the first block and in every QK-norm.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, mean=0.0, std):
        return mean + std * torch.randn(shape, generator=generator)

    hidden, width, inner = model.hidden_size, model.head_dim, model.ffn_hidden_size
    weights = {
        "embedding": normal(model.vocab_size, hidden, std=0.01),
        "head": normal(model.vocab_size, hidden, std=0.7 * hidden**-0.5),
        "final_norm": normal(hidden, mean=1.0, std=0.3),
    }
    for i in range(model.num_layers):
        weights |= {
            f"{i}.q": normal(model.num_attention_heads, width, hidden, std=0.01 * hidden**-0.5),
            f"{i}.k": normal(model.num_query_groups, width, hidden, std=0.01 * hidden**-0.5),
            f"{i}.v": normal(model.num_query_groups, width, hidden, std=hidden**-0.5),
            f"{i}.o": normal(hidden, model.num_attention_heads, width, std=hidden**-0.5),
            f"{i}.gate": normal(inner, hidden, std=hidden**-0.5),
            f"{i}.up": normal(inner, hidden, std=hidden**-0.5),
            f"{i}.down": normal(hidden, inner, std=inner**-0.5),
            f"{i}.attention_norm": normal(hidden, mean=1.0, std=0.3),
            f"{i}.ffn_norm": normal(hidden, mean=1.0, std=0.3),
        }
        for name in ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"):
            weights[f"{i}.{name}"] = normal(model.qk_norm_groups, width, mean=float("weight" in name), std=0.5)
    return weights


def draw_tokens(model, rows=2, length=24):
    return torch.randint(0, model.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def decoder_state(weights, model, rank=0, of=1):
    """The weights under our decoder's names: what tensor-parallel rank `rank` of `of` holds."""

    def mine(name, dim=0):
        return weights[name].chunk(of, dim)[rank]

    swin = model.norm_order == "swin"
    attention_norm, ffn_norm = (
        ("self_attn_bda.norm", "mlp_bda.norm") if swin else ("input_layernorm", "pre_mlp_layernorm")
    )
    state = {
        "embedding.word_embeddings.weight": mine("embedding"),
        "output_layer.weight": mine("head"),
        "decoder.final_layernorm.weight": weights["final_norm"],
    }
    for i in range(model.num_layers):
        groups = mine(f"{i}.k").size(0)
        queries = mine(f"{i}.q").unflatten(0, (groups, -1)).flatten(1, 2)
        layer = {
            # Queries of a group, its key and its value stand together.
            "self_attention.linear_qkv.weight": torch.cat((queries, mine(f"{i}.k"), mine(f"{i}.v")), 1).flatten(0, 1),
            "self_attention.linear_proj.weight": mine(f"{i}.o", dim=1).flatten(1),
            "mlp.linear_fc1.weight": torch.cat((mine(f"{i}.gate"), mine(f"{i}.up"))),
            "mlp.linear_fc2.weight": mine(f"{i}.down", dim=1),
            f"{attention_norm}.weight": weights[f"{i}.attention_norm"],
            f"{ffn_norm}.weight": weights[f"{i}.ffn_norm"],
        }
        for which in "qk":
            for kind in ("weight", "bias"):
                layer[f"self_attention.{which}_layernorm.{kind}"] = weights[f"{i}.{which}_norm.{kind}"].flatten()
        state |= {f"decoder.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    return state


def huggingface_state(weights, model):
    """The weights under transformers' names."""
    state = {
        "model.embed_tokens.weight": weights["embedding"],
        "lm_head.weight": weights["head"],
        "model.norm.weight": weights["final_norm"],
    }
    for i in range(model.num_layers):
        layer = {
            "self_attn.q_proj.weight": weights[f"{i}.q"].flatten(0, 1),
            "self_attn.k_proj.weight": weights[f"{i}.k"].flatten(0, 1),
            "self_attn.v_proj.weight": weights[f"{i}.v"].flatten(0, 1),
            "self_attn.o_proj.weight": weights[f"{i}.o"].flatten(1),
            "mlp.gate_proj.weight": weights[f"{i}.gate"],
            "mlp.up_proj.weight": weights[f"{i}.up"],
            "mlp.down_proj.weight": weights[f"{i}.down"],
            "input_layernorm.weight": weights[f"{i}.attention_norm"],
            "post_attention_layernorm.weight": weights[f"{i}.ffn_norm"],
        }
        for which, heads in (("q", model.num_attention_heads), ("k", model.num_query_groups)):
            for kind in ("weight", "bias"):  # a row for each head; the heads of a group have equal rows
                rows = weights[f"{i}.{which}_norm.{kind}"].repeat_interleave(heads // model.qk_norm_groups, dim=0)
                layer[f"self_attn.{which}_norm.{kind}"] = rows
        state |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    return state


def build_filled(config, context, weights):
    """Our decoder in fp32 with these weights; every parameter is overwritten."""
    from megachameleon.model.decoder import build_decoder
    from megachameleon.model.kernels.table import choose_kernels

    kernels = choose_kernels(config.kernels)
    decoder = build_decoder(config.model, config.parallel, kernels, context.groups, dtype=torch.float32, seed=None)
    state = decoder_state(weights, config.model, context.tensor_rank, config.parallel.tensor_parallel)
    parameters = dict(decoder.named_parameters())
    assert parameters.keys() == state.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            assert parameter.shape == state[name].shape, name
            parameter.copy_(state[name])
    return decoder.eval()


def decoder_logits(decoder, tokens):
    """[b, s] to [b, s, vocabulary of this rank]."""
    return decoder(tokens, torch.arange(tokens.size(1)).expand_as(tokens), None)


def run_decoder(overrides, weights):
    """In as many processes as the layout needs: this rank's logits."""
    config = load_config("debug", overrides)
    with parallel_context(config.parallel) as context, torch.no_grad():
        seed_step(0, 0, context)  # sequence parallelism forks a generator, dropout or not
        decoder = build_filled(config, context, weights)
        return decoder_logits(decoder, draw_tokens(config.model))
