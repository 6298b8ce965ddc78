"""What is found in a checkpoint: facts in sections, files, and its tensors under one or two sets of names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megachameleon.checkpoint.inspection.naming import PARTS, part_of
from megachameleon.checkpoint.inspection.tensors import Tensors
from megachameleon.config import ModelConfig

Facts = dict[str, Any]
"""Plain values by what they are, as JSON takes them; in the order in which they are told."""


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """A file of a checkpoint."""

    name: str
    """Relative to the folder."""
    num_bytes: int | None
    """None: it is missing."""
    num_tensors: int = 0
    holds: str = ""
    """What is in it, in words."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """What the checkpoint says of its bytes, by algorithm: `sha256` or `md5`."""

    def as_plain(self) -> Facts:
        """For JSON."""
        return {
            "name": self.name,
            "bytes": self.num_bytes,
            "tensors": self.num_tensors,
            "holds": self.holds,
            **dict(self.digests),
        }


@dataclass(kw_only=True)
class Report:
    """One checkpoint."""

    path: Path
    """The folder or file that is described, not the run that holds it."""
    format: Literal["megatron", "hf", "meta", "files", "conversion"]
    what: str
    """In a line."""
    stored: Tensors
    """Under the names of the files."""
    plain: Tensors | None = None
    """Of a decoder, under plain names, whatever the format; None: it is no such decoder, or it is not known which."""
    masters: Tensors | None = None
    """The fp32 masters of a bf16 run, under plain names; None: there are none."""
    model: ModelConfig | None = None
    vocabulary: Mapping[str, Any] | None = None
    tokenizers: Mapping[str, str | None] = field(default_factory=dict)
    sections: dict[str, Facts] = field(default_factory=dict)
    files: list[FileInfo] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What is damaged or missing, a line each."""
    notes: list[str] = field(default_factory=list)
    """What is as it should be and still worth a line."""
    as_stored: bool = False
    """Show the names of the files where there are plain ones too."""

    def take_masters(self) -> None:
        """Go on with the fp32 masters as the weights.

        Raises:
            ValueError: there are none.
        """
        if self.masters is None:
            raise ValueError(f"{self.path}: has no fp32 masters (fp32 weights are their own); leave --masters out")
        self.plain = self.masters

    @property
    def uses_plain(self) -> bool:
        """Whether tensors are shown under plain names."""
        return self.plain is not None and not self.as_stored

    @property
    def tensors(self) -> Tensors:
        """Under plain names where there are any, or as stored where that is wanted."""
        return self.plain if self.plain is not None and not self.as_stored else self.stored

    @property
    def weights(self) -> Facts:
        """Parameters and types; the state of an optimizer is none, and pictures' encoders count by themselves."""
        named = self.stored if self.plain is None else self.plain
        infos = {name: info for name, info in named.infos.items() if not name.startswith("optimizer.")}
        if self.plain is not None:  # beside the decoder
            infos |= {n: i for n, i in self.stored.infos.items() if part_of(n) == "picture encoder"}
        parts = dict.fromkeys(PARTS, 0)
        dtypes: dict[str, int] = {}
        for name, info in infos.items():
            values = info.num_values
            if self.model is not None and self.plain is not None and "_norm." in name:
                values = values // info.shape[0] * self.model.qk_norm_groups  # rows are repeated for each head
            parts[part_of(name)] += values
            dtype = str(info.dtype).removeprefix("torch.")
            dtypes[dtype] = dtypes.get(dtype, 0) + values
        return {
            "total": sum(parts.values()),
            "by_part": {name: count for name, count in parts.items() if count},
            "by_dtype": dict(sorted(dtypes.items(), key=lambda item: -item[1])),
        }

    def as_plain(self) -> Facts:
        """For JSON."""
        infos = self.tensors.infos
        return {
            "path": str(self.path),
            "format": self.format,
            "what": self.what,
            "parameters": self.weights,
            **{title.replace(" ", "_"): facts for title, facts in self.sections.items()},
            "files": [file.as_plain() for file in self.files],
            "names": "plain" if self.uses_plain else "as stored",
            "tensors": {
                name: {
                    "shape": list(info.shape),
                    "dtype": str(info.dtype).removeprefix("torch."),
                    "files": list(info.files),
                    **({"problem": info.problem} if info.problem else {}),
                }
                for name, info in infos.items()
            },
            "notes": self.notes,
            "problems": self.problems,
        }
