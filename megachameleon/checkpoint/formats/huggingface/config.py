"""What config.json of a Hugging Face Chameleon says: the model and what its ids mean."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megachameleon.checkpoint.formats.huggingface.names import CONFIG_FILE, QK_NORM_EPS, vocabulary_map
from megachameleon.checkpoint.formats.plain import vocabulary_of_tokenizer
from megachameleon.config import ModelConfig
from megachameleon.files import read_json
from megachameleon.tokens.text import TextTokenizer
from megachameleon.tokens.text.huggingface import exported_pieces
from megachameleon.tokens.text.piece_names import IMAGE_PLACEHOLDER
from megachameleon.tokens.text.tokenizer import text_tokenizer_file
from megachameleon.tokens.vocabulary import Vocabulary

MOST_THETA = 1e12
"""Far more than any; JSON has whole numbers that no float holds."""
SHOWN = 8
"""Names that an error lists of a vocabulary."""
MODEL_TYPE = "chameleon"
UNSUPPORTED = {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "hidden_act": "silu"}
DEFAULTS = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "model_parallel_size": 1, "swin_norm": False}
"""transformers' own, for what is left out."""


def is_chameleon(folder: Path) -> bool:
    """Whether a folder is Hugging Face's form of a Chameleon, by its config.json."""
    settings = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else None
    return isinstance(settings, dict) and settings.get("model_type") == MODEL_TYPE


def read_model(path: Path, settings: Any) -> ModelConfig:
    """The decoder that config.json describes.

    Raises:
        ValueError: it is not a Chameleon, or one with what this project's decoder does not have.
    """
    if not isinstance(settings, dict) or settings.get("model_type") != MODEL_TYPE:
        kind = settings.get("model_type") if isinstance(settings, dict) else None
        raise ValueError(f"{path}: model_type is {kind!r}, not 'chameleon'; only Chameleon can be imported")
    values = {**DEFAULTS, **{name: value for name, value in settings.items() if value is not None}}
    for name, wanted in UNSUPPORTED.items():
        if values.get(name, wanted) != wanted:
            raise ValueError(f"{path}: {name}={values[name]!r}, and the decoder here has {wanted!r} only")
    if values["rms_norm_eps"] != QK_NORM_EPS:
        raise ValueError(
            f"{path}: rms_norm_eps={values['rms_norm_eps']}, while Chameleon's QK-norm has {QK_NORM_EPS} in "
            "transformers; the decoder here has one for both"
        )
    _require_usual_heads(path, values)
    if not isinstance(values["swin_norm"], bool):  # "false" would be true
        raise ValueError(f"{path}: swin_norm is {values['swin_norm']!r}, not true or false")
    try:
        model = ModelConfig(
            vocab_size=values["vocab_size"],
            num_layers=values["num_hidden_layers"],
            hidden_size=values["hidden_size"],
            num_attention_heads=values["num_attention_heads"],
            num_query_groups=values.get("num_key_value_heads", values["num_attention_heads"]),
            ffn_hidden_size=values["intermediate_size"],
            context_length=values["max_position_embeddings"],
            norm_order="swin" if values["swin_norm"] else "pre",
            norm_eps=values["rms_norm_eps"],
            qk_norm_groups=values["model_parallel_size"],
            rope_theta=rope_theta(path, values),
        )
    except KeyError as error:
        raise ValueError(f"{path}: has no {error}; copy it again") from None
    for name in ("vocab_size", "num_layers", "hidden_size", "num_attention_heads", "num_query_groups",
                 "ffn_hidden_size", "context_length", "qk_norm_groups"):  # fmt: skip
        if type(getattr(model, name)) is not int or getattr(model, name) < 1:
            raise ValueError(f"{path}: {name} is {getattr(model, name)!r}, not a positive whole number")
    return model


