"""Whether two checkpoints, of whatever format, are the same model: logits of a few tokens, in fp32."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megachameleon.checkpoint.folder import COMMON_FILE, INDEX_FILE, resolve_checkpoint
from megachameleon.checkpoint.formats.registry import Kind
from megachameleon.checkpoint.loading import saved_config
from megachameleon.checkpoint.state import load_state
from megachameleon.checkpoint.tensors import index_from_json
from megachameleon.config import KernelsConfig, ParallelConfig
from megachameleon.files import read_json
from megachameleon.model.decoder import build_decoder
from megachameleon.model.kernels.table import choose_kernels
from megachameleon.parallel.context import parallel_context

TOLERANCE = 1e-3
"""Of the largest logit."""
ROWS, LENGTH = 2, 16


def require_verifiable(kinds: set[Kind]) -> None:
    """Refuse what cannot be verified here, before anything is converted.

    Raises:
        ValueError: transformers is not installed.
    """
    if "hf" in kinds and importlib.util.find_spec("transformers") is None:
        raise ValueError("--verify: computes one side with transformers, which is not here: pip install transformers")


def logits_of(kind: Kind, path: Path, tokens: Tensor, rounding: torch.dtype, *, exact: bool = False) -> Tensor:
    """Logits fp32 [b, s, vocabulary] of tokens [b, s], by the implementation to which the format belongs.

    Args:
        rounding: the weights are rounded to it first, so that the two sides of a conversion to bf16 compare.
        exact: of our own checkpoints: fp32 masters instead of weights.
    """
    with torch.no_grad():
        return _ours(path, tokens, rounding, exact) if kind == "megatron" else _transformers(path, tokens, rounding)


def some_tokens(vocab_size: int) -> Tensor:
    """The same for every checkpoint of this vocabulary: int64 [2, 16]."""
    return torch.randint(0, vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def largest_difference(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Between two logits, and divided by the largest of either."""
    difference = (one - other).abs().max().item()
    return difference, difference / max(one.abs().max().item(), other.abs().max().item(), 1e-30)


def _ours(path: Path, tokens: Tensor, rounding: torch.dtype, exact: bool) -> Tensor:
    checkpoint = resolve_checkpoint(path)
    model = saved_config(checkpoint).model
    layout = ParallelConfig()
    index = index_from_json(read_json(checkpoint / INDEX_FILE), origin=str(checkpoint / INDEX_FILE))
    if not exact:
        index = {key: entry for key, entry in index.items() if not key.startswith("optimizer.")}
    with parallel_context(layout) as context:
        kernels = choose_kernels(KernelsConfig())
        decoder = build_decoder(model, layout, kernels, context.groups, dtype=torch.float32, seed=None)
        decoder = decoder.to(context.device).eval()
        load_state(checkpoint, index, read_json(checkpoint / COMMON_FILE), [decoder], None, context.groups)
        _round(decoder, rounding)
        return decoder(tokens.to(context.device), None, None).float().cpu()


def _transformers(path: Path, tokens: Tensor, rounding: torch.dtype) -> Tensor:
    """The head is applied here: transformers' forward overwrites the logits of picture codes."""
    from transformers import ChameleonForConditionalGeneration

    with _quiet():
        model = ChameleonForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    _round(model, rounding)
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden @ model.lm_head.weight.T


def _round(model: torch.nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without its remarks on a picture encoder that is left out on purpose."""
    from transformers.utils import logging

    before, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if had_bar:
            logging.enable_progress_bar()
