"""What the report shows: drawings, reconstructions, captions, continued text, an interleaved document."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.demo.report_metrics import read_optional, read_rows
from megachameleon.evaluation.captions import comparable

LANGUAGES = {
    "ar": "Arabic", "de": "German", "en": "English", "es": "Spanish", "fa": "Persian", "fr": "French",
    "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "pt": "Portuguese", "ru": "Russian",
    "tr": "Turkish", "zh": "Chinese",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A prompt, what the model drew and the real picture beside it; pictures are data URIs or None."""

    prompt: str
    language: str
    """In English."""
    kind: str
    """As in `prompt_files.KINDS`, or `fixed`."""
    drawn: str | None
    """None where the model drew nothing."""
    real: str | None

    @property
    def held_out(self) -> bool:
        """Whether training never saw this caption."""
        return self.kind.startswith("held-out")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A picture, the caption that the model gave it, and its name."""

    picture: str | None
    said: str
    """By the model."""
    name: str

    @property
    def right(self) -> bool:
        """Whether both are the same words."""
        return comparable(self.said) == comparable(self.name)


def data_uri(path: Path) -> str | None:
    """A PNG as a data URI; None when there is no such file."""
    if not path.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def results(folder: Path) -> list[dict[str, Any]]:
    """What one call of `tools/generate.py` wrote: a row for each prompt, in order; empty when it has not run."""
    return read_rows(folder / "results.jsonl")


def made_pictures(folder: Path, row: Mapping[str, Any]) -> list[str | None]:
    """The pictures that the model made for a row."""
    return [data_uri(folder / segment["image"]) for segment in row["segments"] if "image" in segment]


def made_text(row: Mapping[str, Any]) -> str:
    """The text that the model made for a row."""
    return "".join(segment["text"] for segment in row["segments"] if "text" in segment)


def drawings(folder: Path, prompts: Sequence[Mapping[str, str]], raw: Path) -> list[Drawing]:
    """Drawings in the order of their prompts."""
    found = []
    for prompt, row in zip(prompts, results(folder), strict=False):
        pictures = made_pictures(folder, row)
        found.append(
            Drawing(
                prompt=prompt["text"],
                language=LANGUAGES.get(prompt["lang"], prompt["lang"]),
                kind=prompt["kind"],
                drawn=pictures[0] if pictures else None,
                real=data_uri(raw / prompt["picture"]),
            )
        )
    return found


def readings(folder: Path, prompts: Sequence[Mapping[str, str]], raw: Path) -> list[Reading]:
    """Captions that the model read off pictures."""
    return [
        Reading(picture=data_uri(raw / prompt["picture"]), said=made_text(row).strip(), name=prompt["text"])
        for prompt, row in zip(prompts, results(folder), strict=False)
    ]


def continuations(folder: Path, prompts: Sequence[str]) -> list[dict[str, str]]:
    """Given text and what the model added."""
    return [{"given": p, "made": made_text(row)} for p, row in zip(prompts, results(folder), strict=False)]


def interleaved(folder: Path, prompt: str) -> list[dict[str, Any]]:
    """One document in reading order: `{"text": …}` and `{"picture": data URI}`, each with whether the model made it."""
    rows = results(folder)
    if not rows:
        return []
    segments: list[dict[str, Any]] = [{"text": prompt, "made": False}]
    for segment in rows[0]["segments"]:
        if "image" in segment:
            segments.append({"picture": data_uri(folder / segment["image"]), "made": True})
        else:
            segments.append({"text": segment["text"], "made": True})
    return segments


def evolution(samples: Path) -> dict[str, Any] | None:
    """What training drew at each validation: prompts, steps, and for each prompt one picture a step."""
    folders = sorted(samples.glob("step_*"))
    steps, prompts, frames = [], None, []
    for folder in folders:
        listed = read_optional(folder / "prompts.json")
        names = listed.get("prompts", listed) if isinstance(listed, dict) else listed
        # a table has one set of prompts; pictures of others cannot stand beside them
        if not names or (prompts is not None and names != prompts):
            continue
        prompts = names
        steps.append(int(folder.name.removeprefix("step_")))
        frames.append([data_uri(folder / f"{n:02d}.png") for n in range(len(names))])
    if not frames or prompts is None:
        return None
    return {"steps": steps, "rows": [{"prompt": p, "frames": [f[n] for f in frames]} for n, p in enumerate(prompts)]}


def reconstructions(folder: Path) -> dict[str, Any] | None:
    """The image tokenizer's own report: facts in numbers, and a grid of originals beside reconstructions."""
    report = read_optional(folder / "report.json")
    if report is None:
        return None
    pixels = report["image_size"]
    facts = [
        (f"{report['psnr_held_out']:.1f} dB", "PSNR of pictures it was not trained on"),
        (f"{report['psnr_train']:.1f} dB", "PSNR of its training pictures"),
        (f"{report['codes_in_use']:,} of {report['num_codes']:,}", "codes in use"),
        (f"{report['codes_per_image']}", f"codes for {pixels} by {pixels} pixels"),
    ]
    return {"facts": facts, "grid": data_uri(folder / "reconstructions.png")}
