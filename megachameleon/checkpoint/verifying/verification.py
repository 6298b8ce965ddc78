"""Whether two checkpoints, of whatever format, are the same model: logits of some tokens, in fp32.

Each format is computed by the software to which it belongs, as far as that is there: ours by the decoder that trains,
Hugging Face's by transformers, Meta's by its formula, written out from the files as they are. None of them uses the
converter, so a mistake in its mapping between two formats cannot be on both sides.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megachameleon.checkpoint.formats.registry import Kind
from megachameleon.checkpoint.verifying.anole import anole_trace, is_anole
from megachameleon.checkpoint.verifying.streaming import Advance, Trace
from megachameleon.checkpoint.verifying.tokens import some_tokens
from megachameleon.config import ModelConfig
from megachameleon.console import progress_bar
from megachameleon.tokens.vocabulary import Vocabulary

TOLERANCE = 1e-4
"""Of the largest logit.

Equal weights differ by 1e-6 to 2e-6, because sums have another order, at 2 as at 48 layers of drawn weights; trained
ones have larger outliers, hence the room. Known mistakes differ by 0.2 and more, bf16 on one side by more than this.
"""


@dataclass(frozen=True, kw_only=True)
class Side:
    """A checkpoint and how its weights are read."""

    kind: Kind
    path: Path
    exact: bool = False
    """Of ours: fp32 masters instead of weights, where there are any."""
    without_qk_norm: bool = False
    """As if queries and keys had no norm."""
    ids: Tensor | None = None
    """Its id for each id of the model, int64 [vocabulary], below 0 where it has none; None: the same ids."""

    @property
    def computed_by(self) -> str:
        """Whose mathematics its logits are."""
        if self.kind == "hf":
            return "Meta's formula" if is_anole(self.path) else "transformers (hidden states times lm_head)"
        return "our decoder" if self.kind == "megatron" else "Meta's formula"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far two traces of the same tokens are apart."""

    difference: float
    """Largest between two logits."""
    relative: float
    """That, divided by the largest logit of either side."""
    same_choice: int
    """Positions at which both sides have the same largest logit."""
    num_tokens: int
    by_part: tuple[tuple[str, float], ...]
    """After each part of the model: the largest difference of hidden states, divided by the largest of them."""

    @property
    def is_same(self) -> bool:
        """Whether what is left can be rounding alone."""
        return self.relative <= TOLERANCE  # not a number is neither

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.difference:.3g} ({self.relative:.3g} of the largest logit), "
            f"the same id most likely at {self.same_choice} of {self.num_tokens} positions"
        )


def require_verifiable(kinds: set[Kind]) -> None:
    """Refuse what cannot be verified here, before anything is converted.

    Raises:
        ValueError: transformers is not installed.
    """
    if "hf" in kinds and importlib.util.find_spec("transformers") is None:
        raise ValueError("--verify: computes one side with transformers, which is not here: pip install transformers")


def verify(
    before: Side, after: Sequence[Side], model: ModelConfig, vocabulary: Vocabulary | None, rounding: torch.dtype
) -> list[Comparison]:
    """Compare what was converted with what became of it, a block of weights at a time, behind a progress bar.

    Args:
        after: each is compared with `before`.
        vocabulary: of the model, for the choice of tokens; None: not known.
        rounding: the weights of all are rounded to it first, so that a conversion to bf16 compares like one to fp32.

    Raises:
        ValueError: a side cannot be read, or is not of the same shape.
    """
    tokens = some_tokens(model.vocab_size, vocabulary, model.context_length)
    shared = None if before.ids is None else (before.ids >= 0).nonzero().flatten()
    if before.ids is not None and shared is not None:
        # Ids that the other side lacks are replaced, not left out, so that positions stay.
        tokens = torch.where(before.ids[tokens] >= 0, tokens, shared[tokens % len(shared)])
    with progress_bar("verifying (parts)", (1 + len(after)) * (model.num_layers + 3)) as bar:
        one, *others = (_trace_in(side, tokens, shared, rounding, bar.advance) for side in (before, *after))
    for side, other in zip(after, others, strict=True):
        if len(one.hidden) != len(other.hidden) or one.hidden[0].shape != other.hidden[0].shape:
            raise ValueError(f"{side.path}: has other sizes than {before.path}; it was not converted from it")
    return [compare(one, other) for other in others]


def _trace_in(side: Side, tokens: Tensor, shared: Tensor | None, rounding: torch.dtype, advance: Advance) -> Trace:
    """A trace whose logits are those of the `shared` ids of the model, in its order."""
    if shared is None:
        return trace_of(side, tokens, rounding, advance)
    trace = trace_of(side, tokens if side.ids is None else side.ids[tokens], rounding, advance)
    columns = shared if side.ids is None else side.ids[shared]
    return replace(trace, logits=trace.logits[..., columns])


def trace_of(side: Side, tokens: Tensor, rounding: torch.dtype, advance: Advance = lambda: None) -> Trace:
    """What a checkpoint computes from token ids [b, s], by the implementation to which its format belongs.

    Raises:
        ValueError: it cannot be read.
    """
    bare = side.without_qk_norm
    if side.kind == "megatron":
        from megachameleon.parallel.device import quiet_libraries

        quiet_libraries()  # megatron-core warns while it is imported
        from megachameleon.checkpoint.verifying.ours import our_trace

        return our_trace(side.path, tokens, rounding, advance, exact=side.exact, without_qk_norm=bare)
    if side.kind == "meta":
        from megachameleon.checkpoint.verifying.meta import meta_trace

        return meta_trace(side.path, tokens, rounding, advance, without_qk_norm=bare)
    if is_anole(side.path):
        return anole_trace(side.path, tokens, rounding, advance)
    from megachameleon.checkpoint.verifying.huggingface import huggingface_trace

    return huggingface_trace(side.path, tokens, rounding, advance, without_qk_norm=bare)


def logits_of(kind: Kind, path: Path, tokens: Tensor, rounding: torch.dtype, *, exact: bool = False) -> Tensor:
    """Logits fp32 [b, s, vocabulary] of tokens [b, s]. See `Side` and `trace_of`."""
    return trace_of(Side(kind=kind, path=path, exact=exact), tokens, rounding).logits


def compare(one: Trace, other: Trace) -> Comparison:
    """Logits of the ids that both have (one side may be padded), and hidden states part by part."""
    shared = min(one.logits.shape[-1], other.logits.shape[-1])
    logits = one.logits[..., :shared], other.logits[..., :shared]
    difference, relative = largest_difference(*logits)
    return Comparison(
        difference=difference,
        relative=relative,
        same_choice=int((logits[0].argmax(-1) == logits[1].argmax(-1)).sum()),
        num_tokens=logits[0].shape[0] * logits[0].shape[1],
        by_part=tuple(
            (name, largest_difference(a, b)[1])
            for name, a, b in zip(_part_names(one.hidden), one.hidden, other.hidden, strict=True)
        ),
    )


def largest_difference(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Between two logits, and divided by the largest of either."""
    difference = (one - other).abs().max().item()
    return difference, difference / max(one.abs().max().item(), other.abs().max().item(), 1e-30)


def _part_names(hidden: Sequence[Tensor]) -> list[str]:
    return ["embedding", *(f"block {i}" for i in range(len(hidden) - 2)), "final norm"]
