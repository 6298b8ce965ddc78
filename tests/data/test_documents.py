import pytest

from megachameleon.data.documents import Document, DocumentOptions, document_digest, documents_of
from megachameleon.data.records import Caption, CaptionedRecord, PictureSegment, TextSegment

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


def test_digests_tell_contents_apart():
    def digest(*segments):
        return document_digest(Document(segments))

    a, b = TextSegment("a"), TextSegment("b")
    different = [
        (a,), (b,), (a, b), (b, a), (TextSegment("ab"),), (a, PICTURE), (PICTURE, a), (PICTURE,),
        (PictureSegment(PICTURE.data, "here", "pad"),), (PictureSegment(b"other", "here"),),
    ]  # fmt: skip
    assert len({digest(*segments) for segments in different}) == len(different)
    assert digest(a, PICTURE) == digest(a, PictureSegment(PICTURE.data, "elsewhere"))
