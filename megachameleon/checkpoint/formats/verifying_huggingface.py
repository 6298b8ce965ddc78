"""transformers' side of a verification: its own Chameleon or Llama, a block of weights at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megachameleon.checkpoint.formats.verifying_streaming import Advance, Trace, streamed
from megachameleon.files import read_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


def huggingface_trace(folder: Path, tokens: Tensor, rounding: torch.dtype, advance: Advance) -> Trace:
    """What transformers computes from token ids [b, s], on the CPU, in fp32.

    The head is applied to the hidden states: the forward of its ChameleonForConditionalGeneration overwrites the
    logits of picture codes.

    Raises:
        ValueError: config.json is of another model, or tensors are missing, misshapen or damaged.
    """
    with _quiet():
        model = _build(folder).eval()
    names = {f"model.layers.{i}": layer for i, layer in enumerate(model.model.layers)}
    parts = {EMBEDDING: model.model.embed_tokens, **names, "model.norm": model.model.norm, HEAD: model.lm_head}
    files = _files(folder)

    def fill(name: str, part: nn.Module) -> None:
        for own, parameter in part.named_parameters():
            stored = f"{name}.{own}"
            if name == HEAD and stored not in files and model.config.tie_word_embeddings:
                stored = f"{EMBEDDING}.{own}"
            parameter.copy_(_shaped(folder, stored, _read(folder, files, stored), parameter))

    with streamed(parts, fill, torch.device("cpu"), rounding, advance) as outputs:
        model.lm_head(model.model(input_ids=tokens, use_cache=False).last_hidden_state)
    return Trace(hidden=tuple(outputs[:-1]), logits=outputs[-1])


def _build(folder: Path) -> Any:
    """The model of config.json without memory for its weights."""
    from transformers import AutoConfig, ChameleonForConditionalGeneration, LlamaForCausalLM

    kinds = {"chameleon": ChameleonForConditionalGeneration, "llama": LlamaForCausalLM}
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in kinds:
        raise ValueError(f"{folder}: model_type is {config.model_type!r}; only {' and '.join(kinds)} are verified")
    if config.model_type == "chameleon" and config.vocabulary_map is None:
        config.vocabulary_map = {}  # names of ids, which nothing here asks for
    config.tie_word_embeddings = bool(config.tie_word_embeddings)
    with torch.device("meta"):
        model = kinds[config.model_type](config)
    # Its frequencies are computed, not stored, so they need memory from the start.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def _files(folder: Path) -> dict[str, str]:
    """File names by tensor."""
    if (folder / INDEX_FILE).is_file():
        return dict(read_json(folder / INDEX_FILE)["weight_map"])
    with _readable(folder / SINGLE_FILE), safe_open(folder / SINGLE_FILE, framework="pt") as file:
        return dict.fromkeys(file.keys(), SINGLE_FILE)


def _read(folder: Path, files: dict[str, str], stored: str) -> Tensor:
    if stored not in files:
        raise ValueError(f"{folder}: has no tensor {stored}; it is not the model that its config.json describes")
    path = folder / files[stored]
    with _readable(path), safe_open(path, framework="pt") as file:
        return file.get_tensor(stored)


def _shaped(folder: Path, stored: str, values: Tensor, parameter: Tensor) -> Tensor:
    """A QK-norm stored once for a group of heads (Lumina's variant) is that of each of them."""
    if "_norm." in stored and values.dim() == parameter.dim() == 2 and len(parameter) % len(values) == 0:
        values = values.repeat_interleave(len(parameter) // len(values), 0)
    if values.shape != parameter.shape:
        raise ValueError(f"{folder}: {stored} is {list(values.shape)}, and transformers has {list(parameter.shape)}")
    return values


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged, or not a safetensors file ({error}); copy it again") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without its remarks on settings that it does not know."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
