"""What a checkpoint is, at a terminal or in a text file."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megachameleon.checkpoint.inspection.report import Facts, FileInfo, Report
from megachameleon.checkpoint.inspection.tensors import TensorInfo
from megachameleon.console import printable, size_said

MOST_FILES = 16
"""Lines for files; the rest is counted."""
MOST_STARTS = 5
CHECKPOINTS = "checkpoints"
"""The section whose facts have names of folders."""
LONG = ("parent", "origin", "starts", "datasets")
LONGEST_SHORT = 48
WIDEST_TITLE = 12
BLOCKS = " ▏▎▍▌▋▊▉█"
BAR = 24


def print_report(report: Report, console: Console, found: Mapping[str, Any]) -> None:
    """All that is known of it.

    Args:
        found: by reading all bytes: `content_hash`, `check`.
    """
    console.print(Text(str(report.path), style="bold"))
    console.print(Text(_headline(report)))
    weights = report.weights
    if weights["total"]:
        console.print()
        console.print(_parts(weights))
    sections = {title: facts for title, facts in report.sections.items() if facts} | {"hashes": _hashes(report, found)}
    console.print()
    console.print(_sections(sections, console.width - WIDEST_TITLE - 4))
    if report.files:
        console.print()
        console.print(_files(report.files))
    for note in report.notes:
        console.print(Text(f"note: {printable(note)}", style="dim"))


def print_problems(report: Report, console: Console) -> None:
    """What is wrong, a line each."""
    for problem in report.problems:
        console.print(Text(f"problem: {printable(problem)}", style="red"), soft_wrap=True)


def _headline(report: Report) -> str:
    known = [file.num_bytes for file in report.files if file.num_bytes is not None]
    weights = report.weights
    said = [report.what]
    if report.sections.get("model", {}).get("family", "").startswith("Chameleon"):
        said.append(report.sections["model"]["family"])
    said.append(f"{weights['total']:,} parameters in {' and '.join(weights['by_dtype']) or 'no tensors'}")
    said.append(f"{size_said(sum(known))} in {len(known)} file{'s' if len(known) != 1 else ''}")
    return printable("; ".join(said))


def _hashes(report: Report, found: Mapping[str, Any]) -> Facts:
    """Which there are, and what came of comparing them."""
    algorithms = sorted({name for file in report.files for name in file.digests})
    count = sum(1 for file in report.files if file.digests)
    facts: Facts = {
        "stored": f"{' and '.join(algorithms).upper()} of {count} file{'s' if count > 1 else ''}" if count else "none"
    }
    if "check" in found:
        states = list(found["check"].values())
        facts["compared"] = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "nothing"
    elif count:
        facts["compared"] = "no (--check)"
    if "content_hash" in found and found["content_hash"] is not None:
        facts["content of the decoder" if report.uses_plain else "content as stored"] = found["content_hash"]
    return facts


def _parts(weights: Facts) -> Table:
    table = plain_table("parameters", ">count", ">share", "")
    for name, count in weights["by_part"].items():
        share = count / weights["total"]
        table.add_row(name, f"{count:,}", f"{share:.1%}", bar(share))
    return table


def _sections(sections: Mapping[str, Facts], width: int) -> Table:
    """A heading for each, and beside it its facts: short ones in rows of at most `width`, long ones by themselves."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column("", style="bold", width=WIDEST_TITLE, overflow="fold")
    table.add_column("", overflow="fold")
    for title, facts in sections.items():
        short: list[Text] = []
        long: list[Text] = []
        for name, value in facts.items():
            label = printable(str(name) if title == CHECKPOINTS else _label(str(name)))
            for words in _lines(name, value):
                fact = Text.assemble((f"{label} ", "dim"), printable(words))
                (long if name in LONG or len(words) > LONGEST_SHORT else short).append(fact)
        table.add_row(printable(title.replace("_", " ")), Text("\n").join([*_in_rows(short, width), *long]))
    return table


def _label(name: str) -> str:
    return "key/value heads" if name == "key_value_heads" else name.replace("_", " ")


