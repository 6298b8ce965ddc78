"""`params.json` and `consolidate_params.json` of Meta's format: the shape of the model."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megachameleon.checkpoint.boxes import Shape
from megachameleon.checkpoint.formats.meta.names import CONSOLIDATE_FILE, PARAMS_FILE, QK_NORM_EPS
from megachameleon.config import ModelConfig
from megachameleon.files import read_json

MOST_JSON_BYTES = 1 << 20
"""A release's files have 500."""
MOST = 2**31
DEFAULT_MULTIPLE = 256
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
SIZES = ("dim", "n_layers", "n_heads")
"""What nothing else says."""
OPTIONAL_SIZES = ("n_kv_heads", "vocab_size", "multiple_of", "model_parallel_size")
NUMBERS = ("ffn_dim_multiplier", "norm_eps", "rope_theta")
FLAGS = ("qk_normalization", "swin_norm")
OWN = ("context_length", "dropout", "embedding_dropout", "init_std", "depth_scaled_init")
"""Of our configuration, what Meta's files have no place for."""


def read_params(folder: Path) -> dict[str, Any]:
    """The settings that Meta's loader would take: `consolidate_params.json` over `params.json`'s "model" over the rest.

    Raises:
        ValueError: neither file is there, or they do not say the model's size, or something that cannot be.
    """
    merged: dict[str, Any] = {}
    present = [name for name in (PARAMS_FILE, CONSOLIDATE_FILE) if (folder / name).is_file()]
    for name in present:
        content = _small_json(folder / name)
        nested = content.pop("model", None)
        # In the order of Meta's loader: what is nested counts more, the second file most.
        merged |= content
        if isinstance(nested, dict):
            merged |= nested
    if not present:
        raise ValueError(f"{folder}: neither {PARAMS_FILE} nor {CONSOLIDATE_FILE}; copy them beside the weights")
    where = " and ".join(present)
    missing = [name for name in SIZES if merged.get(name) is None]
    if missing:
        others = [name for name in (PARAMS_FILE, CONSOLIDATE_FILE) if name not in present]
        more = f", and {others[0]} is not there; copy it" if others else "; add it"
        raise ValueError(f"{folder}: {where} does not say {', '.join(missing)}{more}")
    known = {name: merged.get(name) for name in (*SIZES, *OPTIONAL_SIZES, *NUMBERS, *FLAGS)}
    if known["vocab_size"] == -1:  # Meta's own "not known yet"
        known["vocab_size"] = None
    for name, value in known.items():
        if value is not None and not _can_be(name, value):
            raise ValueError(f"{folder}: {name}={str(value)[:40]} in {where} cannot be; copy the files again")
    return known


def _small_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MOST_JSON_BYTES:
        raise ValueError(f"{path}: has {path.stat().st_size:,} bytes, a release's has 500; copy it again")
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is not a JSON object; copy it again")
    return content


def _can_be(name: str, value: Any) -> bool:
    if name in FLAGS:
        return isinstance(value, bool)
    if name in NUMBERS:
        return type(value) in (int, float) and 0 < value < MOST and math.isfinite(value)
    return type(value) is int and 0 < value < MOST


def model_of_params(
    folder: Path, params: Mapping[str, Any], shapes: Mapping[str, Shape], shards: int, extra: Mapping[str, Any]
) -> ModelConfig:
    """The decoder that the settings and the tensors describe together, with a group of QK-norm for each file.

    Args:
        params: of `read_params`.
        shapes: of one file's tensors by Meta's names.
        extra: what our own export says beside it; empty: nothing.

    Raises:
        ValueError: settings and tensors contradict each other, or the decoder here cannot be this model.
    """
    if params["n_layers"] > len(shapes):
        raise ValueError(f"{folder}: says n_layers={params['n_layers']}, but a file has {len(shapes)} tensors only")
    if params["model_parallel_size"] not in (None, shards):
        raise ValueError(
            f"{folder}: says model_parallel_size={params['model_parallel_size']}, but there are {shards} files of "
            "weights; copy all of them"
        )
    normed = any("q_normalization" in name for name in shapes)
    if params["qk_normalization"] not in (None, normed):
        there = "some" if normed else "no"
        raise ValueError(f"{folder}: says qk_normalization={params['qk_normalization']}, but there are {there} tensors")
    eps = params["norm_eps"] or QK_NORM_EPS
    if normed and eps != QK_NORM_EPS:
        raise ValueError(
            f"{folder}: norm_eps={eps}, while Meta's QK-norm has {QK_NORM_EPS}; the decoder here has one for both"
        )
    model = ModelConfig(
        vocab_size=_agreed(folder, "vocab_size", params["vocab_size"], _rows(shapes, "output.weight", shards)),
        num_layers=params["n_layers"],
        hidden_size=params["dim"],
        num_attention_heads=params["n_heads"],
        num_query_groups=params["n_kv_heads"] or params["n_heads"],
        ffn_hidden_size=_agreed(
            folder,
            "the FFN's width, by dim, multiple_of and ffn_dim_multiplier,",
            _stated_width(params),
            _rows(shapes, "layers.0.feed_forward.w1.weight", shards),
        ),
        norm_order="swin" if params["swin_norm"] else "pre",
        norm_eps=eps,
        qk_norm="layernorm" if normed else "none",
        qk_norm_groups=shards if normed else 1,
        rope_theta=float(params["rope_theta"] or 10_000.0),
    )
    own = extra.get("model")
    # A type that does not fit is another's file, or a damaged one; the defaults are safe.
    kept = {name: own[name] for name in OWN if name in own} if isinstance(own, dict) else {}
    model = replace(model, **{name: v for name, v in kept.items() if type(v) is type(getattr(model, name))})
    try:
        model.validate()
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return model


