"""Stages are done once, resumed when interrupted, and done anew when what they depend on has changed."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from examples.demo.pipeline import Pipeline, Stage, StageError


def stage(folder: Path, name: str, code: str, **more) -> Stage:
    """A stage whose commands count their runs in `NAME/runs` before they run `code`."""
    count = f"import pathlib; p = pathlib.Path(r'{folder}/{name}'); p.mkdir(exist_ok=True); "
    count += "f = p / 'runs'; f.write_text((f.read_text() if f.exists() else '') + '+'); "
    values = {"title": name, "outputs": (folder / name,), "expected_seconds": 1, **more}
    return Stage(name=name, chains=(((sys.executable, "-c", count + code),),), **values)


def run(folder: Path, *stages: Stage) -> None:
    Pipeline(stages, folder / "stages.json", folder).run()


def runs(folder: Path, name: str) -> int:
    return len((folder / name / "runs").read_text())


def entry(folder: Path, name: str) -> dict:
    return next(e for e in json.loads((folder / "stages.json").read_text())["stages"] if e["name"] == name)


def test_a_finished_stage_is_skipped_and_measured(tmp_path):
    memory = stage(tmp_path, "a", "x = bytearray(60_000_000); import time; time.sleep(1)")
    run(tmp_path, memory)
    run(tmp_path, memory)
    assert runs(tmp_path, "a") == 1
    assert entry(tmp_path, "a")["seconds"] >= 1
    assert entry(tmp_path, "a")["peak_memory_mb"] > 60


def test_an_interrupted_stage_keeps_what_it_has(tmp_path):
    code = "import sys; sys.exit(130 if len(f.read_text()) == 1 else 0)"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stage(tmp_path, "a", code))
    run(tmp_path, stage(tmp_path, "a", code))
    assert runs(tmp_path, "a") == 2


def test_a_changed_stage_and_those_that_need_it_start_over(tmp_path):
    first, other = stage(tmp_path, "a", "pass"), stage(tmp_path, "c", "pass")
    run(tmp_path, first, stage(tmp_path, "b", "pass", needs=("a",)), other)
    run(tmp_path, stage(tmp_path, "a", "1"), stage(tmp_path, "b", "p.joinpath('again').touch()", needs=("a",)), other)
    assert runs(tmp_path, "a") == runs(tmp_path, "b") == runs(tmp_path, "c") == 1  # folders were emptied before
    assert (tmp_path / "b" / "again").exists()


def test_a_change_of_an_input_file_starts_over(tmp_path):
    setting = tmp_path / "setting.yaml"
    counts = []
    for text in ("1", "1", "2"):
        setting.write_text(text)
        run(tmp_path, stage(tmp_path, "a", f"open(r'{tmp_path}/log', 'a').write('x')", inputs=(setting,)))
        counts.append(len((tmp_path / "log").read_text()))
    assert counts == [1, 1, 2]


def test_removed_results_are_made_again(tmp_path):
    run(tmp_path, stage(tmp_path, "a", "pass"))
    (tmp_path / "a" / "runs").unlink()
    (tmp_path / "a").rmdir()
    run(tmp_path, stage(tmp_path, "a", "pass"))
    assert runs(tmp_path, "a") == 1


def test_what_needs_a_stage_that_is_done_again_is_done_again(tmp_path):
    def log(name: str, *needs: str) -> Stage:
        return stage(tmp_path, name, f"open(r'{tmp_path}/log', 'a').write('{name}')", needs=needs)

    stages = (log("a"), log("b", "a"), log("c"), log("d", "b"))
    run(tmp_path, *stages)
    pipeline = Pipeline(stages, tmp_path / "stages.json", tmp_path)
    pipeline.forget(["b"])
    pipeline.run()
    assert (tmp_path / "log").read_text() == "abcd" + "bd"
    shutil.rmtree(tmp_path / "a")
    run(tmp_path, *stages)
    assert (tmp_path / "log").read_text() == "abcd" + "bd" + "abd"


def test_a_failure_names_the_stage_and_shows_the_end_of_its_log(tmp_path):
    broken = stage(tmp_path, "a", "import sys; print('the reason'); sys.exit(2)", quiet=True)
    never = stage(tmp_path, "b", "pass")
    with pytest.raises(StageError, match=r"the reason\nstage 'a' failed with exit status 2") as caught:
        run(tmp_path, broken, never)
    assert caught.value.status == 2
    assert not (tmp_path / "b").exists()


def test_a_stage_that_leaves_nothing_has_failed(tmp_path):
    with pytest.raises(StageError, match="left no"):
        run(tmp_path, stage(tmp_path, "a", "pass", outputs=(tmp_path / "nowhere",)))


def test_chains_run_at_the_same_time_and_in_order(tmp_path):
    def note(text: str, seconds: float) -> tuple[str, ...]:
        code = f"import time; time.sleep({seconds}); open(r'{tmp_path}/notes', 'a').write('{text} ')"
        return (sys.executable, "-c", code)

    chains = ((note("slow", 1.5), note("after", 0)), (note("fast", 0),))
    both = Stage(name="a", title="a", chains=chains, outputs=(), expected_seconds=1, at_once=2, quiet=True)
    run(tmp_path, both)
    assert (tmp_path / "notes").read_text().split() == ["fast", "slow", "after"]