def _require_usual_heads(path: Path, values: dict[str, Any]) -> None:
    """Sizes of keys and values are head_dim x key/value heads, with a head_dim that nobody may choose."""
    heads, hidden, width = (values.get(name) for name in ("num_attention_heads", "hidden_size", "head_dim"))
    if width is None or type(heads) is not int or type(hidden) is not int:
        return
    if type(width) is not int or width * heads != hidden:
        raise ValueError(
            f"{path}: head_dim={width!r}, but {hidden} / {heads} in Chameleon (hidden_size / num_attention_heads)"
        )


def rope_theta(path: Path, values: dict[str, Any]) -> float:
    """The base of RoPE's frequencies, which stands in three places by release.

    Raises:
        ValueError: none, or RoPE that is scaled.
    """
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}  # of both, transformers takes the older
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind != "default" or not isinstance(rope, dict):
        raise ValueError(f"{path}: RoPE of type {kind!r}; the decoder here has the default only")
    theta = rope.get("rope_theta", values.get("rope_theta", 10_000.0))
    if type(theta) not in (int, float) or not 0 < theta < MOST_THETA:
        raise ValueError(f"{path}: rope_theta is {theta!r}, not the base of frequencies")
    return float(theta)


def read_vocabulary(
    folder: Path, settings: dict[str, Any], extra: dict[str, Any], tokenizer: Path | None
) -> dict[str, Any] | None:
    """What the ids mean, in `Vocabulary.to_dict` form: as our own export, the tokenizer, or Chameleon's release has it.

    Tables may have more rows than the vocabulary has ids (`rows.require_rows`).

    Returns:
        None where nothing says it.

    Raises:
        ValueError: it disagrees with config.json.
    """
    if tokenizer is not None:
        vocabulary, origin = vocabulary_of_tokenizer(folder, extra, tokenizer), str(tokenizer)
    elif extra.get("vocabulary"):
        vocabulary, origin = Vocabulary.from_dict(extra["vocabulary"], origin=str(folder)), "megachameleon.json"
    elif _is_release(folder, settings):
        vocabulary, origin = Vocabulary(), "Chameleon's release"
    else:
        return None
    texts: dict[int, str] = {}
    if tokenizer is not None and text_tokenizer_file(tokenizer) is not None:
        texts = dict(enumerate(exported_pieces(TextTokenizer.load(tokenizer))))
        texts = {i: name for i, name in texts.items() if i >= vocabulary.text_start}
    _require_agreement(folder, known_names(folder, settings), vocabulary, texts, origin)
    return asdict(vocabulary)


def _is_release(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the ids are Chameleon's 65,536; more rows than these are padding if nothing names them."""
    rows, size = settings.get("vocab_size"), Vocabulary().size
    if not isinstance(rows, int) or rows <= size:
        return rows == size
    return set(known_names(folder, settings).values()) == set(range(size))


def known_names(folder: Path, settings: dict[str, Any]) -> dict[str, int]:
    """`vocabulary_map` of config.json; empty where there is none.

    Raises:
        ValueError: it is no mapping of names to ids.
    """
    known = settings.get("vocabulary_map")
    if known is None:
        return {}
    if not isinstance(known, dict) or any(type(i) is not int for i in known.values()):
        raise ValueError(f"{folder / CONFIG_FILE}: vocabulary_map does not map names to ids; copy the file again")
    return known


def _require_agreement(
    folder: Path, found: dict[str, int], vocabulary: Vocabulary, texts: dict[int, str], origin: str
) -> None:
    """Refuse control ids, codes or text pieces with other ids in config.json, and text ids with other pieces."""
    controls = {name: i for name, i in vocabulary_map(vocabulary, None).items() if not name.startswith("<reserved")}
    ids = {**controls, **{name: i for i, name in texts.items()}}
    wrong = [
        f"{name!r} is {i} and not {ids[name]}" if name in ids else f"{i} is {name!r} and not {texts[i]!r}"
        for name, i in found.items()
        if name != IMAGE_PLACEHOLDER and (ids.get(name, i) != i or texts.get(i, name) != name)
    ]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(
            f"{folder}: vocabulary_map disagrees with {origin}: {', '.join(wrong[:SHOWN])}{more}; give the text "
            "tokenizer that made its data with --tokenizer"
        )
