from dataclasses import replace
from pathlib import Path

from megachameleon.data.plan import PlannedInput, make_units
from megachameleon.data.preprocessing.unit_report import report_lines
from megachameleon.data.preprocessing.unit_state import UnitState
from megachameleon.data.shards.manifest import FileRecord, ShardManifest


def test_lines_name_what_needs_attention_and_sums(vocabulary):
    items = [PlannedInput(name=f"{i}.txt", bytes=10**9, sha256="", text_bytes=1, num_pictures=0) for i in range(100)]
    manifest = ShardManifest(
        vocabulary=vocabulary,
        tokenizer="t",
        image_tokenizer=None,
        dtype="uint16",
        num_documents=1000,
        num_tokens=50,
        num_image_tokens=12,
        num_images=2,
        files={suffix: FileRecord(name="", bytes=0, sha256="") for suffix in (".bin", ".idx", ".spans")},
        quarantined={"a": 3, "b": 4},
        duplicates=5,
    )
    units = make_units(items)
    done = [UnitState(unit, "finished", None, manifest, 1000.0 + 20 * i) for i, unit in enumerate(units[:60])]
    rest = [
        UnitState(units[60], "failed", "too bad", None),
        *(UnitState(u, "missing", "not run", None) for u in units[61:]),
    ]
    lines = list(report_lines(Path("out"), [*done, *rest]))
    assert lines[0] == "00060-60: failed, too bad" and lines[1] == "00061-61: not run" and len(lines) == 24
    assert lines[20] == "... and 20 more; status --all lists every unit"
    assert lines[21] == "out: 60 of 100 units are finished, 1 failed, 39 missing"
    assert lines[22].startswith(
        "60,000 documents, 2,280 ids of text, 120 pictures; 420 records set aside, 0 filtered out"
    )
    assert lines[23] == "50.0 MB of input a second lately; 40.00 GB are left, about 0.2 hours"
    assert len(list(report_lines(Path("out"), [*done, *rest], every=True))) == 103
    few = list(report_lines(Path("out"), done[:2]))
    assert few[0] == "00000-0: 1,000 documents, 38 ids of text, 2 pictures, 5 duplicates left out, 7 records set aside"
    empty = replace(manifest, num_documents=0, duplicates=0, quarantined={})
    assert "(its inputs hold no records)" in next(report_lines(Path("out"), [replace(done[0], manifest=empty)]))
