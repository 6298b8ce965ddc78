"""Synthetic files in the form of a Chameleon release's text_tokenizer.json, written from its description alone."""

import json

VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
LETTERS = sorted([chr(byte) for byte in VISIBLE] + [chr(256 + i) for i in range(len(HIDDEN))])
"""The 256 letters of bytes, '!' first."""


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


STEPS = [
    split("(<sentinel:[0-9]+>)"),
    split("(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z"),
    split("([\t\n]|    |  )"),
    {"type": "Digits", "individual_digits": True},
    {"type": "Punctuation", "behavior": "Isolated"},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
]


def special_pieces(codes: int, text_start: int) -> list[str]:
    """Names in the release's order; with 8,192 codes and text from 16,384 they are Chameleon's."""
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    names += ["IMGIMG" + "".join(chr(ord("A") + int(d)) for d in str(code)) + "Z" for code in range(codes)]
    names += ["<eoss>", "<racm3:break>"]
    if codes == 8192:
        names += [f"<sentinel:{i}>" for i in range(512)]
    return names + [f"<reserved{i - 4:05d}>" for i in range(len(names), text_start)]


def merges(count: int) -> list[tuple[str, str]]:
    """Some words and their beginnings first, then pairs of letters until there are `count`."""
    found: dict[tuple[str, str], None] = {("Ġ", "Ġ"): None, ("ĠĠ", "ĠĠ"): None}
    for word in ("Ġthe", "Ġof", "return", "self", "IM", "GI", "reserved", "<s", "01", "Ã©"):
        for end in range(1, len(word)):
            found.setdefault((word[:end], word[end]))
    spelled = {a + b for a, b in found}
    for a in LETTERS:
        for b in LETTERS:
            if a + b not in spelled and len(found) < count:
                found.setdefault((a, b))
    return list(found)[:count]


def release_file(*, codes: int = 8192, text_start: int = 16_384, size: int = 65_536) -> dict:
    """The parsed file; the layout is Chameleon's unless told otherwise."""
    special = special_pieces(codes, text_start)
    pairs = merges(size - text_start - 256)
    pieces = [*special, *LETTERS, *(a + b for a, b in pairs)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for i, name in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [dict(step) for step in STEPS]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [f"{a} {b}" for a, b in pairs],
        },
    }


def write_release(path, **layout):
    path.write_text(json.dumps(release_file(**layout)), encoding="utf-8")
    return path
