"""Results of generation as a folder: pictures, results.jsonl, Markdown, and a page to look at."""

import html
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megachameleon.files import write_text
from megachameleon.generation.prompts import Prompt
from megachameleon.generation.rendering import Part, TextPart, as_html, as_json, as_markdown, save_pictures

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1rem }
article { border: 1px solid #ddd; border-radius: .5rem; padding: 1rem; overflow-wrap: anywhere }
article p { white-space: pre-wrap; margin: .3rem 0 }
.prompt { color: #777; font-size: .9rem; border-bottom: 1px solid #eee; margin-bottom: .6rem; padding-bottom: .3rem }
img { min-width: 8rem; image-rendering: auto; border-radius: .25rem }
.prompt img { min-width: 0; width: 4rem }
.cut { color: #a33 }
"""


def write_gallery(
    folder: Path, prompts: Sequence[Prompt], results: Sequence[Sequence[Part]], title: str
) -> list[dict[str, Any]]:
    """Write `NNN-K.png`, `NNN.md`, `results.jsonl` and `index.html` into `folder`; returns the rows of results.jsonl.

    A row holds the prompt's segments, the result's segments, its text, and its picture files.
    """
    rows, cards = [], []
    for number, (prompt, parts) in enumerate(zip(prompts, results, strict=True)):
        stem = f"{number:03d}"
        names = save_pictures(parts, folder, stem)
        write_text(folder / f"{stem}.md", as_markdown(parts, names))
        rows.append(
            {
                "prompt": prompt.as_json(),
                "segments": as_json(parts, names),
                "text": "".join(part.text for part in parts if isinstance(part, TextPart)),
                "pictures": [name for name in names if name],
            }
        )
        cards.append(f"<article>{_prompt_html(prompt, folder)}\n{as_html(parts, names)}</article>")
    write_text(folder / "results.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_text(folder / "index.html", _page(title, cards))
    return rows


def _prompt_html(prompt: Prompt, folder: Path) -> str:
    shown = [
        html.escape(segment)
        if isinstance(segment, str)
        else f'<img src="{html.escape(os.path.relpath(segment, folder), quote=True)}" alt="picture of the prompt">'
        for segment in prompt.segments
    ]
    return f"<p class=prompt>{' '.join(shown) or '(no prompt)'}</p>"


def _page(title: str, cards: Sequence[str]) -> str:
    return (
        f"<!doctype html>\n<html lang=en>\n<head><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n<main>\n"
        + "\n".join(cards)
        + "\n</main></body></html>\n"
    )
