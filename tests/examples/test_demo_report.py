"""The report shows what a run has left, as it is, and stands on its own."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from examples.demo.charts import Series, line_chart, ticks
from examples.demo.report import write_report
from examples.demo.report_metrics import layout_table, loss_charts
from examples.demo.run_folder import RunFolder


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(path)


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path)
    prompt = {"key": "2764", "lang": "en", "text": "red <heart>", "kind": "fixed", "picture": "gallery/2764.png"}
    write_rows(run.prompts("draw"), [prompt, {**prompt, "text": "corazón", "lang": "es", "kind": "held-out language"}])
    write_rows(run.prompts("read"), [prompt])
    write_picture(run.raw / "gallery" / "2764.png")
    write_picture(run.generated / "draw" / "000-0.png")
    write_rows(
        run.generated / "draw" / "results.jsonl",
        [{"segments": [{"image": "000-0.png"}]}, {"segments": [{"incomplete_image": 3, "expected": 16}]}],
    )
    write_rows(run.generated / "read" / "results.jsonl", [{"segments": [{"text": "<script>alert(1)</script>"}]}])
    for name, loss in {"single": 6.0, "tp2": 6.0 * (1 + 3e-7)}.items():
        write_rows(run.layouts / name / "metrics.jsonl", [{"kind": "train", "step": 1, "loss": loss}])
    return run


def test_an_empty_run_says_what_is_missing(tmp_path):
    page = write_report(RunFolder(tmp_path)).read_text()
    assert page.count("not here yet") >= 8


def test_the_page_needs_nothing_from_outside_and_escapes_what_the_model_says(run):
    page = write_report(run).read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|https://(?:openmoji|docs\.python|github)|#)[^"]+"', page)
    assert "@import" not in page
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert "red &lt;heart&gt;" in page


def test_held_out_captions_are_marked_and_a_missing_drawing_is_said(run):
    page = write_report(run).read_text()
    assert "Held-out languages" in page
    assert "Spanish" in page
    assert "nothing drawn" in page


def test_layouts_are_compared_with_one_process(run):
    table = layout_table(run.layouts)
    assert table["titles"] == ["one process", "TP 2 + SP"]
    assert table["differences"] == [0, pytest.approx(3e-7, rel=1e-3)]
    assert "Within" in write_report(run).read_text()


def test_layouts_that_differ_are_said_to_differ(run):
    write_rows(run.layouts / "dp2" / "metrics.jsonl", [{"kind": "train", "step": 1, "loss": 6.1}])
    assert "Outside" in write_report(run).read_text()


def test_losses_that_are_missing_or_infinite_do_not_break_a_chart():
    rows = [{"kind": "train", "step": n, "loss_text": value} for n, value in enumerate([3.0, None, 2.0])]
    [chart] = loss_charts(rows)
    assert chart["title"] == "Text"
    assert line_chart([Series(name="x", points=((0, float("inf")),), colour="c0")], "step", "t") is None


def test_ticks_cover_the_range():
    for low, high in ((0.0, 1.0), (2.31, 6.9), (5.0, 5.0), (-3.0, 1200.0)):
        found = ticks(low, high)
        assert found[0] <= low <= high <= found[-1] + 1e-9
        assert len(found) <= 8