def _in_rows(facts: Sequence[Text], width: int) -> list[Text]:
    """As many in a row as fit."""
    rows: list[Text] = []
    for fact in facts:
        if rows and len(rows[-1]) + len(fact) + 3 <= width:
            rows[-1] = Text.assemble(rows[-1], (" · ", "dim"), fact)
        else:
            rows.append(fact)
    return rows


def _lines(name: str, value: Any) -> list[str]:
    """A fact in words; those of lineage have lines of their own."""
    if name == "starts" and isinstance(value, list):
        more = [f"{len(value) - MOST_STARTS} earlier ones"] if len(value) > MOST_STARTS else []
        return [*more, *(_start(start) for start in value[-MOST_STARTS:])] or ["none"]
    if name == "datasets" and isinstance(value, dict):
        return [f"{dataset}: {_counts(counts)}" for dataset, counts in value.items()] or ["none"]
    if name == "data_fingerprint" and len(str(value)) > LONGEST_SHORT:  # names what the lineage tells too
        return []
    if name in ("parent", "origin"):
        return [_ancestor(value)]
    return [said(value)]


def _start(start: Any) -> str:
    if not isinstance(start, dict):
        return said(start)
    origin = f" from {_ancestor(start['source'])}" if start.get("source") else ""
    kind, time = start.get("kind"), start.get("time")
    world = start.get("world_size")
    processes = f"{said(world)} process{'es' if world != 1 else ''}"
    return f"{time}  {kind}{origin}, {processes}, commit {str(start.get('commit'))[:12]}"


def _ancestor(value: Any) -> str:
    if not isinstance(value, dict) or "manifest_sha256" not in value:
        return "none" if value is None else said(value)
    return f"{value.get('path')} (step {value.get('step')}, manifest {str(value.get('manifest_sha256'))[:12]})"


def _counts(counts: Any) -> str:
    if not isinstance(counts, dict):
        return said(counts)
    return ", ".join(f"{said(counts[name])} {name}" for name in ("shards", "documents", "tokens") if name in counts)


def said(value: Any) -> str:
    """A plain value in words."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(said, value)) or "none"
    if isinstance(value, dict):
        if value.keys() >= {"path", "manifest_sha256"}:
            return _ancestor(value)
        return ", ".join(f"{name} {said(inner)}" for name, inner in value.items()) or "none"
    return str(value) or "none"


def _files(files: Sequence[FileInfo]) -> Table:
    table = plain_table("files", ">size", ">tensors", "holds")
    table.columns[3].no_wrap = False
    for file in files[:MOST_FILES]:
        size = Text("missing", style="red") if file.num_bytes is None else Text(size_said(file.num_bytes))
        table.add_row(printable(file.name), size, f"{file.num_tensors:,}" if file.num_tensors else "", file.holds)
    if len(files) > MOST_FILES:
        rest = files[MOST_FILES:]
        size = Text(size_said(sum(file.num_bytes or 0 for file in rest)))
        table.add_row(f"{len(rest):,} more", size, f"{sum(file.num_tensors for file in rest):,}", "all are in --json")
    return table


def print_tensors(infos: Iterable[tuple[str, TensorInfo]], console: Console) -> None:
    """A line for each tensor."""
    table = plain_table("tensor", "shape", "type", "file")
    for column in (table.columns[0], table.columns[3]):
        column.overflow, column.no_wrap = "fold", False
    for name, info in infos:
        where = Text(printable(info.problem), style="red") if info.problem else Text(printable(", ".join(info.files)))
        dtype = str(info.dtype).removeprefix("torch.")
        table.add_row(Text(printable(name)), "x".join(map(str, info.shape)) or "1", dtype, where)
    console.print(table)


def plain_table(*columns: str) -> Table:
    """A plain table; `>` before a heading puts the column to the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left", no_wrap=True)
    return table


def bar(share: float, width: int = BAR) -> Text:
    """Blocks for a share of 1."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    return Text("█" * (eighths // 8) + BLOCKS[eighths % 8].strip(), style="cyan")
