"""Meta's layout of a checkpoint, written and read by the facts about it alone; nothing of the converter is used.

The weights are those of `plain_weights.draw`, taken to be in Meta's order of dimensions (rotated pairs are neighbours).
`read_meta(write_meta(...))` gives them back, and `meta_oracle.meta_logits` computes with either.
"""

import hashlib
import json
from dataclasses import asdict

import torch

AXES = {"embedding": 1, "head": 0, "q": 0, "k": 0, "v": 0, "o": 1, "gate": 0, "up": 0, "down": 1}
"""Along which axis a matrix is divided among shards; vectors of norms are in every shard."""
NAMES = {"embedding": "tok_embeddings.weight", "head": "output.weight", "final_norm": "norm.weight"}
IN_A_LAYER = {
    **{name: f"attention.w{name}.weight" for name in "qkvo"},
    **{"gate": "feed_forward.w1.weight", "down": "feed_forward.w2.weight", "up": "feed_forward.w3.weight"},
    **{"attention_norm": "attention_norm.weight", "ffn_norm": "ffn_norm.weight"},
    **{f"{n}_norm.{kind}": f"attention.{n}_normalization.{kind}" for n in "qk" for kind in ("weight", "bias")},
}


def write_meta(folder, model, weights, *, shards, vocabulary, dtype=torch.float32, rope="buffer"):
    """Write a checkpoint of Meta's layout.

    Args:
        shards: files of the model, a multiple of the weights' groups of QK-norm.
        vocabulary: of ours, written beside it as our own exports do; None: the release's ids.
        rope: what stands for `rope.freqs`: "buffer", None (a tensor-less entry, as others have written), or "absent".
    """
    folder.mkdir(parents=True)
    write_params(folder, model, shards)
    names = ["consolidated.pth"] if shards == 1 else [f"consolidated.{rank:02}.pth" for rank in range(shards)]
    for rank, name in enumerate(names):
        state = meta_state(model, weights, rank, shards, dtype)
        if rope != "absent":
            state["rope.freqs"] = rope and model.rope_theta ** (-torch.arange(0, model.head_dim, 2) / model.head_dim)
        torch.save(state, folder / name)
    write_checklist(folder, ["params.json", "consolidate_params.json", *names])
    if vocabulary is not None:
        (folder / "megachameleon.json").write_text(json.dumps({"vocabulary": asdict(vocabulary)}))
    return folder


def meta_state(model, weights, rank, shards, dtype):
    """What the file of one model-parallel rank holds, under Meta's names."""
    state = {}
    for name, weight in weights.items():
        layer, _, rest = name.partition(".") if name[0].isdigit() else ("", "", name)
        if rest in AXES:
            mine = weight.chunk(shards, AXES[rest])[rank]
            mine = mine.flatten(1) if rest == "o" else mine.flatten(0, -2)  # heads stand below, of `wo` beside, another
        elif rest[:7] in ("q_norm.", "k_norm."):
            assert shards % len(weight) == 0, "a shard has one QK-norm for all its heads"
            mine = weight[rank * len(weight) // shards]
        else:
            mine = weight
        stored = f"layers.{layer}.{IN_A_LAYER[rest]}" if layer else NAMES[rest]
        state[stored] = mine.to(dtype, copy=True).contiguous()
    return state


def write_params(folder, model, shards):
    """What says the shape of the model; Meta's rule computes the hidden size of the FFN from `dim`."""
    inner = int(2 * 4 * model.hidden_size / 3)
    factor = None if inner <= model.ffn_hidden_size else (model.ffn_hidden_size - 0.5) / inner
    shape = {
        "dim": model.hidden_size,
        "n_layers": model.num_layers,
        "n_heads": model.num_attention_heads,
        "vocab_size": model.vocab_size,
        "ffn_dim_multiplier": factor,
        "multiple_of": model.ffn_hidden_size,
        "norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "qk_normalization": True,
        "swin_norm": model.norm_order == "swin",
    }
    if model.num_query_groups != model.num_attention_heads:
        shape["n_kv_heads"] = model.num_query_groups
    (folder / "params.json").write_text(json.dumps({"seed": 1, "model": shape}))
    kept = {"dtype": "bf16", "model_parallel_size": shards, "on_gpu": True, "tokenizer_path": None}
    (folder / "consolidate_params.json").write_text(json.dumps(kept))


def write_checklist(folder, names):
    """Lines of MD5 and name, as `md5sum` prints them."""
    lines = [f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "checklist.chk").write_text("".join(lines))


def read_shards(folder):
    """The tensors of every file, in order of ranks."""
    single = folder / "consolidated.pth"
    paths = [single] if single.exists() else sorted(folder.glob("consolidated.*.pth"))
    return [torch.load(path, weights_only=True) for path in paths]


def read_meta(folder, model):
    """The weights as `plain_weights.draw` has them, with as many groups of QK-norm as there are files, in fp32."""
    shards, width = read_shards(folder), model.head_dim
    expected = {*NAMES.values(), "rope.freqs"}
    expected |= {f"layers.{i}.{name}" for i in range(model.num_layers) for name in IN_A_LAYER.values()}
    assert all(shard.keys() == expected for shard in shards)
    weights = {}
    for prefix, names in [("", NAMES), *((f"{i}.", IN_A_LAYER) for i in range(model.num_layers))]:
        for rest, stored in names.items():
            key = f"layers.{prefix}{stored}" if prefix else stored
            parts = [shard[key].float() for shard in shards]
            if rest in AXES:
                whole = torch.cat(parts, AXES[rest])
                axis = {"q": 0, "k": 0, "v": 0, "o": 1}.get(rest)
                weights[prefix + rest] = whole if axis is None else whole.unflatten(axis, (-1, width))
            elif rest[:7] in ("q_norm.", "k_norm."):
                weights[prefix + rest] = torch.stack(parts)
            else:
                assert all(torch.equal(part, parts[0]) for part in parts), f"{key} differs between shards"
                weights[prefix + rest] = parts[0]
    return weights
