"""Hugging Face's layout and what others have made of it, written by the facts alone; nothing of the converter is used.

The weights are those of `plain_weights.draw`, taken to be in Meta's order of dimensions, as in `meta_writer`; here they
are put into the order of transformers.
"""

import json
from dataclasses import asdict

import torch
from meta_oracle import NORMS, ROWS, halves_apart
from plain_weights import huggingface_state
from safetensors.torch import load_file, save_file


def write_huggingface(folder, model, weights, *, vocabulary, dtype=torch.float32, files=1, variant="transformers"):
    """Write a checkpoint of Hugging Face's layout.

    Args:
        vocabulary: what the ids mean, written beside it as our own exports do too.
        files: how many, dealt out in turn, with an index if more than one.
        variant: `transformers` (a QK-norm for each head), `lumina` (for each group), `anole` (one, Meta's order).
    """
    folder.mkdir(parents=True)
    state = variant_state(model, weights, variant)
    state = {name: tensor.to(dtype, copy=True).contiguous() for name, tensor in state.items()}
    names = ["model.safetensors"]
    if files > 1:
        names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
        places = {name: names[i % files] for i, name in enumerate(state)}
        index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for i, name in enumerate(names):
        mine = {key: tensor for j, (key, tensor) in enumerate(state.items()) if j % files == i}
        save_file(mine, folder / name, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings(model, vocabulary, dtype)))
    (folder / "megachameleon.json").write_text(json.dumps({"vocabulary": asdict(vocabulary)}))
    return folder


def variant_state(model, weights, variant):
    """Tensors under transformers' names, as a variant has them."""
    if variant == "anole":  # not permuted, and a single vector in each QK-norm
        assert model.qk_norm_groups == 1
        state = huggingface_state(weights, model)
        return {name: rows[0] if is_qk_norm(name) else rows for name, rows in state.items()}
    state = huggingface_state(halves_apart(weights, *ROWS, *NORMS), model)
    if variant == "lumina":
        groups = model.qk_norm_groups
        state = {name: t[:: len(t) // groups] if is_qk_norm(name) else t for name, t in state.items()}
    return state


def is_qk_norm(name):
    return ".q_norm." in name or ".k_norm." in name


def settings(model, vocabulary, dtype):
    """config.json of the model, with the names of its picture codes."""
    codes = range(vocabulary.num_image_codes)
    names = {
        f"IMGIMG{''.join(chr(ord('A') + int(d)) for d in str(c))}Z": vocabulary.image_code_start + c for c in codes
    }
    names |= {"<s>": vocabulary.bos, "<pad>": vocabulary.pad, "</s>": vocabulary.eos, "<unk>": vocabulary.unk}
    names |= {"<racm3:break>": vocabulary.begin_image, "<eoss>": vocabulary.end_image, "<image>": vocabulary.size - 1}
    return {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "hidden_act": "silu",
        "max_position_embeddings": model.context_length,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "model_parallel_size": model.qk_norm_groups,
        "swin_norm": model.norm_order == "swin",
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "dtype": str(dtype).removeprefix("torch."),
        "vocabulary_map": names,
        "vq_config": {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "resolution": 32,
                      "embed_dim": 8, "latent_channels": 8, "num_embeddings": vocabulary.num_image_codes},
    }  # fmt: skip


def read_huggingface(folder, model):
    """The weights of a folder in fp32 as `meta_writer.read_meta` gives them: Meta's order, a QK-norm for each group."""
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= {name: t.float() for name, t in load_file(path).items() if ".vqmodel." not in name}
    width = model.head_dim
    names = huggingface_names(model.num_layers)
    assert state.keys() == set(names.values())
    weights = {}
    for name, stored in names.items():
        value, rest = state[stored], name.split(".", 1)[-1]
        if rest in ("q", "k", "v"):
            value = value.unflatten(0, (-1, width))
        elif rest == "o":
            value = value.unflatten(1, (-1, width))
        elif is_qk_norm(stored):
            by_group = value.unflatten(0, (model.qk_norm_groups, -1))
            assert torch.equal(by_group, by_group[:, :1].expand_as(by_group)), f"{stored} differs within a group"
            value = by_group[:, 0]
        weights[name] = neighbours(value) if name.endswith((*ROWS, *NORMS)) and rest[0] in "qk" else value
    return weights


def huggingface_names(layers):
    """Names of `plain_weights.draw` to transformers'."""
    inside = {
        **{name: f"self_attn.{name}_proj.weight" for name in "qkvo"},
        **{name: f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
        **{"attention_norm": "input_layernorm.weight", "ffn_norm": "post_attention_layernorm.weight"},
        **{f"{n}_norm.{kind}": f"self_attn.{n}_norm.{kind}" for n in "qk" for kind in ("weight", "bias")},
    }
    names = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
    return names | {f"{i}.{n}": f"model.layers.{i}.{stored}" for i in range(layers) for n, stored in inside.items()}


def neighbours(rows):
    """Dimensions (axis 1) whose halves rotate, reordered so that neighbours do: the inverse of `halves_apart`."""
    return torch.stack(rows.chunk(2, 1), 2).flatten(1, 2)
