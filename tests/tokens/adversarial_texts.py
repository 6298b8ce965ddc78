"""Texts that tokenizers get wrong."""

import random

TEXTS = [
    "",
    " ",
    "  a  b ",
    "     five and   three",
    "\n\n\t x\r\n\r",
    "▁ ▁▁a ▁",
    "<0x41>",
    "<unk>",
    "<s></s><pad>",
    "x<racm3:break>IMGIMGAZIMGIMGBAACZ<eoss><reserved08706>",
    "IMGIMGAZ yIMGIMGIBJBZy IMGIMGJZ",
    "<sentinel:5> <image>",
    " ⁇ ",
    "a\0b\x1f\x7f",
    "e\u0301é\u0308\u20dd",
    "👩🏽\u200d🚀🇩🇪",
    "\u202eabc\u202c שלום مرحبا",
    "\uff11\uff12 ٣٤ ½ ⅷ",
    "don't we'll — “so” ¿no?",
    "\u2028\u2029\x85\x0b\x0c\xa0\u3000\u200b\ufeff",
    "\ufffd\uffff\U0010ffff\ue000",
    "漢字かな交じり文 Привет",
    "x" * 3000,
    " " * 777,
    "\n" * 777,
]


def mixtures(count: int, parts: list[str]) -> list[str]:
    """Random sequences of `parts` and of troublesome characters."""
    draw = random.Random(0)
    troublesome = [*"ab 1▁\n\t<>éß漢🙂\u200d\r\0sIMGZ_()=", "  ", "    ", "<s>", "IMGIMGAZ"]
    return ["".join(draw.choices(draw.choice([parts, troublesome]), k=draw.randrange(1, 20))) for _ in range(count)]
