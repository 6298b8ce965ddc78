"""Which captions and pictures training sees, and which it never sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from examples.demo.catalogue import Picture
from examples.demo.splits import is_held_out

HELD_OUT = 0.1
"""Share of names and of skin-tone variants."""


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Who is seen and who is held out.

    Attributes:
        pictures: all of them.
        plain: pictures without skin tones; all are seen under their English name.
        world_seen, world_held_out: key of a picture -> language -> name, for languages other than English.
        tones_seen, tones_held_out: pictures with skin tones; a held-out one is seen nowhere.
    """

    pictures: list[Picture]
    plain: list[Picture]
    world_seen: dict[str, dict[str, str]]
    world_held_out: dict[str, dict[str, str]]
    tones_seen: list[Picture]
    tones_held_out: list[Picture]


def split_captions(pictures: Sequence[Picture], png: Mapping[str, bytes]) -> Captions:
    """Divide pictures and languages into what training sees and what it never sees.

    Some variants are drawn alike (an artist is drawn like a man artist), so skin tones are held out by the drawing.
    """
    plain = [p for p in pictures if not p.tones]
    tones = [p for p in pictures if p.tones]
    world_seen, world_held_out = {}, {}
    for picture in plain:
        seen, held_out = split_languages(picture)
        world_seen[picture.key], world_held_out[picture.key] = seen, held_out
    # by the hash of the picture: two names of one drawing must fall on the same side
    hidden = [p for p in tones if p.base and is_held_out(HELD_OUT, "tone", sha256(png[p.key]).hexdigest())]
    return Captions(
        pictures=list(pictures),
        plain=plain,
        world_seen=world_seen,
        world_held_out=world_held_out,
        tones_seen=[p for p in tones if p not in hidden],
        tones_held_out=hidden,
    )


def split_languages(picture: Picture) -> tuple[dict[str, str], dict[str, str]]:
    """Names that training sees and names that it does not, without English.

    A name that is spelled the same in a language that is seen ("pizza") would be no test, so it stays with the seen.
    """
    others = {language: name for language, name in picture.names.items() if language != "en"}
    held_out = {lang: name for lang, name in others.items() if is_held_out(HELD_OUT, "language", picture.key, lang)}
    spelled = {name.casefold() for lang, name in picture.names.items() if lang not in held_out}
    held_out = {lang: name for lang, name in held_out.items() if name.casefold() not in spelled}
    return {lang: name for lang, name in others.items() if lang not in held_out}, held_out
