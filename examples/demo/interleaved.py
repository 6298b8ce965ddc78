"""Documents of running text with pictures in it: about a word that names share, a Unicode row, or flags."""

import random
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from examples.demo.catalogue import Picture

Segments = list[str | Picture]

BLOCKS = (
    (0x2190, 0x21FF, "Arrows"),
    (0x2300, 0x23FF, "Miscellaneous Technical"),
    (0x2460, 0x24FF, "Enclosed Alphanumerics"),
    (0x25A0, 0x25FF, "Geometric Shapes"),
    (0x2600, 0x26FF, "Miscellaneous Symbols"),
    (0x2700, 0x27BF, "Dingbats"),
    (0x1F100, 0x1F1FF, "Enclosed Alphanumeric Supplement"),
    (0x1F300, 0x1F5FF, "Miscellaneous Symbols and Pictographs"),
    (0x1F600, 0x1F64F, "Emoticons"),
    (0x1F680, 0x1F6FF, "Transport and Map Symbols"),
    (0x1F7E0, 0x1F7FF, "Geometric Shapes Extended"),
    (0x1F900, 0x1F9FF, "Supplemental Symbols and Pictographs"),
    (0x1FA70, 0x1FAFF, "Symbols and Pictographs Extended-A"),
)
SMALL_WORDS = {"with", "in", "of", "and", "the", "on", "no", "&", "up", "down", "right", "left", "facing", "new", "st."}
GROUP_SIZES = range(4, 64)
"""Smaller groups make no document, larger ones share no subject."""
PICTURES_PER_DOCUMENT = (3, 6)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Pictures that belong together and a sentence that says why."""

    name: str
    """Of the group, such as `word heart`."""
    opening: str
    members: tuple[Picture, ...]


@dataclass(frozen=True, kw_only=True)
class InterleavedDocument:
    """Text and pictures in reading order."""

    key: str
    group: str
    segments: Segments


def find_groups(pictures: Sequence[Picture]) -> list[Group]:
    """Groups by shared word, by row of 16 code points of a Unicode block, and flags by first letter."""
    members: dict[tuple[str, str], list[Picture]] = defaultdict(list)
    for picture in pictures:
        name = picture.english
        if picture.is_flag:
            # without its accent: Åland stands under A
            letter = unicodedata.normalize("NFD", name)[0].upper()
            members[f"flags {letter}", f"Flags of the world under the letter {letter}."].append(picture)
            continue
        for word in sorted(set(name.split()) - SMALL_WORDS):
            members[f"word {word}", f"Pictures whose name has the word {word}."].append(picture)
        point = ord(picture.character[0])
        block = next((title for first, last, title in BLOCKS if first <= point <= last), None)
        if block and len(picture.character.rstrip("\ufe0f")) == 1:
            row = f"U+{point >> 4:X}0"
            members[f"row {row}", f"From the Unicode block {block}, near {row}."].append(picture)
    return [
        Group(name=name, opening=opening, members=tuple(group))
        for (name, opening), group in sorted(members.items())
        if len(group) in GROUP_SIZES
    ]


def write_documents(groups: Sequence[Group], count: int, seed: str) -> list[InterleavedDocument]:
    """`count` short documents; each draws its pictures and its wording anew, so that pictures recombine."""
    if not groups:
        return []
    documents = []
    for number in range(count):
        # of its own, so that a document does not depend on how many there are
        generator = random.Random(f"{seed} {number}")
        group = groups[number % len(groups)]
        most = min(PICTURES_PER_DOCUMENT[1], len(group.members))
        chosen = generator.sample(group.members, generator.randint(min(PICTURES_PER_DOCUMENT[0], most), most))
        segments = running_text(group.opening, chosen, generator)
        documents.append(InterleavedDocument(key=f"{seed}_{number:05d}", group=group.name, segments=segments))
    return documents


def running_text(opening: str, pictures: Sequence[Picture], generator: random.Random) -> Segments:
    """An opening sentence, then each picture after its name (most often) or before it."""
    name_first = generator.random() < 0.75
    segments: Segments = []
    text = opening
    for position, picture in enumerate(pictures):
        if name_first:
            lead = ("Here is", "Then comes", "Next is", "And here is")[min(position, 3)]
            segments += [f"{text} {lead} {picture.english}:", picture]
            text = ""
        else:
            segments += [text, picture] if text else [picture]
            text = f" That was {picture.english}."
    if text:
        segments.append(text)
    return segments
