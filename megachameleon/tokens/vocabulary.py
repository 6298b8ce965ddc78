"""The mixed-modal vocabulary: which id means what.

One immutable object says it for tokenizers, shards, model, loss and generation. The default is Chameleon's own layout
(arXiv 2405.09818, section 2.1, and the released tokenizer's id map): 65,536 ids, picture codes at 4..8195.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from megachameleon.files import read_json, write_json

VOCABULARY_FILE = "vocabulary.json"
"""In a tokenizer's folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """Ids of a mixed-modal token stream. All ranges are half-open; a picture is `begin_image + codes + end_image`."""

    size: int = 65_536
    """Number of ids: control ids, picture codes, reserved ids and text pieces together."""
    bos: int = 0
    """Begins a document."""
    pad: int = 1
    """Fills samples; never in a document."""
    eos: int = 2
    """Ends a document."""
    unk: int = 3
    """Of text that cannot be spelled; ours always can, so it is never written."""
    image_code_start: int = 4
    """Id of picture code 0; code c has id `image_code_start + c`."""
    num_image_codes: int = 8_192
    """Codes of the codebook, each with an id of its own."""
    end_image: int = 8_196
    """Ends a picture; `<eoss>` in the release."""
    begin_image: int = 8_197
    """Begins a picture; `<racm3:break>` in the release. It has the higher id of the two."""
    turn_separator: int = 8_710
    """Ends a turn of a conversation."""
    text_start: int = 16_384
    """Id of the first text piece; all ids from here to `size` are text."""
    image_grid: tuple[int, int] = (32, 32)
    """Rows and columns of codes in one picture, in raster order."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_grid", tuple(self.image_grid))
        if self.size > 2**31:
            raise ValueError(f"vocabulary: size={self.size} must be at most 2**31, for ids are int32")
        controls = self.control_ids
        codes = range(self.image_code_start, self.image_code_end)
        if len(set(controls.values())) != len(controls):
            raise ValueError(f"vocabulary: two control ids are equal in {controls}; give each its own id")
        if self.num_image_codes < 1 or min(self.image_grid) < 1:
            raise ValueError(
                f"vocabulary: num_image_codes={self.num_image_codes} and image_grid={self.image_grid} must be positive"
            )
        for name, value in controls.items():
            if value in codes or not 0 <= value < self.text_start:
                raise ValueError(
                    f"vocabulary: {name}={value} must lie below text_start={self.text_start} "
                    f"and outside the picture codes {codes.start}..{codes.stop - 1}"
                )
        if not 0 <= codes.start < codes.stop <= self.text_start < self.size:
            raise ValueError(
                f"vocabulary: picture codes {codes.start}..{codes.stop - 1}, text_start={self.text_start}, "
                f"size={self.size}; they must come in this order"
            )

    @classmethod
    def compact(cls, *, num_text_ids: int, num_image_codes: int, image_grid: tuple[int, int]) -> "Vocabulary":
        """A small vocabulary in Chameleon's order without its reserved ids, for demos and tests.

        The size is rounded up to a multiple of 64, so that it divides over tensor-parallel ranks.
        """
        codes_end = 4 + num_image_codes
        text_start = codes_end + 3
        size = -(-(text_start + num_text_ids) // 64) * 64
        return cls(
            size=size,
            num_image_codes=num_image_codes,
            end_image=codes_end,
            begin_image=codes_end + 1,
            turn_separator=codes_end + 2,
            text_start=text_start,
            image_grid=image_grid,
        )

    @classmethod
    def extended(cls, *, num_text_ids: int, num_image_codes: int, image_grid: tuple[int, int]) -> "Vocabulary":
        """The vocabulary of a text model that learns pictures: Chameleon's order, some reserved ids, then its text.

        At least 64 ids behind the separator are reserved: Hugging Face's exports have `<image>` there, and later
        control tokens find room. The size is a multiple of 128, so that it divides over tensor-parallel ranks.
        """
        separator = 4 + num_image_codes + 2
        size = -(-(separator + 1 + 64 + num_text_ids) // 128) * 128
        return cls(
            size=size,
            num_image_codes=num_image_codes,
            end_image=separator - 2,
            begin_image=separator - 1,
            turn_separator=separator,
            text_start=size - num_text_ids,
            image_grid=image_grid,
        )

    @property
    def control_ids(self) -> dict[str, int]:
        """Control ids by name."""
        names = ("bos", "pad", "eos", "unk", "end_image", "begin_image", "turn_separator")
        return {name: getattr(self, name) for name in names}

    @property
    def image_code_end(self) -> int:
        """One past the id of the last picture code."""
        return self.image_code_start + self.num_image_codes

    @property
    def num_text_ids(self) -> int:
        """Number of text pieces."""
        return self.size - self.text_start

    @property
    def codes_per_image(self) -> int:
        """Number of codes in one picture."""
        return self.image_grid[0] * self.image_grid[1]

    @property
    def image_length(self) -> int:
        """Number of ids of one picture: begin, codes, end."""
        return self.codes_per_image + 2

    @property
    def token_dtype(self) -> type[np.uint16] | type[np.int32]:
        """The dtype of ids in shards: uint16 whenever they fit, also at exactly 65,536."""
        # megatron-core's optimal_dtype would choose int32 from 65,500 on, twice the bytes
        return np.uint16 if self.size <= 65_536 else np.int32

    @property
    def fingerprint(self) -> str:
        """A short hash of the whole layout, to compare tokenizers, shards and checkpoints."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def is_image_code(self, ids: Any) -> Any:
        """Which ids are picture codes. Works elementwise on numpy arrays, torch tensors and plain integers."""
        return (ids >= self.image_code_start) & (ids < self.image_code_end)

    def encode_image(self, codes: np.ndarray) -> np.ndarray:
        """Picture codes [codes_per_image] to ids [image_length]: begin, codes, end.

        Raises:
            ValueError: wrong number of codes, or a code outside the codebook.
        """
        codes = np.asarray(codes).reshape(-1).astype(np.int64)
        if len(codes) != self.codes_per_image:
            raise ValueError(f"picture: {len(codes)} codes, but the vocabulary's pictures have {self.codes_per_image}")
        if codes.min() < 0 or codes.max() >= self.num_image_codes:
            raise ValueError(
                f"picture: codes {codes.min()}..{codes.max()} are outside the codebook 0..{self.num_image_codes - 1}; "
                "the image tokenizer does not belong to this vocabulary"
            )
        return np.concatenate(([self.begin_image], codes + self.image_code_start, [self.end_image]))

    def save(self, folder: Path) -> None:
        """Write `vocabulary.json` into `folder`."""
        write_json(folder / VOCABULARY_FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Vocabulary":
        """Read `vocabulary.json` from `folder`.

        Raises:
            ValueError: the file is missing, is not JSON, or does not describe a vocabulary.
        """
        path = folder / VOCABULARY_FILE
        return cls.from_dict(read_json(path), origin=str(path))

    @classmethod
    def from_dict(cls, values: dict, origin: str) -> "Vocabulary":
        """Rebuild a vocabulary from plain values; `origin` names their source in errors.

        Raises:
            ValueError: not these fields, a value of another type, or values that contradict each other.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            wrong = sorted(names ^ set(values)) if isinstance(values, dict) else "no mapping"
            raise ValueError(f"{origin}: not a vocabulary (missing or unknown: {wrong}); write it again")
        for name, value in values.items():
            is_grid = name == "image_grid"
            numbers = value if is_grid and isinstance(value, list | tuple) else [value]
            # type() and not isinstance(), for which true would be a number
            if len(numbers) != (2 if is_grid else 1) or any(type(number) is not int for number in numbers):
                wanted = "two whole numbers" if is_grid else "a whole number"
                raise ValueError(f"{origin}: {name}={value!r} is not {wanted}; write it again")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None

    def require_same(self, other: "Vocabulary", mine: str, theirs: str) -> None:
        """Refuse to mix two vocabularies.

        Raises:
            ValueError: they differ; names the first field that does.
        """
        for field in fields(self):
            a, b = getattr(self, field.name), getattr(other, field.name)
            if a != b:
                raise ValueError(
                    f"vocabulary of {mine} has {field.name}={a} but that of {theirs} has {b}; use matching ones"
                )
