"""What is said of a conversion: the same model, the model that was asked for, or another one."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from megachameleon.checkpoint.formats.llama.source import LlamaSource
from megachameleon.checkpoint.formats.plain import Source
from megachameleon.checkpoint.formats.rows import ResizedSource
from megachameleon.checkpoint.verifying.verification import TOLERANCE, Comparison, Side, verify
from megachameleon.console import FailureError
from megachameleon.tokens.vocabulary import Vocabulary


def verify_conversion(
    source: Source, before: Side, after: Side, rounding: torch.dtype, *, averages: bool = False
) -> Iterator[str]:
    """Compare both sides of a conversion; yields the lines that tell what was found.

    A Llama that was given QK-norms is another model by them, so it is compared without them, and then with them, which
    is told only.

    Args:
        source: what `before` was opened as.
        rounding: what the weights were written in.
        averages: QK-norms of heads were averaged where they differed, as was asked for.

    Raises:
        ValueError: a side cannot be read.
        FailureError: `after` is another model.
    """
    known, model, origin = source.description.vocabulary, source.description.model, source.description.origin
    vocabulary = Vocabulary.from_dict(known, origin=str(origin)) if known else None
    inner = source
    if isinstance(source, ResizedSource):  # of its rows, those that both sides have
        inner = source.inner
        model = replace(model, vocab_size=min(model.vocab_size, inner.description.model.vocab_size))
    sides, extended = [after], isinstance(inner, LlamaSource)
    if isinstance(inner, LlamaSource):
        before = replace(before, ids=torch.from_numpy(inner.ids))
        if model.qk_norm != "none":
            # First without, where nothing but rounding may differ; a wrong row would hide behind the norms.
            sides = [replace(after, without_qk_norm=True), after]
    found, *more = verify(before, sides, model, vocabulary, rounding)
    how = f"{before.computed_by} on SRC, {after.computed_by} on DST, in fp32"
    but = ", over the ids of SRC" if extended else ""
    but += ", with DST's QK-norms left out" if more else ""
    yield f"{'verified' if found.is_same else 'compared'}: {found}; {how}{but}"
    yield from (f"note: with the QK-norms that DST was given: {other}" for other in more)
    if found.is_same:
        return
    yield from _by_part(found)
    if averages:
        yield "note: more than rounding, as --average-qk-norm says: where heads of a group differed, DST has their mean"
        return
    raise FailureError(
        f"{after.path}: is another model than {origin}: its logits differ by {found.relative:.3g} of the largest, more "
        f"than {TOLERANCE}; do not use it"
    )


def _by_part(found: Comparison) -> Iterator[str]:
    """Where it begins."""
    for part, difference in found.by_part:
        yield f"  after {part}: hidden states differ by {difference:.3g} of the largest"
