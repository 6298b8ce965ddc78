"""What the trained model will be asked, written down before training begins."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.demo.holdout import Captions
from examples.demo.raw_writers import write_jsonl
from examples.demo.splits import stable_fraction

KINDS = ("seen English", "seen language", "held-out language", "seen skin tone", "held-out skin tone")
DRAWN_PER_KIND = 12
"""Captions of each kind that are drawn for the report."""
READ_BESIDE_FIXED = 8
"""Pictures that are read beside the fixed ones."""
CONTINUED = (
    'The "if" statement is used for',
    "A list is",
    "import os\nimport sys\n\n\ndef main():\n",
    "class Stack:\n    def __init__(self",
)
INTERLEAVED = "Pictures whose name has the word heart."

Row = dict[str, Any]


def caption_rows(captions: Captions) -> tuple[list[Row], list[Row]]:
    """Every caption that training sees, and every one that it never sees.

    Their order is random but fixed, and takes turns between kinds: any number of first rows is a balanced sample.
    """

    def row(key: str, language: str, text: str, kind: str) -> Row:
        return {"key": key, "lang": language, "text": text, "kind": kind, "picture": f"gallery/{key}.png"}

    def rows(names: dict[str, dict[str, str]], kind: str) -> list[Row]:
        return [row(key, language, text, kind) for key, texts in names.items() for language, text in texts.items()]

    seen = [row(p.key, "en", p.english, "seen English") for p in captions.plain]
    seen += [row(p.key, "en", p.english, "seen skin tone") for p in captions.tones_seen]
    seen += rows(captions.world_seen, "seen language")
    held_out = [row(p.key, "en", p.english, "held-out skin tone") for p in captions.tones_held_out]
    held_out += rows(captions.world_held_out, "held-out language")
    return take_turns(seen), take_turns(held_out)


def take_turns(rows: Sequence[Row]) -> list[Row]:
    """Rows in a fixed random order that takes one of each kind in turn."""
    rank: Counter[str] = Counter()
    turns = []
    for row in sorted(rows, key=lambda r: stable_fraction("prompts", r["key"], r["lang"])):
        turns.append((rank[row["kind"]], row["kind"], row))
        rank[row["kind"]] += 1
    return [row for _, _, row in sorted(turns, key=lambda turn: turn[:2])]


def write_prompts(output: Path, captions: Captions, fixed: Sequence[str], per_kind: int) -> dict[str, int]:
    """Write all captions and the files of prompts; returns their lengths.

    Args:
        fixed: English names of the pictures that are judged by eye.
        per_kind: captions of each kind whose drawings are compared with real pictures.
    """
    seen, held_out = caption_rows(captions)
    by_name = {row["text"]: {**row, "kind": "fixed"} for row in seen if row["kind"] == "seen English"}
    judged = [by_name[name] for name in fixed]
    of_kind = {kind: [r for r in (*seen, *held_out) if r["kind"] == kind and r["text"] not in fixed] for kind in KINDS}
    read = [*judged, *of_kind["seen English"][:READ_BESIDE_FIXED]]
    files: dict[str, list[Row]] = {
        "seen/captions": seen,
        "heldout/captions": held_out,
        "prompts/draw": [*judged, *(row for rows in of_kind.values() for row in rows[:DRAWN_PER_KIND])],
        "prompts/read": [{**row, "segments": [{"image": f"../{row['picture']}"}]} for row in read],
        "prompts/continue": [{"text": text} for text in CONTINUED],
        "prompts/interleaved": [{"text": INTERLEAVED}],
        "prompts/retrieval": [row for rows in of_kind.values() for row in rows[:per_kind]],
    }
    for name, rows in files.items():
        write_jsonl(output / f"{name}.jsonl", rows)
    return {name: len(rows) for name, rows in files.items()}
