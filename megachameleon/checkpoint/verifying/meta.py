"""Meta's side of a verification: the formula of the released models, computed straight from the files.

Written from the published mathematics and the names and shapes of the files, and on purpose not by way of the
converter, whose mistakes it is to find: it permutes nothing and renames nothing. Each file is a model-parallel rank
with its own heads and its own QK-norm; neighbouring dimensions of a head rotate together; what the ranks add is summed
before a norm sees it. One matrix of one file is in memory at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megachameleon.checkpoint.verifying.streaming import Advance, Trace
from megachameleon.checkpoint.verifying.torch_file import StoredTensors
from megachameleon.files import read_json

QK_NORM_EPS = 1e-5
"""torch's default for LayerNorm, which the release takes; `norm_eps` is that of the other norms."""
Read = Callable[[str], Tensor]
"""A tensor of one rank, by the name that it has in its file, or within a layer: fp32, rounded."""


@dataclass(frozen=True, kw_only=True)
class Formula:
    """Its numbers."""

    layers: int
    query_heads: int
    """Of one rank."""
    key_heads: int
    """Of one rank."""
    eps: float
    theta: float
    qk_norm: bool
    swin: bool


def meta_trace(
    folder: Path, tokens: Tensor, rounding: torch.dtype, advance: Advance, *, without_qk_norm: bool = False
) -> Trace:
    """What a model in Meta's layout computes, on the CPU, in fp32, from token ids [b, s].

    Args:
        without_qk_norm: leave them out, as if the model had none.

    Raises:
        ValueError: a file is missing or damaged, or lacks a tensor.
    """
    ranks = [partial(_rounded, StoredTensors(path), rounding) for path in _files(folder)]
    formula = _formula(folder, len(ranks))
    return run_formula(replace(formula, qk_norm=formula.qk_norm and not without_qk_norm), ranks, tokens, advance)


@torch.no_grad()
def run_formula(formula: Formula, ranks: Sequence[Read], tokens: Tensor, advance: Advance) -> Trace:
    """Compute with tensors under Meta's names, wherever they come from; token ids are [b, s]."""
    # The release divides the embedding by columns, so ranks stand beside each other.
    hidden = [torch.cat([read("tok_embeddings.weight")[tokens] for read in ranks], -1)]
    advance()
    for layer in range(formula.layers):
        hidden.append(_block(hidden[-1], [partial(_of_layer, read, layer) for read in ranks], formula))
        advance()
    hidden.append(_rms_norm(hidden[-1], ranks[0]("norm.weight"), formula.eps))
    advance()
    logits = torch.cat([hidden[-1] @ read("output.weight").T for read in ranks], -1)
    advance()
    return Trace(hidden=tuple(hidden), logits=logits)


def _rounded(tensors: StoredTensors, rounding: torch.dtype, name: str) -> Tensor:
    return tensors.read(name).to(rounding).float()


def _of_layer(read: Read, layer: int, name: str) -> Tensor:
    return read(f"layers.{layer}.{name}")


def _block(x: Tensor, ranks: Sequence[Read], formula: Formula) -> Tensor:
    """One layer; the Swin order normalises what a sublayer returns, the other what it is given."""
    for sublayer, norm in ((_attention, "attention_norm.weight"), (_feed_forward, "ffn_norm.weight")):
        scale = ranks[0](norm)
        inner = x if formula.swin else _rms_norm(x, scale, formula.eps)
        # Summed before the norm: in the Swin order a norm of each rank's part would be another model.
        branch = torch.stack([sublayer(inner, read, formula) for read in ranks]).sum(0)
        x = x + (_rms_norm(branch, scale, formula.eps) if formula.swin else branch)
    return x


def _attention(x: Tensor, read: Read, formula: Formula) -> Tensor:
    """What the heads of one rank add, [b, s, hidden] to the same."""
    heads, shared = formula.query_heads, formula.key_heads
    q, k, v = (
        (x @ read(f"attention.w{which}.weight").T).unflatten(-1, (count, -1)).transpose(1, 2)
        for which, count in (("q", heads), ("k", shared), ("v", shared))
    )
    if formula.qk_norm:
        q, k = (_head_norm(values, read, f"attention.{which}_normalization") for values, which in ((q, "q"), (k, "k")))
    q, k = _rotate(q, formula.theta), _rotate(k, formula.theta)
    k, v = (values.repeat_interleave(heads // shared, 1) for values in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    attended = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
    return attended.transpose(1, 2).flatten(2) @ read("attention.wo.weight").T


def _feed_forward(x: Tensor, read: Read, formula: Formula) -> Tensor:
    """What one rank's part of the inner dimension adds, [b, s, hidden] to the same."""
    inner = F.silu(x @ read("feed_forward.w1.weight").T) * (x @ read("feed_forward.w3.weight").T)
    return inner @ read("feed_forward.w2.weight").T


def _head_norm(x: Tensor, read: Read, name: str) -> Tensor:
    """Over each head by itself; one weight and one bias for all heads of a rank."""
    return F.layer_norm(x, x.shape[-1:], read(f"{name}.weight"), read(f"{name}.bias"), QK_NORM_EPS)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _rotate(x: Tensor, theta: float) -> Tensor:
    """Turn dimensions 2i and 2i + 1 of [b, heads, s, head_dim] at position p by p * theta ** (-2i / head_dim)."""
    length, width = x.shape[-2:]
    # In fp64, where positions times frequencies are exact enough; fp32 shows at the far end.
    angles = torch.outer(torch.arange(length).double(), theta ** (-torch.arange(0, width, 2).double() / width))
    cos, sin = angles.cos().float(), angles.sin().float()
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def _files(folder: Path) -> list[Path]:
    """One for each rank, in the order of ranks."""
    single = folder / "consolidated.pth"
    if single.is_file():
        return [single]
    count = len(list(folder.glob("consolidated.[0-9]*.pth")))
    files = [folder / f"consolidated.{rank:02}.pth" for rank in range(count)]
    if not files or not all(path.is_file() for path in files):
        raise ValueError(f"{folder}: neither consolidated.pth nor all of consolidated.00.pth and so on; copy it again")
    return files


def _formula(folder: Path, ranks: int) -> Formula:
    """The object `model` within params.json counts more than what stands beside it; the second file most of all."""
    params, second = read_json(folder / "params.json"), folder / "consolidate_params.json"
    try:
        found = {**params, **params.get("model", {}), **(read_json(second) if second.is_file() else {})}
        heads = found["n_heads"]
        return Formula(
            layers=found["n_layers"],
            query_heads=heads // ranks,
            key_heads=(found.get("n_kv_heads") or heads) // ranks,
            eps=found.get("norm_eps", 1e-5),
            theta=found.get("rope_theta", 10_000.0),
            qk_norm=found.get("qk_normalization", False),
            swin=found.get("swin_norm", False),
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'params.json'}: does not say what the model is ({error}); copy it again") from None
