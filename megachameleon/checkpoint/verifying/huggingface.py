"""transformers' side of a verification: its own Chameleon or Llama, a block of weights at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megachameleon.checkpoint.verifying.streaming import Advance, Trace, streamed
from megachameleon.files import read_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


class StoredFiles:
    """The tensors of a folder of safetensors files, by name; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            ValueError: no readable files.
        """
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder}: has no config.json; give the folder of a Hugging Face model")
        self.folder = folder
        if (folder / INDEX_FILE).is_file():
            self._files: dict[str, str] = read_json(folder / INDEX_FILE)["weight_map"]
            return
        with _readable(folder / SINGLE_FILE), safe_open(folder / SINGLE_FILE, framework="pt") as file:
            self._files = dict.fromkeys(file.keys(), SINGLE_FILE)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored.

        Raises:
            ValueError: it is not there, or its file is damaged.
        """
        if name not in self:
            raise ValueError(f"{self.folder}: has no tensor {name}; it is not the model that its config.json describes")
        path = self.folder / Path(self._files[name]).name
        with _readable(path), safe_open(path, framework="pt") as file:
            return file.get_tensor(name)


def huggingface_trace(
    folder: Path, tokens: Tensor, rounding: torch.dtype, advance: Advance, *, without_qk_norm: bool = False
) -> Trace:
    """What transformers computes from token ids [b, s], on the CPU, in fp32.

    The head is applied to the hidden states: the forward of its ChameleonForConditionalGeneration overwrites the
    logits of picture codes.

    Args:
        without_qk_norm: leave them out, as if the model had none.

    Raises:
        ValueError: config.json is of another model, or tensors are missing, misshapen or damaged.
    """
    with _quiet():
        model = _build(folder).eval()
    for layer in model.model.layers if without_qk_norm else ():
        layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()
    names = {f"model.layers.{i}": layer for i, layer in enumerate(model.model.layers)}
    parts = {EMBEDDING: model.model.embed_tokens, **names, "model.norm": model.model.norm, HEAD: model.lm_head}
    files = StoredFiles(folder)

    def fill(name: str, part: nn.Module) -> None:
        for own, parameter in part.named_parameters():
            stored = f"{name}.{own}"
            if name == HEAD and stored not in files and model.config.tie_word_embeddings:
                stored = f"{EMBEDDING}.{own}"
            parameter.copy_(_shaped(folder, stored, files.read(stored), parameter))

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
    with torch.device("meta"):
        model = kinds[config.model_type](config)
    # Its frequencies are computed, not stored, so they need memory from the start.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


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
