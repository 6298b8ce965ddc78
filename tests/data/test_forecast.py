import re
import shutil
from collections import Counter

import numpy as np
import pytest

from megachameleon.config import load_config, save_config
from megachameleon.data.blending.forecast import describe, forecast
from megachameleon.training.batches import open_data
from tools import preprocess_data

MIXED = "{weights: {pairs: 1, text: 1}, by: tokens, image_tokens: 0.2, samples: 64}"
STAGES = f"data.stages=[{MIXED}, {{weights: {{pairs: 1}}}}]"


@pytest.fixture
def settings(config):
    return config(STAGES, "training.num_steps=16", "training.global_batch_size=8")


def test_a_forecast_counts_what_the_run_reads(settings):
    samples = open_data(settings.data, settings.training).train
    stages = forecast(samples, 128, 8)
    assert [(stage.first, stage.end) for stage in stages] == [(0, 64), (64, 128)]
    reads = Counter()
    for stage in stages:
        batch = samples.batch(range(stage.first, stage.end))
        assert stage.tokens == pytest.approx(batch.loss_mask.sum(), rel=0.03)
        share = (batch.image_mask * batch.loss_mask).sum() / batch.loss_mask.sum()
        assert stage.image_share == pytest.approx(share, abs=0.01)
        for position in range(stage.first, stage.end):
            draw = samples.blend[position]
            reads[draw.dataset, draw.index] += 1
        for source in stage.sources:
            counts = [count for (name, _), count in reads.items() if name == source.dataset]
            assert source.repeated == sum(count > 1 for count in counts) and source.most_reads == max(counts)
            assert source.epochs == pytest.approx(sum(counts) / len(samples.datasets[source.dataset]))
    assert sum(source.samples for stage in stages for source in stage.sources) == 128
    assert stages[0].image_share == pytest.approx(0.2, abs=0.01)


def test_windows_are_counted_exactly(settings):
    samples = open_data(settings.data, settings.training).train
    [first, _] = forecast(samples, 128, 8)
    for number, share in enumerate(first.windows):
        batch = samples.batch(range(8 * number, 8 * number + 8))
        assert share == pytest.approx(np.sum(batch.image_mask * batch.loss_mask) / batch.loss_mask.sum())
    assert len(first.windows) == 8
    assert re.search(r"stage 0: .* of pictures \([\d.]+% to [\d.]+% in 8 global batches\)", describe(samples, [first]))


def run_tool(*arguments):
    preprocess_data.main(preprocess_data.parser().parse_args(list(map(str, arguments))))


def test_the_tool_packs_and_tells_what_a_run_will_see(settings, corpus, tmp_path, capsys):
    save_config(settings, tmp_path / "run.yaml")
    page = tmp_path / "page.html"
    run_tool("inspect", "--blend", tmp_path / "run.yaml", "training.num_steps=10", "--page", page)
    text = capsys.readouterr().out
    assert "stage 1: samples 64 to 79" in text and text.splitlines()[-1] == str(page)
    assert page.read_text().count("<rect") == 10 and "<script" not in page.read_text()
    run_tool("inspect", "--blend", tmp_path / "run.yaml", "--position", 5)
    where = capsys.readouterr().out
    positions = [int(number) for number in where.rsplit("at ", 1)[1].split(", ")]
    assert 5 in positions and "epoch 0" in where
    with pytest.raises(ValueError, match="the run has 128 samples"):
        run_tool("inspect", "--blend", tmp_path / "run.yaml", "--position", 128)
    with pytest.raises(ValueError, match="name a folder of shards"):
        run_tool("inspect")


def test_a_run_reads_the_same_with_and_without_an_index(settings, corpus, tmp_path, capsys):
    shutil.copytree(corpus / "pairs", tmp_path / "pairs")
    data = f"data.train={{pairs: [{tmp_path / 'pairs'}], text: [{corpus / 'text'}]}}"
    before = open_data(settings.data, settings.training).train
    length = settings.data.sequence_length
    run_tool("pack", "--output", tmp_path / "pairs", "--sequence-length", length)
    said = capsys.readouterr().out
    assert re.search(r"pairs: 1 shards, 120 documents, [\d,]+ ids in [\d,]+ samples \([\d.]+% filled, best_fit", said)
    save_config(settings, tmp_path / "run.yaml")
    indexed = load_config(str(tmp_path / "run.yaml"), [data])
    after = open_data(indexed.data, indexed.training).train
    assert (tmp_path / "pairs" / f"pack-best_fit-{length}.index").exists()
    assert after.history(100) == before.history(100)
    assert np.array_equal(after.batch(range(100)).tokens, before.batch(range(100)).tokens)
