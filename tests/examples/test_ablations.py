"""The ablations: what counts as a loss that moves, what an alarm was worth, and one run through the trainer."""

import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest

from examples.ablations.alarm_verdict import RunResult, describe, read_result
from examples.ablations.loss_verdict import judge_loss
from examples.ablations.mixed_data import VOCABULARY, write_data
from examples.ablations.one_run import RunSpec, train_one
from examples.ablations.report import write_report
from examples.ablations.settings import SETTINGS


def falling(steps=200, noise=0.1):
    draw = np.random.default_rng(0)
    return list(4 + 2 * np.exp(-np.arange(steps) / 40) + draw.normal(0, noise, steps))


def test_a_loss_moves_when_its_average_has_risen():
    assert judge_loss(falling()).moved is None
    risen = judge_loss([*falling(), *[4.5] * 40])
    assert risen.diverged and 205 <= risen.moved <= 220, "0.2 of 0.5 nats need 8 of 20 steps"
    back = judge_loss([*falling(), *[4.5] * 30, *falling()])
    assert back.moved and judge_loss([*falling(), *[4.5] * 30, *[4.0] * 30]).diverged is False
    broken = judge_loss([*falling(), math.nan, 4.0])
    assert broken.diverged and broken.moved == 201
    assert judge_loss([math.nan]).diverged


def result(alarm, moved):
    losses = [*falling(moved), *[5.0] * 40] if moved else falling()
    troubles = [{"step": alarm, "action": "continue", "reason": f"early warning at step {alarm}: x"}] if alarm else []
    return RunResult(setting="7b", seed=1, steps=[], troubles=troubles, ended="", loss=judge_loss(losses))


@pytest.mark.parametrize(
    ("alarm", "moved", "kind"),
    [(150, 200, "hit"), (235, 200, "late"), (None, 200, "miss"), (150, None, "false alarm"), (None, None, "quiet")],
)
def test_what_an_alarm_was_worth(alarm, moved, kind):
    found = result(alarm, moved)
    assert found.kind == kind
    row = describe([found, result(None, None)])
    assert row[kind] == ("2" if kind == "quiet" else "1") and row["runs"] == "2"
    assert row["lead"] == (
        f"{found.loss.moved - 150} · {found.loss.moved - 150} · {found.loss.moved - 150}" if kind == "hit" else "none"
    )


def test_text_and_pictures_have_unlike_statistics(tmp_path):
    from megachameleon.data.shards.reader import Dataset

    write_data(tmp_path, 400)
    ids = np.concatenate([np.asarray(Dataset.open([tmp_path / "pairs"]).shards[0].document(i)) for i in range(300)])
    codes = ids[VOCABULARY.is_image_code(ids)]
    words = ids[ids >= VOCABULARY.text_start]

    def follows(values):
        """Share of the most frequent successor."""
        pairs, counts = np.unique(np.stack((values[:-1], values[1:]), 1), axis=0, return_counts=True)
        best = {}
        for (before, _), count in zip(pairs.tolist(), counts.tolist(), strict=True):
            best[before] = max(best.get(before, 0), count)
        return sum(best.values()) / (len(values) - 1)

    assert follows(words) > 0.2 > 0.15 > follows(codes)
    before = (tmp_path / "pairs").stat().st_mtime_ns
    write_data(tmp_path)
    assert (tmp_path / "pairs").stat().st_mtime_ns == before, "written once"


def test_settings_differ_from_the_recipe_in_what_they_say():
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS)
    assert len({setting.overrides for setting in SETTINGS}) == len(SETTINGS)


def run_one(spec):
    return str(train_one(spec))


def test_a_run_goes_through_the_trainer_and_into_the_report(workers, tmp_path):
    write_data(tmp_path / "data", 400)
    overrides = ("training.num_steps=24", "optimizer.warmup_steps=4", "health.early_warning_after=2")
    spec = RunSpec(folder=tmp_path / "rising" / "7b-seed1", data=tmp_path / "data", overrides=overrides)
    assert not spec.is_done()
    workers.run(1, run_one, spec)
    assert spec.is_done()
    assert not RunSpec(folder=spec.folder, data=spec.data, overrides=("training.num_steps=25",)).is_done()
    found = read_result(spec.outcome, "7b", 1)
    assert len(found.steps) == 24 and not found.ended
    assert all(math.isfinite(value) for value in found.column("output_norm/image"))
    assert found.loss.best < 6.3, "it learns"
    text = write_report({"rising": [found]}, tmp_path / "pictures")
    assert "| 7b | 1 | 0 | 0 |" in text
    picture = ElementTree.fromstring((tmp_path / "pictures" / "stability_rising.svg").read_text())
    lines = picture.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 4 and all(len(line.get("points").split()) == 24 for line in lines)
    assert json.loads(spec.outcome.read_text())["overrides"] == list(overrides)
