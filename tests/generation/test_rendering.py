import numpy as np
import pytest
import torch
from PIL import Image

from megachameleon.generation.rendering import (
    PicturePart,
    TextPart,
    as_html,
    as_json,
    as_markdown,
    contact_sheet,
    render,
    save_pictures,
)


class Texts:
    def decode(self, ids):
        return "".join(chr(one) for one in ids)


class Pictures:
    calls = 0

    def decode(self, codes):
        self.calls += 1
        return codes[:, :1, None, None].to(torch.uint8).expand(-1, 3, 4, 4)


@pytest.fixture
def document(vocabulary):
    picture = vocabulary.encode_image(np.arange(6)).tolist()
    cut = [vocabulary.begin_image, vocabulary.image_code_start]
    return [vocabulary.bos, 60, 62, *picture, 63, *cut, vocabulary.eos]


def test_runs_in_order_and_a_cut_picture_is_not_invented(vocabulary, document):
    decoder = Pictures()
    [parts, again] = render([document, document], vocabulary, Texts(), decoder)
    assert decoder.calls == 1
    assert [type(part) for part in parts] == [TextPart, PicturePart, TextPart, PicturePart]
    assert parts[0].text == "<>"
    assert parts[1].codes == (0, 1, 2, 3, 4, 5)
    assert parts[1].image.size == (4, 4)
    assert not parts[3].complete
    assert parts[3].image is None
    assert len(again) == 4


def test_export(vocabulary, document, tmp_path):
    [parts] = render([document], vocabulary, Texts(), Pictures())
    names = save_pictures(parts, tmp_path, "a")
    assert names == [None, "a-0.png", None, None]
    assert Image.open(tmp_path / "a-0.png").size == (4, 4)
    assert as_json(parts, names) == [
        {"text": "<>"},
        {"image": "a-0.png"},
        {"text": "?"},
        {"incomplete_image": 1, "expected": 6},
    ]
    assert as_markdown(parts, names) == "<>\n\n![picture](a-0.png)\n\n?\n\n*[picture cut off after 1 of 6 codes]*\n"
    assert "&lt;&gt;" in as_html(parts, names)
    assert "after 1 of 6" in as_html(parts, names)


def test_without_a_decoder_codes_stay(vocabulary, document):
    [parts] = render([document], vocabulary, Texts(), None)
    assert parts[1].complete
    assert parts[1].image is None
    assert "no image tokenizer" in as_markdown(parts, [None] * 4)


def test_contact_sheet():
    images = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(5)]
    sheet = contact_sheet(images, columns=3)
    assert sheet.size == (3 * 12 + 4, 2 * 12 + 4)
    assert sheet.getpixel((4 + 12, 4 + 12)) == (4, 0, 0)
    with pytest.raises(ValueError, match="no pictures"):
        contact_sheet([], columns=3)
