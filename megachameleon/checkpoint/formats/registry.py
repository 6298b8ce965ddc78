"""The formats by name, and a conversion from one to another."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megachameleon.checkpoint.formats.plain import Description, Sink, Source
from megachameleon.files import read_json

Kind = Literal["megatron", "hf", "meta"]
KINDS: tuple[Kind, ...] = ("megatron", "hf", "meta")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SIGNS: dict[Kind, tuple[str, ...]] = {
    "megatron": ("manifest.json", "step_*/manifest.json", "checkpoints/step_*/manifest.json"),
    "hf": ("config.json",),
    "meta": ("consolidated*.pth",),
}
"""By which files a folder shows its format."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What may be asked of a conversion."""

    dtype: str | None = None
    """`bf16` or `fp32`; None: as stored."""
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    tokenizer: Path | None = None
    image_tokenizer: Path | None = None
    qk_norm_groups: int | None = None
    average_qk_norm: bool = False
    shard_bytes: int | None = None
    """Most that a file of Hugging Face's holds."""
    meta_shards: int | None = None
    """Files of Meta's format; None: as many as there are groups of QK-norm."""
    vocab_size: int | None = None
    """Rows of embedding and head to be written; None: as many as the source has."""
    qk_norm: Literal["layernorm", "rmsnorm", "none"] = "layernorm"
    """What a model without QK-norm (Llama) is given."""


def open_source(kind: Kind, path: Path, options: Options) -> Source:
    """A checkpoint to read from, with the rows of embedding and head that are asked for.

    Raises:
        ValueError: it is damaged, not of this format, or has other rows than its vocabulary has ids.
    """
    from megachameleon.checkpoint.formats.rows import ResizedSource, require_rows

    _require_kind(kind, path)
    source = _open(kind, path, options)
    if options.vocab_size is not None:
        return ResizedSource(source, options.vocab_size, tokenizer=options.tokenizer)
    require_rows(source.description)
    return source


def _require_kind(kind: Kind, path: Path) -> None:
    """Refuse a folder that shows another format only; what is wrong with others, their readers say."""
    shown = [other for other in KINDS if any(any(path.glob(sign)) for sign in SIGNS[other])]
    if shown and kind not in shown:
        raise ValueError(f"{path}: has no {SIGNS[kind][0]}, and looks like {shown[0]}: give --from {shown[0]}")


def _open(kind: Kind, path: Path, options: Options) -> Source:
    if kind == "megatron":
        from megachameleon.checkpoint.formats.megatron.source import MegatronSource

        return MegatronSource(path, exact=options.dtype == "fp32")
    if kind == "meta":
        from megachameleon.checkpoint.formats.meta.source import MetaSource

        return MetaSource(path, tokenizer=options.tokenizer)
    if is_llama(path):
        from megachameleon.checkpoint.formats.llama.source import LlamaSource

        return LlamaSource(path, tokenizer=options.tokenizer, qk_norm=options.qk_norm, groups=options.qk_norm_groups)
    from megachameleon.checkpoint.formats.huggingface.source import HuggingFaceSource

    return HuggingFaceSource(
        path,
        tokenizer=options.tokenizer,
        qk_norm_groups=options.qk_norm_groups,
        average_qk_norm=options.average_qk_norm,
    )


def is_llama(path: Path) -> bool:
    """Whether a Hugging Face folder holds a text-only model of Llama's layout."""
    config = path / "config.json"
    settings = read_json(config) if config.is_file() else None
    return isinstance(settings, dict) and settings.get("model_type") == "llama"


def make_sink(kind: Kind, description: Description, options: Options, source: Source | None = None) -> Sink:
    """A format to write.

    Args:
        source: whose values are asked now whether the format can hold them; None: only once they are written.

    Raises:
        ValueError: it cannot hold this model, or an option does not fit.
    """
    dtype = target_dtype(description, options)
    if kind == "megatron":
        from megachameleon.checkpoint.formats.megatron.sink import MegatronSink

        return MegatronSink(description, dtype, options.tensor_parallel, options.pipeline_parallel)
    if kind == "meta":
        from megachameleon.checkpoint.formats.meta.sink import MetaSink

        averaged = options.average_qk_norm
        return MetaSink(description, dtype, options.meta_shards, average_qk_norm=averaged, source=source)
    from megachameleon.checkpoint.formats.huggingface.beside import own_pictures, own_tokenizer
    from megachameleon.checkpoint.formats.huggingface.sink import SHARD_BYTES, HuggingFaceSink

    tokenizer = own_tokenizer(description, options.tokenizer)
    pictures = own_pictures(description, options.image_tokenizer)
    return HuggingFaceSink(description, dtype, tokenizer, pictures, options.shard_bytes or SHARD_BYTES)


def target_dtype(description: Description, options: Options) -> torch.dtype:
    """The type of the weights to be written: as asked, as stored, or fp32 where neither bf16 nor fp32 is stored."""
    if options.dtype is not None:
        return DTYPES[options.dtype]
    return description.dtype if description.dtype in DTYPES.values() else torch.float32