def _rows(shapes: Mapping[str, Shape], name: str, shards: int) -> int | None:
    shape = shapes.get(name)
    return shape[0] * shards if shape else None


def _agreed(folder: Path, what: str, stated: int | None, found: int | None) -> int:
    """What the settings say, or else the tensors."""
    if stated and found and stated != found:
        raise ValueError(f"{folder}: {what} is {stated} and by the tensors {found}; copy settings and weights again")
    if not (stated or found):
        raise ValueError(f"{folder}: neither settings nor tensors say {what.rstrip(',')}; copy both again")
    return stated or found or 0


def _stated_width(params: Mapping[str, Any]) -> int | None:
    """By Meta's rule; None: the settings do not say."""
    if params["multiple_of"] is None and params["ffn_dim_multiplier"] is None:
        return None
    return ffn_width(params["dim"], params["multiple_of"] or DEFAULT_MULTIPLE, params["ffn_dim_multiplier"])


def ffn_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Two thirds of 4 `dim`, times the multiplier, rounded up to a multiple: 4,096 gives 11,008 at 256."""
    width = 2 * 4 * dim // 3
    if multiplier is not None:
        width = int(multiplier * width)
    return -(-width // multiple_of) * multiple_of


def stated_ffn(dim: int, width: int) -> tuple[int, float | None]:
    """`multiple_of` and `ffn_dim_multiplier` by which `ffn_width` is exactly `width`; the release's where they do."""
    multiple = DEFAULT_MULTIPLE
    while width % multiple:
        multiple //= 2
    if ffn_width(dim, multiple, None) == width:
        return multiple, None
    # In the middle of all that are rounded up to it, so that no last digit decides.
    multiplier = (width - multiple // 2 + 0.5) / (2 * 4 * dim // 3)
    assert ffn_width(dim, multiple, multiplier) == width, (dim, width, multiple, multiplier)
    return multiple, multiplier


def written_params(model: ModelConfig) -> dict[str, Any]:
    """`params.json`."""
    multiple, multiplier = stated_ffn(model.hidden_size, model.ffn_hidden_size)
    return {
        "model": {
            "dim": model.hidden_size,
            "n_layers": model.num_layers,
            "n_heads": model.num_attention_heads,
            "n_kv_heads": model.num_query_groups,
            "vocab_size": model.vocab_size,
            "multiple_of": multiple,
            "ffn_dim_multiplier": multiplier,
            "norm_eps": model.norm_eps,
            "rope_theta": model.rope_theta,
            "qk_normalization": model.qk_norm == "layernorm",
            "swin_norm": model.norm_order == "swin",
        }
    }


def written_consolidate_params(dtype: torch.dtype, shards: int) -> dict[str, Any]:
    """`consolidate_params.json`."""
    return {"dtype": DTYPES[dtype], "model_parallel_size": shards, "on_gpu": True, "tokenizer_path": None}


def own_settings(model: ModelConfig) -> dict[str, Any]:
    """What our own file beside it says of the model, for the way back."""
    kept: dict[str, Any] = json.loads(json.dumps({name: getattr(model, name) for name in OWN}))
    return kept | {"qk_norm_groups": model.qk_norm_groups}
