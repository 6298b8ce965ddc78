import numpy as np
import pytest

from megachameleon.data.documents import DocumentOptions, documents_of, encode_document
from megachameleon.data.records import Caption, CaptionedRecord, PictureSegment, SegmentsRecord, TextSegment

PICTURE = PictureSegment(b"bytes of a picture", "here")
RECORD = CaptionedRecord("a.tar:k", PICTURE, (Caption("red", "en"), Caption("rot", "de"), Caption("any")))


def captions(**options):
    return [
        d.segments[0 if d.segments[1] is PICTURE else 1].text for d in documents_of(RECORD, DocumentOptions(**options))
    ]


def test_captions_become_documents():
    assert captions() == ["red", "rot", "any"]
    assert captions(captions="first") == ["red"]
    assert captions(languages=("de", "fr")) == ["rot", "any"]
    assert captions(languages=["de"], captions="first") == ["rot"]
    only_english = CaptionedRecord("a", PICTURE, (Caption("red", "en"),))
    assert documents_of(only_english, DocumentOptions(languages=("de",))) == []


def test_order_is_decided_by_content_and_seed():
    def picture_first(seed: int, share: float) -> list[bool]:
        records = [CaptionedRecord(str(i), PICTURE, (Caption(f"caption {i}"),)) for i in range(400)]
        options = DocumentOptions(picture_first=share, seed=seed)
        return [documents_of(record, options)[0].segments[0] is PICTURE for record in records]

    assert picture_first(0, 0.25) == picture_first(0, 0.25) != picture_first(1, 0.25)
    assert 70 <= sum(picture_first(0, 0.25)) <= 130
    assert (sum(picture_first(0, 0)), sum(picture_first(0, 1))) == (0, 400)


@pytest.mark.parametrize("options", [{"picture_first": 1.5}, {"captions": "some"}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DocumentOptions(**options)


def test_encoded_documents_hold_everything_in_order(tokenizer_folder):
    from megachameleon.tokens.text import TextTokenizer

    tokenizer = TextTokenizer.load(tokenizer_folder)
    vocabulary = tokenizer.vocabulary
    record = SegmentsRecord("r", (TextSegment("one"), PICTURE, TextSegment("two")))
    (document,) = documents_of(record, DocumentOptions())
    ids = encode_document(document, tokenizer, {PICTURE.content_hash: np.array([1, 2, 3, 4])})
    expected = [vocabulary.bos, *tokenizer.encode("one"), *vocabulary.encode_image([1, 2, 3, 4])]
    assert ids.tolist() == [*expected, *tokenizer.encode("two"), vocabulary.eos]
