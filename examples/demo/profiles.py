"""How large the demo is: the full one, and a quick one that only shows that every stage works."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Sizes of every stage; what a small model needs no flag for stays in train.yaml."""

    raw_flags: tuple[str, ...] = ()
    """Of `make_raw_data`."""
    vocab_size: int = 3072
    """Ids in all."""
    image_size: int = 64
    """Side in pixels."""
    grid: int = 8
    """Rows and columns of picture codes."""
    num_codes: int = 1024
    """Of the image tokenizer's codebook."""
    image_tokenizer_flags: tuple[str, ...] = ("--steps", "800")
    training: tuple[str, ...] = ()
    """Overrides of train.yaml."""
    layout_steps: int = 4
    """Of the training under each layout."""
    expected_seconds: dict[str, float]
    """By name of a stage, on two cores."""


FULL = Profile(
    raw_flags=("--text-megabytes", "1"),
    expected_seconds={
        "raw": 14, "text_tokenizer": 2, "image_tokenizer": 165, "shards": 22, "training": 440, "layouts": 40,
        "generation": 18, "evaluation": 28, "report": 1,
    },
)  # fmt: skip

QUICK = Profile(
    raw_flags=(
        *("--max-pictures", "48", "--text-megabytes", "0.2"),
        *("--interleaved-documents", "20", "--prompts-per-kind", "2"),
    ),
    vocab_size=1024,
    image_size=32,
    grid=4,
    num_codes=64,
    image_tokenizer_flags=("--steps", "20", "--batch-size", "16"),
    training=(
        *("model.vocab_size=1024", "model.num_layers=6", "model.hidden_size=64", "model.num_attention_heads=4"),
        *("model.num_query_groups=2", "model.ffn_hidden_size=128", "model.context_length=256"),
        *("data.sequence_length=256", "training.num_steps=6"),
        *("training.log_every=1", "training.validate_every=3"),
        *("training.validation_samples=4", "optimizer.warmup_steps=2", "checkpoint.every=3"),
        "logging.drawing.prompts=[red heart, sun]",
    ),
    layout_steps=2,
    expected_seconds={
        "raw": 4, "text_tokenizer": 4, "image_tokenizer": 12, "shards": 20, "training": 15, "layouts": 40,
        "generation": 20, "evaluation": 10, "report": 2,
    },
)  # fmt: skip
