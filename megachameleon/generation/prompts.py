"""Prompts of text and pictures: from the command line or a JSONL file to ids."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megachameleon.generation.settings import GenerationSettings
from megachameleon.tokens.pictures import open_picture, prepare_picture
from megachameleon.tokens.text import TextTokenizer
from megachameleon.tokens.vocabulary import Vocabulary
from megachameleon.tokens.vq.tokenizer import ImageTokenizer


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Texts and pictures in the order in which the model reads them."""

    segments: tuple[str | Path, ...]
    """A text, or the path of a picture."""
    origin: str
    """Where it came from, for errors."""

    def as_json(self) -> list[dict[str, str]]:
        """The segments as plain values, {"text"} or {"image"}."""
        return [{"text": s} if isinstance(s, str) else {"image": str(s)} for s in self.segments]


def read_prompts(path: Path) -> list[Prompt]:
    """Read a JSONL file of {"segments": [{"text": …} or {"image": path}, …]}, or {"text": …} for one text.

    Paths are relative to the file.

    Raises:
        ValueError: the file is missing, or a line is not such an object; names the line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --prompts takes a JSONL file")
    # a line that is not UTF-8 then fails as no JSON, with its number
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    prompts = [
        _parse(line, path.parent, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()
    ]
    if not prompts:
        raise ValueError(f"{path}: no prompts; write one JSON object per line")
    return prompts


def _parse(line: str, folder: Path, origin: str) -> Prompt:
    try:
        value: Any = json.loads(line)
        segments = value["segments"] if "segments" in value else [{"text": value["text"]}]
        return Prompt(segments=tuple(_segment(segment, folder) for segment in segments), origin=origin)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f'{origin}: not a prompt; write {{"segments": [{{"text": "…"}}, {{"image": "a.png"}}]}} or {{"text": "…"}}'
        ) from None


def _segment(segment: Any, folder: Path) -> str | Path:
    [(kind, value)] = segment.items() if len(segment) == 1 else [("", "")]
    if kind not in ("text", "image") or not isinstance(value, str):
        raise KeyError(kind)
    return value if kind == "text" else folder / value


def encode_prompt(
    prompt: Prompt, vocabulary: Vocabulary, text_tokenizer: TextTokenizer, image_tokenizer: ImageTokenizer | None
) -> list[int]:
    """The ids of a prompt, beginning with bos.

    Raises:
        ValueError: a picture that cannot be read, or one without an image tokenizer.
    """
    ids = [vocabulary.bos]
    for segment in prompt.segments:
        if isinstance(segment, str):
            ids += text_tokenizer.encode(segment)
            continue
        if image_tokenizer is None:
            raise ValueError(f"{prompt.origin}: has a picture, but there is no image tokenizer; give --image-tokenizer")
        if not segment.is_file():
            raise ValueError(f"{segment}: no such picture ({prompt.origin})")
        image = open_picture(segment.read_bytes(), origin=str(segment))
        pixels = torch.from_numpy(prepare_picture(image, image_tokenizer.image_size))[None]
        ids += vocabulary.encode_image(image_tokenizer.encode(pixels)[0].cpu().numpy()).tolist()
    return ids


def require_fits(
    prompts: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    context_length: int,
    settings: GenerationSettings,
    vocabulary: Vocabulary,
) -> None:
    """Refuse prompts and settings that leave no room, before the model is loaded.

    Raises:
        ValueError: names the prompt, its length and the context, or `--max-new-tokens`.
    """
    wanted = vocabulary.image_length if settings.modality == "image" else 1
    if settings.max_new_tokens is not None and settings.max_new_tokens < wanted:
        raise ValueError(
            f"--max-new-tokens: {settings.max_new_tokens} is less than the {wanted} ids of a picture; "
            f"give at least {wanted}, or leave it out"
        )
    for prompt, row in zip(prompts, ids, strict=True):
        if len(row) + wanted > context_length:
            raise ValueError(
                f"{prompt.origin}: {len(row)} ids leave no room for {wanted} more in the model's context of "
                f"{context_length}; shorten the prompt"
            )
