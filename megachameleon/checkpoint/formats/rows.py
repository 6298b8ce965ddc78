"""Embedding and head with other rows than the source's, on request: ids at the end are left out, or get new rows.

What ids mean is a vocabulary's to say. Rows behind its last id are padding that others add to their tables; rows that
it lacks cannot be made up. So a table is cut or padded only when the number of rows is asked for.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from megachameleon.checkpoint.boxes import Box
from megachameleon.checkpoint.formats.new_rows import BLOCK, TABLES, NewRows, new_rows
from megachameleon.checkpoint.formats.plain import Description, KnownHash, Source
from megachameleon.tokens.text import TextTokenizer
from megachameleon.tokens.vocabulary import Vocabulary


def require_rows(description: Description) -> None:
    """Refuse a source that has other rows than its vocabulary has ids.

    Raises:
        ValueError: it has; names the remedy.
    """
    if description.vocabulary is None:
        return
    rows, ids = description.model.vocab_size, _vocabulary(description).size
    if rows != ids:
        how = f"leaves out the last {rows - ids:,}" if rows > ids else f"draws {ids - rows:,} new ones"
        raise ValueError(
            f"{description.origin}: embedding and head have {rows:,} rows, but the vocabulary {ids:,} ids; give the "
            f"tokenizer that belongs to it, or --vocab-size {ids}, which {how}"
        )


def grown(vocabulary: Vocabulary, rows: int) -> Vocabulary:
    """The vocabulary with text ids up to `rows`, for a format in which every row is an id."""
    return replace(vocabulary, size=rows) if rows > vocabulary.size else vocabulary


class ResizedSource:
    """A source whose embedding and head end elsewhere."""

    def __init__(self, source: Source, rows: int, *, tokenizer: Path | None = None) -> None:
        """
        Args:
            rows: of embedding and head.
            tokenizer: a text tokenizer's folder of ours, if the rows are to be those of its vocabulary.

        Raises:
            ValueError: ids would be cut that mean something, or the tokenizer's vocabulary is another one.
        """
        self.inner = source
        """As it is without other rows."""
        before = _with_tokenizer(source.description, tokenizer)
        old = before.model.vocab_size
        if before.vocabulary is not None:
            _require_unused(_vocabulary(before), rows, before.origin)
        self._old = min(old, rows)
        known = source.description.vocabulary is not None
        self._text_start = _vocabulary(source.description).text_start if known else 0
        self._new: dict[str, NewRows] = {}
        if rows > old:
            self._new = {name: new_rows(name, self._blocks(name)) for name in TABLES}
        model = replace(before.model, vocab_size=rows)
        self.description = replace(
            before,
            model=model,
            run=replace(before.run, model=model) if before.run else None,
            identity=f"{before.identity} {rows} rows, new ones as from {self._text_start} on",
            notes=(*before.notes, *_notes(before, old, rows)),
        )

    def hashes(self) -> list[KnownHash]:
        """See `Source`."""
        return self.inner.hashes()

    def read(self, name: str, box: Box) -> Tensor:
        """See `Source`."""
        end = box.offset[0] + box.shape[0]
        if name not in TABLES or end <= self._old:
            return self.inner.read(name, box)
        values = torch.empty(box.shape, dtype=self.description.dtype)
        known = max(self._old - box.offset[0], 0)
        if known:
            values[:known] = self.inner.read(name, Box(box.offset, (known, box.shape[1])))
        places = range(known, box.shape[0])
        self._new[name].fill(values, ((place, box.offset[0] + place) for place in places), box)
        return values

    def _blocks(self, name: str) -> Iterator[Tensor]:
        """Rows of text, or all where nobody knows which those are."""
        description = self.inner.description
        for first in range(self._text_start, self._old, BLOCK):
            shape = (min(BLOCK, self._old - first), description.model.hidden_size)
            yield self.inner.read(name, Box((first, 0), shape))


def _vocabulary(description: Description) -> Vocabulary:
    assert description.vocabulary is not None
    return Vocabulary.from_dict(description.vocabulary, origin=str(description.origin))


def _with_tokenizer(description: Description, folder: Path | None) -> Description:
    """The source with the vocabulary of a tokenizer that has more or fewer text ids, and is otherwise the same."""
    if folder is None or description.vocabulary is None:
        return description
    mine, theirs = _vocabulary(description), Vocabulary.load(folder)
    # A tokenizer that fits as it is needs no other vocabulary in the checkpoint.
    if theirs == mine and theirs.size <= description.model.vocab_size:
        return description
    replace(mine, size=theirs.size).require_same(theirs, str(description.origin), str(folder))
    names = {**description.tokenizers, "text": TextTokenizer.load(folder).fingerprint}
    return replace(description, vocabulary=asdict(theirs), tokenizers=names)


def _require_unused(vocabulary: Vocabulary, rows: int, origin: Path) -> None:
    """Raise ValueError if ids from `rows` on mean something."""
    if rows >= vocabulary.size:
        return
    cut = [f"{vocabulary.size - max(rows, vocabulary.text_start):,} text pieces"]
    if codes := max(vocabulary.image_code_end - max(rows, vocabulary.image_code_start), 0):
        cut.append(f"{codes:,} picture codes")
    if controls := [name for name, i in vocabulary.control_ids.items() if i >= rows]:
        cut.append(f"the control ids {', '.join(controls)}")
    remedy = f"give at least --vocab-size {vocabulary.size}"
    if rows > vocabulary.text_start:
        remedy += f", or with --tokenizer a text tokenizer of {rows:,} ids"
    raise ValueError(f"--vocab-size {rows}: would cut {' and '.join(cut)} off {origin}; {remedy}")


def _notes(description: Description, old: int, rows: int) -> Iterator[str]:
    """What was done to the tables."""
    if rows == old:
        return
    known = description.vocabulary is not None
    if rows < old:
        what = "which no id of the vocabulary has" if known else "whose ids may mean something: nothing here says it"
        yield f"embedding and head: the last {old - rows:,} of {old:,} rows are left out, {what}"
        return
    yield f"embedding and head: {rows - old:,} new rows behind {old:,}, drawn around the mean of the rows of text"
    if known and rows > (size := _vocabulary(description).size):
        yield (
            f"{rows - size:,} rows have no id in the vocabulary of {size:,}: ours gets as many ids more, others "
            "keep them as padding"
        )
