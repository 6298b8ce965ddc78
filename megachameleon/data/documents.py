"""Records into documents: text and pictures in the order in which the model sees them."""

import hashlib
from dataclasses import dataclass

from megachameleon.data.records import Caption, CaptionedRecord, PictureSegment, Record, Segment, TextSegment


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentOptions:
    """How records become documents."""

    picture_first: float = 0.5
    """Share of captioned pictures that stand before their caption."""
    captions: str = "all"
    """"all": a document for each caption; "first": only for the first one."""
    languages: tuple[str, ...] = ()
    """Captions to keep, by language; those without a language always stay. Empty keeps all."""
    seed: int = 0
    """Decides, with the content, what stands first."""
    exact_pictures: bool = False
    """Pictures are prepared by Pillow alone instead of the faster way that comes within a stated distance."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "languages", tuple(self.languages))
        if not 0 <= self.picture_first <= 1:
            raise ValueError(f"picture_first={self.picture_first}: must lie between 0 and 1")
        if self.captions not in ("all", "first"):
            raise ValueError(f"captions={self.captions!r}: must be all or first")


@dataclass(frozen=True, slots=True)
class Document:
    """Text and pictures in the order in which the model sees them."""

    segments: tuple[Segment, ...]

    @property
    def pictures(self) -> list[PictureSegment]:
        """The pictures in order."""
        return [segment for segment in self.segments if isinstance(segment, PictureSegment)]


def documents_of(record: Record, options: DocumentOptions) -> list[Document]:
    """The documents that a record becomes: one, or one for each caption; none if its languages are not wanted."""
    if not isinstance(record, CaptionedRecord):
        return [Document(record.segments)]
    captions = [caption for caption in record.captions if _wanted(caption, options)]
    if options.captions == "first":
        captions = captions[:1]
    documents = []
    for caption in captions:
        text = TextSegment(caption.text)
        # by content and not by place, so the order of a pair is the same however records are shared among units
        first = _share(options.seed, record.picture.content_hash, caption.text) < options.picture_first
        documents.append(Document((record.picture, text) if first else (text, record.picture)))
    return documents


def document_digest(document: Document) -> bytes:
    """16 bytes that tell documents of different content apart: texts, and contents of pictures, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for segment in document.segments:
        if isinstance(segment, TextSegment):
            # the length in front, so that two texts side by side never equal one longer text
            data = segment.text.encode()
            digest.update(b"t" + len(data).to_bytes(8, "little") + data)
        else:
            # the fit is part of it: a cropped and a padded picture have other codes
            digest.update(f"p{segment.fit}:{segment.content_hash}".encode())
    return digest.digest()


def _wanted(caption: Caption, options: DocumentOptions) -> bool:
    return not options.languages or caption.language is None or caption.language in options.languages


def _share(seed: int, *content: str) -> float:
    """A number in [0, 1) that content and seed decide."""
    # not Python's hash(), which has another seed in each process
    digest = hashlib.sha256("\0".join([str(seed), *content]).encode()).digest()
    return int.from_bytes(digest[:8], "little") / 2**64
