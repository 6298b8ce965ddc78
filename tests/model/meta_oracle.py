"""The mathematics of Meta's released checkpoints, written out in plain torch: an oracle.

Their rotary embedding turns neighbouring dimensions of a head (0 and 1, 2 and 3, ...), ours and transformers' turns
dimensions half a head apart. Weights therefore change places on the way to ours: the rows of queries and keys, and the
vectors of their norms too, since those come before the rotation.
"""

from functools import partial

import torch
import torch.nn.functional as F

ROWS = (".q", ".k")
NORMS = ("_norm.weight", "_norm.bias")


def meta_logits(model, weights, tokens):
    """[b, s] to [b, s, vocabulary]; `weights` in the released order of dimensions."""

    def norm(x, weight):
        return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    x = weights["embedding"][tokens]
    for i in range(model.num_layers):
        layer = {name.removeprefix(f"{i}."): w for name, w in weights.items() if name.startswith(f"{i}.")}
        attention = partial(meta_attention, model.rope_theta)
        for sublayer, scale in ((attention, layer["attention_norm"]), (meta_ffn, layer["ffn_norm"])):
            if model.norm_order == "swin":
                x = x + norm(sublayer(layer, x), scale)
            else:
                x = x + sublayer(layer, norm(x, scale))
    return norm(x, weights["final_norm"]) @ weights["head"].T


def meta_attention(theta, layer, x):
    """Each model-parallel rank, here a QK-norm group, has its own heads and norms; their outputs are summed."""
    ranks = layer["q_norm.weight"].size(0)
    total = torch.zeros_like(x)
    for rank in range(ranks):
        q, k, v = (torch.einsum("bsi,hdi->bhsd", x, layer[n].chunk(ranks)[rank]) for n in "qkv")
        width = q.size(-1)
        q, k = (
            rotate_neighbours(
                F.layer_norm(t, (width,), layer[f"{n}_norm.weight"][rank], layer[f"{n}_norm.bias"][rank], 1e-5),
                theta,
            )
            for t, n in ((q, "q"), (k, "k"))
        )
        for head, query in enumerate(q.unbind(1)):
            shared = head * k.size(1) // q.size(1)
            scores = query @ k[:, shared].transpose(-1, -2) / width**0.5
            seen = torch.ones_like(scores, dtype=torch.bool).tril()
            attended = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, shared]
            total = total + attended @ layer["o"].chunk(ranks, 1)[rank][:, head].T
    return total


def meta_ffn(layer, x):
    return (F.silu(x @ layer["gate"].T) * (x @ layer["up"].T)) @ layer["down"].T


def rotate_neighbours(x, theta):
    """Turn the pair (2i, 2i + 1) at position p by p * theta ** (-2i / width)."""
    length, width = x.shape[-2:]
    angles = torch.outer(torch.arange(length).float(), theta ** (-torch.arange(0, width, 2) / width))
    cos, sin = angles.cos(), angles.sin()
    turns = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    return torch.einsum("spij,...spj->...spi", turns, x.unflatten(-1, (-1, 2))).flatten(-2)


def halves_apart(weights, *names):
    """Even dimensions of each head first, then the odd ones, in the weights whose name ends with one of `names`.

    With ROWS and NORMS the same model in the order of transformers and ours.
    """
    return {name: torch.cat((w[:, 0::2], w[:, 1::2]), 1) if name.endswith(names) else w for name, w in weights.items()}
