"""Who competes. Each file builds its own; nothing of it is imported before it is asked for."""

from collections.abc import Sequence

MODULES = {
    "ours": "ours",
    "plain": "plain",
    "plain-autocast": "plain",
    "plain-compiled": "plain",
    "huggingface": "huggingface",
    "huggingface-autocast": "huggingface",
    "megatron": "megatron",
}
"""Name to module of this package; what follows a hyphen is a variant."""
ONLY_WHEN_ASKED = ("plain-compiled",)
"""Compiling takes minutes on a CPU."""


def choose_names(asked: Sequence[str] | None, precision: str) -> list[str]:
    """Those asked for, or those whom a precision concerns.

    Raises:
        ValueError: a name is unknown, given twice, or means nothing in this precision.
    """
    concerned = [name for name in MODULES if precision == "bf16" or not name.endswith("-autocast")]
    for name in asked or ():
        if name not in concerned:
            raise ValueError(f"--contestants: {name!r} is unknown in {precision}; choose from {', '.join(concerned)}")
    if asked and len(set(asked)) < len(asked):
        raise ValueError(f"--contestants: {' '.join(asked)} names one twice; name each once")
    return list(asked or (name for name in concerned if name not in ONLY_WHEN_ASKED))
