"""Text and code that come with every Python: its reference topics, its docstrings, its standard library."""

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.demo.splits import stable_fraction

# Tables, tests and build leftovers teach a small model nothing.
SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "distutils", "encodings", "pydoc_data",
    "turtledemo", "ensurepip", "__pycache__", "lib-dynload", "_pyrepl",
}  # fmt: skip
SKIPPED_PREFIXES = ("_sysconfigdata", "_pydecimal", "_pyio", "pickletools", "__phello__", "this")
MAX_FILE_BYTES = 200_000
"""Of a module."""


@dataclass(frozen=True, kw_only=True)
class TextDocument:
    """A document and where it comes from, such as `topic:lambda` or `source:json/decoder.py`."""

    name: str
    text: str


def python_documents(max_bytes: int) -> list[TextDocument]:
    """At most about `max_bytes` of text: all topics, then docstrings and sources in a stable mixed order."""
    documents, total = [], 0
    for document in (*topics(), *docstrings_and_sources()):
        size = len(document.text.encode("utf-8"))
        # no break at the first that is too long: shorter ones may still fit
        if total + size <= max_bytes:
            documents.append(document)
            total += size
    return documents


def topics() -> list[TextDocument]:
    """The language reference that `help("lambda")` shows; empty where a distribution leaves it out."""
    try:
        from pydoc_data.topics import topics as texts
    except ImportError:
        return []
    return [TextDocument(name=f"topic:{name}", text=text.strip() + "\n") for name, text in sorted(texts.items())]


def docstrings_and_sources() -> list[TextDocument]:
    """For each module of the standard library, one document of its docstrings and one of its source."""
    documents = []
    for name, source in standard_library_sources():
        documents.append(TextDocument(name=f"source:{name}", text=source))
        if text := "\n\n".join(docstrings(source)):
            documents.append(TextDocument(name=f"docstrings:{name}", text=text + "\n"))
    return sorted(documents, key=lambda document: stable_fraction("text order", document.name))


def standard_library_sources() -> Iterator[tuple[str, str]]:
    """Path below the library's root and text of each module that is worth reading."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or path.name.startswith(SKIPPED_PREFIXES):
            continue
        if not 200 <= path.stat().st_size <= MAX_FILE_BYTES:
            continue
        try:
            yield relative.as_posix(), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def docstrings(source: str) -> list[str]:
    """Every docstring of a module that is longer than a line, under the name that it documents."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and "\n" in text:
                found.append(text if isinstance(node, ast.Module) else f"{node.name}: {text}")
    return found
