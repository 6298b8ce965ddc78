"""Which tokenizers go beside an export: those that are given, or those that the checkpoint itself names."""

from pathlib import Path

from megachameleon.checkpoint.formats.huggingface.config import is_chameleon
from megachameleon.checkpoint.formats.huggingface.names import TOKENIZER_FILES
from megachameleon.checkpoint.formats.huggingface.pictures import (
    PictureEncoder,
    open_picture_encoder,
    picture_encoder_within,
)
from megachameleon.checkpoint.formats.plain import Description
from megachameleon.tokens.text import TextTokenizer
from megachameleon.tokens.vocabulary import Vocabulary


def own_tokenizer(description: Description, given: Path | None) -> Path | None:
    """The folder of the text tokenizer: `given`, of a Hugging Face source its own, or of a run `data.tokenizer`.

    Raises:
        ValueError: the given one is another than the checkpoint's.
    """
    if given is not None:
        _require_same_text(description, given)
        return given
    if is_chameleon(description.origin):
        return description.origin if (description.origin / TOKENIZER_FILES[0]).is_file() else None
    if description.run is None:
        return None
    named = Path(description.run.data.tokenizer)
    try:
        _require_same_text(description, named)
    except (ValueError, OSError):  # moved, or another by now; nobody has asked for it, and a note says so
        return None
    return named


def own_pictures(description: Description, given: Path | None) -> PictureEncoder | None:
    """The picture encoder: of `given`, of a Hugging Face source its own, or of a run that of `data.image_tokenizer`.

    Raises:
        ValueError: the given one is another than the checkpoint's, or damaged.
    """
    if given is not None:
        return _picture_encoder(description, given)
    if is_chameleon(description.origin):
        values = description.vocabulary
        known = Vocabulary.from_dict(values, origin=str(description.origin)) if values is not None else None
        return picture_encoder_within(description.origin, known)
    if description.run is None or description.run.data.image_tokenizer is None:
        return None
    try:
        return _picture_encoder(description, Path(description.run.data.image_tokenizer))
    except (ValueError, OSError):
        return None


def _require_same_text(description: Description, folder: Path) -> None:
    tokenizer = TextTokenizer.load(folder)
    if description.vocabulary is not None:
        mine = Vocabulary.from_dict(description.vocabulary, origin=str(description.origin))
        mine.require_same(tokenizer.vocabulary, str(description.origin), str(folder))
    known = description.tokenizers.get("text")
    if known not in (None, tokenizer.fingerprint):
        raise ValueError(
            f"{folder}: is another text tokenizer ({tokenizer.fingerprint}) than the one that made the data of "
            f"{description.origin} ({known}); give that one with --tokenizer"
        )


def _picture_encoder(description: Description, folder: Path) -> PictureEncoder:
    if description.vocabulary is None:
        raise ValueError(f"{description.origin}: does not say what its ids mean; give --tokenizer too")
    vocabulary = Vocabulary.from_dict(description.vocabulary, origin=str(description.origin))
    return open_picture_encoder(folder, vocabulary, description.tokenizers.get("image"))
