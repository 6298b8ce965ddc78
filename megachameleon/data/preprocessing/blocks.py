"""What worker processes do: a batch of raw records becomes a block of ids, with holes where codes have to come.

Nothing here depends on which process does it or on what it did before, so blocks are the same for any number of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megachameleon.data.documents import Document, DocumentOptions, documents_of
from megachameleon.data.plan import ORDINAL_BITS
from megachameleon.data.preprocessing.block import Batch, Block
from megachameleon.data.preprocessing.picture_codes import CodeCaches, code_key
from megachameleon.data.records import BadRecord, PictureSegment, TextSegment
from megachameleon.data.sources.beside import found_hash
from megachameleon.data.sources.raw import RawRecord
from megachameleon.data.sources.reading import parse_raw
from megachameleon.tokens.text import TextTokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSettings:
    """What a worker needs to know."""

    tokenizer: Path
    options: DocumentOptions
    image_tokenizer: str | None
    """Fingerprint; None where no picture is expected."""
    image_size: int
    """Side of a prepared picture in pixels."""
    caches: tuple[Path, ...] = ()
    """Folders to look for codes in."""


def make_block_work(settings: BlockSettings) -> Callable[[Batch], Block]:
    """Load what a worker needs, once."""
    return _BlockMaker(settings)


class _BlockMaker:
    def __init__(self, settings: BlockSettings) -> None:
        self._settings = settings
        self._tokenizer = TextTokenizer.load(settings.tokenizer)
        self._vocabulary = self._tokenizer.vocabulary
        self._dtype = np.dtype(self._vocabulary.token_dtype)
        codes = [self._vocabulary.image_code_start] * self._vocabulary.codes_per_image
        self._picture = np.array([self._vocabulary.begin_image, *codes, self._vocabulary.end_image], self._dtype)
        self._bos, self._eos = (np.array([i], self._dtype) for i in (self._vocabulary.bos, self._vocabulary.eos))
        self._caches: CodeCaches | None = None
        if settings.image_tokenizer is not None and settings.caches:
            self._caches = CodeCaches(
                settings.caches, settings.image_tokenizer, self._vocabulary.codes_per_image, read_only=True
            )

    def __call__(self, batch: Batch) -> Block:
        references: list[tuple[str, str]] = []
        last = batch.records[-1]
        block = Block(
            input=batch.input,
            num_records=len(batch.records),
            position=last.position if isinstance(last, RawRecord) else 0,
            ids=np.empty(0, self._dtype),
            lengths=np.empty(0, np.int64),
            holes=np.empty(0, np.int64),
            keys=[],
            codes={},
            pixels={},
            references=references,
        )
        groups = self._documents(batch, block)
        broken = self._prepare([picture for _, group in groups for d in group for picture in d.pictures], block)
        parts: list[np.ndarray] = [block.ids]
        lengths: list[int] = []
        holes: list[int] = []
        end = 0
        for place, group in groups:
            if reason := self._broken(group, broken):
                block.bad.append(BadRecord("", place, reason))
                continue
            for document in group:
                start, end = end, self._append(document, end, parts, holes, block.keys)
                lengths.append(end - start)
        wanted = set(block.keys)
        # a record with one bad picture is left out whole; the others of it need not be encoded
        block.pixels = {key: pixels for key, pixels in block.pixels.items() if key in wanted}
        block.ids, block.lengths = np.concatenate(parts), np.array(lengths, np.int64)
        block.holes = np.array(holes, np.int64)
        return block

    def close(self) -> None:
        """Let go of the caches."""
        if self._caches is not None:
            self._caches.close()

    def _documents(self, batch: Batch, block: Block) -> list[tuple[str, list[Document]]]:
        """The documents to write, by place of their records."""
        drop = set(batch.drop.tolist())
        groups = []
        for number, raw in enumerate(batch.records):
            record = raw if isinstance(raw, BadRecord) else parse_raw(raw, _noted_in(block.references))
            if isinstance(record, BadRecord):
                block.bad.append(record)
                continue
            documents = documents_of(record, self._settings.options)
            block.num_filtered += not documents
            # records are counted with the bad ones, as when the plan was made
            if drop:
                kept = [d for k, d in enumerate(documents) if number << ORDINAL_BITS | k not in drop]
                block.num_duplicates += len(documents) - len(kept)
                documents = kept
            groups.append((record.origin, documents))
        return groups

    def _prepare(self, pictures: list[PictureSegment], block: Block) -> dict[str, str]:
        """Look up or prepare all pictures; returns by key why one cannot be."""
        if not pictures:
            return {}
        # imported here: workers that see text alone do without Pillow
        from megachameleon.tokens.pictures import prepare_encoded

        # a plan with damaged archives cannot know of pictures beforehand
        if self._settings.image_tokenizer is None:
            raise ValueError(
                "the input holds pictures; plan again with --image-tokenizer DIR and --replace, then run again"
            )
        exact = self._settings.options.exact_pictures
        # by key: a picture that stands in many documents is prepared once
        wanted = {code_key(picture, exact): picture for picture in pictures}
        if self._caches is not None:
            block.codes = self._caches.get(wanted)
        broken: dict[str, str] = {}
        for key, picture in wanted.items():
            if key not in block.codes:
                try:
                    block.pixels[key] = prepare_encoded(
                        picture.data, picture.origin, self._settings.image_size, fit=picture.fit, exact=exact
                    )
                except ValueError as error:
                    broken[key] = str(error).removeprefix(f"{picture.origin}: ")
        return broken

    def _broken(self, group: list[Document], broken: dict[str, str]) -> str:
        if broken:
            exact = self._settings.options.exact_pictures
            for picture in (picture for document in group for picture in document.pictures):
                if (key := code_key(picture, exact)) in broken:
                    return f"{picture.origin}: {broken[key]}"
        return ""

    def _append(
        self, document: Document, start: int, parts: list[np.ndarray], holes: list[int], keys: list[str]
    ) -> int:
        """Add the arrays of a document that begins at `start`; returns where it ends."""
        parts.append(self._bos)
        end = start + 1
        for segment in document.segments:
            if isinstance(segment, TextSegment):
                parts.append(self._tokenizer.encode_array(segment.text))
            else:
                # behind the begin id
                holes.append(end + 1)
                keys.append(code_key(segment, self._settings.options.exact_pictures))
                parts.append(self._picture)
            end += len(parts[-1])
        parts.append(self._eos)
        return end + 1


def _noted_in(references: list[tuple[str, str]]) -> Callable[[str, bytes | None], None]:
    def note(name: str, content: bytes | None) -> None:
        references.append((name, found_hash(content)))

    return note
