"""What `run` and `status` say about units: a line for each, or for what needs attention, and sums."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from megachameleon.data.preprocessing.unit_state import UnitState, bytes_per_second
from megachameleon.data.shards.manifest import ShardManifest

MAX_LISTED = 20
"""Units with a line of their own, unless all are asked for."""


def report_lines(folder: Path, states: Sequence[UnitState], *, every: bool = False) -> Iterator[str]:
    """The lines to print.

    Args:
        every: a line for every unit; otherwise, of many units only for the first unfinished ones.
    """
    unfinished = [state for state in states if state.problem is not None]
    every = every or len(states) <= MAX_LISTED
    for state in states if every else unfinished[:MAX_LISTED]:
        yield f"{state.unit.name}: {_described(state)}"
    if not every and len(unfinished) > MAX_LISTED:
        yield f"... and {len(unfinished) - MAX_LISTED:,} more; status --all lists every unit"
    counts = {name: sum(state.state == name for state in states) for name in ("running", "failed", "stale", "missing")}
    told = "".join(f", {count:,} {name}" for name, count in counts.items() if count)
    yield f"{folder}: {len(states) - len(unfinished):,} of {len(states):,} units are finished{told}"
    if manifests := [state.manifest for state in states if state.manifest is not None]:
        yield _totals(manifests)
    rate = bytes_per_second(states)
    if unfinished and rate:
        left = sum(state.unit.bytes for state in unfinished)
        hours = left / rate / 3600
        yield f"{rate / 1e6:,.1f} MB of input a second lately; {left / 1e9:,.2f} GB are left, about {hours:,.1f} hours"


def _totals(manifests: Sequence[ShardManifest]) -> str:
    set_aside = sum(sum(manifest.quarantined.values()) for manifest in manifests)
    return (
        f"{sum(m.num_documents for m in manifests):,} documents, {sum(m.num_text_tokens for m in manifests):,} ids of "
        f"text, {sum(m.num_images for m in manifests):,} pictures; {set_aside:,} records set aside, "
        f"{sum(m.filtered for m in manifests):,} filtered out, {sum(m.duplicates for m in manifests):,} duplicates"
    )


def _described(state: UnitState) -> str:
    m = state.manifest
    if m is None:
        return f"{state.state}, {state.problem}" if state.state in ("failed", "stale") else str(state.problem)
    empty = "" if m.num_documents or m.filtered or m.duplicates else " (its inputs hold no records)"
    set_aside = sum(m.quarantined.values())
    return (
        f"{m.num_documents:,} documents, {m.num_text_tokens:,} ids of text, {m.num_images:,} pictures{empty}"
        + (f", {m.duplicates:,} duplicates left out" if m.duplicates else "")
        + (f", {set_aside:,} records set aside" if set_aside else "")
    )
