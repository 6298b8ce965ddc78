"""How pieces are spelled in files of the `tokenizers` library: special ones as in Chameleon's release, text by bytes.

In the release code c is called IMGIMG, its decimal digits as letters A to J, Z; reserved pieces carry their id less 4.
None of these names is ever looked up in text.
"""

from functools import cache

from megachameleon.tokens.vocabulary import Vocabulary

CONTROL_NAMES = {
    "bos": "<s>",
    "pad": "<pad>",
    "eos": "</s>",
    "unk": "<unk>",
    "end_image": "<eoss>",
    "begin_image": "<racm3:break>",
}


IMAGE_PLACEHOLDER = "<image>"
"""What transformers' processor writes for a picture."""


def image_placeholder(vocabulary: Vocabulary) -> int:
    """The id that transformers calls `<image>`, which holds a picture's places until its codes are known.

    It is the one after the turn separator where that is reserved, as in Hugging Face's form of Chameleon's release
    (8711). A vocabulary without reserved ids there lends `unk`, which no text becomes: all of it can be spelled.
    """
    spare = vocabulary.turn_separator + 1
    taken = spare >= vocabulary.text_start or spare in vocabulary.control_ids.values()
    return vocabulary.unk if taken or vocabulary.is_image_code(spare) else spare


def code_name(code: int) -> str:
    """The name of a picture code: 0 is IMGIMGAZ, 1002 is IMGIMGBAACZ."""
    return "IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z"


def special_names(vocabulary: Vocabulary) -> list[str]:
    """The names of all ids below `text_start`, in order of ids."""
    names = [f"<reserved{i - 4:05d}>" for i in range(vocabulary.text_start)]
    for field, name in CONTROL_NAMES.items():
        names[getattr(vocabulary, field)] = name
    for code in range(vocabulary.num_image_codes):
        names[vocabulary.image_code_start + code] = code_name(code)
    return names


@cache
def byte_letters() -> tuple[str, ...]:
    """The letter of each byte in byte-level BPE: its own where that is visible, else one from U+0100 on."""
    # GPT-2's table of bytes, in which 0xAD, the soft hyphen, counts as invisible
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return tuple(chr(byte) if byte in visible else chr(0x100 + hidden.index(byte)) for byte in range(256))


def spelled_bytes(piece: str) -> bytes:
    """What a piece of byte-level BPE spells.

    Raises:
        KeyError: a character of it stands for no byte.
    """
    values = _byte_values()
    return bytes([values[letter] for letter in piece])


@cache
def _byte_values() -> dict[str, int]:
    return {letter: byte for byte, letter in enumerate(byte_letters())}
