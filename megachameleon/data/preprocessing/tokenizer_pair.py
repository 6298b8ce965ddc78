"""The text tokenizer and the picture tokenizer of one dataset: loaded together, and checked against each other."""

from pathlib import Path
from typing import TYPE_CHECKING

from megachameleon.tokens.text import TextTokenizer
from megachameleon.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    from megachameleon.tokens.vq import ImageTokenizer


def load_tokenizers(
    tokenizer: Path, image_tokenizer: Path | None, device: str
) -> tuple[TextTokenizer, "ImageTokenizer | None"]:
    """Load both tokenizers and check that they share a vocabulary.

    Args:
        device: cpu, cuda, or auto.

    Raises:
        ValueError: a file is missing or damaged, or grid or number of codes differ.
    """
    text_tokenizer = TextTokenizer.load(tokenizer)
    if image_tokenizer is None:
        return text_tokenizer, None
    import torch

    from megachameleon.tokens.vq import ImageTokenizer

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here; choose cpu or auto")
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    picture_tokenizer = ImageTokenizer.load(image_tokenizer, torch.device(where))
    _require_fit(text_tokenizer.vocabulary, picture_tokenizer, tokenizer, image_tokenizer)
    return text_tokenizer, picture_tokenizer


def _require_fit(vocabulary: Vocabulary, pictures: "ImageTokenizer", tokenizer: Path, image_tokenizer: Path) -> None:
    mine = (vocabulary.num_image_codes, vocabulary.image_grid)
    theirs = (pictures.num_codes, tuple(pictures.grid))
    if mine != theirs:
        raise ValueError(
            f"{image_tokenizer}: {theirs[0]} codes in a grid of {theirs[1]}, but the vocabulary in {tokenizer} has "
            f"{mine[0]} in {mine[1]}; train the text tokenizer with --num-codes {theirs[0]} "
            f"--grid {theirs[1][0]}x{theirs[1][1]}"
        )
