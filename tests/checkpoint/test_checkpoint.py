"""Checkpoints: bit-equal resume, any layout, complete or invisible, clear refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import run_training

from megachameleon.checkpoint.folder import (
    parse_manifest,
    read_manifest,
    resolve_checkpoint,
    write_manifest,
)
from megachameleon.checkpoint.tensors import index_from_json
from megachameleon.data.packing.packing_job import pack_folder

INTERLEAVED = ["parallel.pipeline_parallel=2", "parallel.virtual_pipeline_parallel=2", "model.num_layers=4"]
OVERLAP = [
    "parallel.distributed_optimizer=true",
    "parallel.overlap_grad_reduce=true",
    "parallel.overlap_param_gather=true",
    "parallel.bucket_size=3000",
]
TRAIN = ["training.num_steps=6", "checkpoint.every=3", "checkpoint.keep_last=3", "model.dropout=0.1"]


def forget_last(config, output):
    """A copy of a finished run as it was after its first checkpoint."""
    source, target = Path(config.output_dir), Path(config.output_dir).parent / output
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / "step_00000006")
    return replace(config, output_dir=str(target))


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, []),
        (1, ["training.precision=bf16"]),
        (2, ["parallel.tensor_parallel=2", "training.precision=bf16"]),
        (2, ["parallel.pipeline_parallel=2"]),
        (2, ["parallel.distributed_optimizer=true", "training.precision=bf16"]),
        (2, [*OVERLAP, *INTERLEAVED, "parallel.recompute=full"]),
        (2, [*OVERLAP, "parallel.context_parallel=2", "training.precision=bf16"]),
    ],
    ids=[
        "fp32",
        "bf16",
        "tensor 2, bf16",
        "pipeline 2",
        "distributed optimizer, bf16",
        "interleaved pipeline, recomputed",
        "context 2, overlap, bf16",
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(workers, config, world_size, overrides):
    settings = config(*TRAIN, *overrides)
    _, _, expected = workers.run(world_size, run_training, settings)[0]
    resumed = forget_last(settings, "resumed")
    start, end, got = workers.run(world_size, run_training, resumed)[0]
    assert (start, end) == (3, 6)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    one, other = (Path(c.output_dir) / "metrics.jsonl" for c in (settings, resumed))
    assert losses(one) == losses(other)
    assert [row["step"] for row in losses(one)] == [1, 2, 3, 4, 5, 6]


def losses(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: r[k] for k in ("step", "loss", "grad_norm", "lr", "tokens")} for r in rows if r["kind"] == "train"]


@pytest.fixture(scope="module")
def finished(workers, module_config):
    settings = module_config(*TRAIN)
    workers.run(1, run_training, settings)
    return settings


@pytest.fixture
def run_copy(finished, tmp_path):
    shutil.copytree(finished.output_dir, tmp_path / "copy")
    return replace(finished, output_dir=str(tmp_path / "copy"))


def refusal(workers, settings):
    with pytest.raises(AssertionError) as caught:
        workers.run(1, run_training, settings)
    return str(caught.value).strip().splitlines()[-1]


def more_steps(settings):
    return replace(settings, training=replace(settings.training, num_steps=9))


def test_a_finished_run_is_left_alone(workers, run_copy):
    start, end, _ = workers.run(1, run_training, run_copy)[0]
    assert (start, end) == (6, 6)


def test_another_model_is_refused(workers, run_copy):
    other = replace(run_copy, model=replace(run_copy.model, num_layers=4))
    assert "was trained with model.num_layers=2, the configuration says 4" in refusal(workers, other)


def test_other_data_is_refused(workers, run_copy):
    settings = more_steps(run_copy)
    other = replace(settings, training=replace(settings.training, seed=5))
    assert "came from other data, seed, sequence_length or weights" in refusal(workers, other)


def _with_shards(run_copy, corpus, folder):
    """The run over copies of its shards, those of the pairs behind an index."""
    for name in ("pairs", "text"):
        shutil.copytree(corpus / name, folder / name)
    pack_folder(folder / "pairs", run_copy.data.sequence_length, "best_fit")
    train = {name: (str(folder / name),) for name in ("pairs", "text")}
    return replace(more_steps(run_copy), data=replace(run_copy.data, train=train))


@pytest.mark.parametrize("name", ["pairs", "text"])
def test_a_missing_or_replaced_shard_stops_a_resume(workers, run_copy, corpus, tmp_path, name):
    settings = _with_shards(run_copy, corpus, tmp_path)
    shard = tmp_path / name / "shard"
    for suffix in (".bin", ".idx", ".spans", ".json"):
        shutil.copy((corpus / "valid" / "shard").with_suffix(suffix), shard.with_suffix(suffix))
    wanted = {
        "pairs": "pairs/shard: was changed or replaced",
        "text": "dataset text has other shards or packing (1 shards, 11 documents; it had 1 shards, 60 documents)",
    }
    assert wanted[name] in refusal(workers, settings)
    shard.with_suffix(".json").unlink()
    assert {"pairs": "pairs/shard: missing", "text": "text: no finished shards"}[name] in refusal(workers, settings)


def test_a_run_goes_on_from_shards_that_were_packed_in_between(workers, run_copy, corpus, tmp_path):
    start, end, _ = workers.run(1, run_training, _with_shards(run_copy, corpus, tmp_path))[0]
    assert (start, end) == (6, 9)


def test_another_vocabulary_is_refused(workers, run_copy):
    path = Path(run_copy.output_dir) / "checkpoints/step_00000006/manifest.json"
    manifest = parse_manifest(path.parent)
    manifest.vocabulary["image_grid"] = [4, 2]
    write_manifest(path.parent, manifest)
    assert "has image_grid=" in refusal(workers, more_steps(run_copy))


def test_a_later_stage_may_be_appended(workers, run_copy):
    first, second = run_copy.data.stages
    stages = (first, replace(second, samples=16), replace(second, weights={"text": 1.0}))
    longer = replace(more_steps(run_copy), data=replace(run_copy.data, stages=stages))
    start, end, _ = workers.run(1, run_training, longer)[0]
    assert (start, end) == (6, 9)


def test_a_changed_learning_rate_rules_from_the_resume_on(workers, run_copy):
    settings = more_steps(run_copy)
    faster = replace(settings, optimizer=replace(settings.optimizer, lr=10 * settings.optimizer.lr))
    workers.run(1, run_training, faster)
    other = shutil.copytree(run_copy.output_dir, run_copy.output_dir + "-other")
    for step in (6, 9):
        shutil.rmtree(Path(other) / f"checkpoints/step_0000000{step}", ignore_errors=True)
    workers.run(1, run_training, replace(settings, output_dir=str(other)))
    fast, slow = (losses(Path(folder) / "metrics.jsonl")[7]["lr"] for folder in (run_copy.output_dir, other))
    assert fast == pytest.approx(10 * slow)


def test_file_names_cannot_leave_the_folder(run_copy):
    values = {"w": {"shape": [1], "dtype": "float32", "parts": [["../../etc/passwd", "w@0", [0], [1]]]}}
    with pytest.raises(ValueError, match="leaves the checkpoint's folder"):
        index_from_json(values, origin="index.json")
    checkpoint = Path(run_copy.output_dir) / "checkpoints/step_00000006"
    manifest = parse_manifest(checkpoint)
    manifest.files["../outside"] = {"size": 1, "sha256": ""}
    write_manifest(checkpoint, manifest)
    with pytest.raises(ValueError, match="leaves the checkpoint's folder"):
        read_manifest(checkpoint)


def test_nothing_in_a_checkpoint_is_a_pickle(finished):
    checkpoint = resolve_checkpoint(Path(finished.output_dir))
    assert {path.suffix for path in checkpoint.iterdir()} == {".json", ".yaml", ".safetensors"}


def test_no_checkpoint_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint here"):
        resolve_checkpoint(tmp_path)


def test_no_git_is_no_obstacle(monkeypatch):
    from megachameleon.checkpoint.lineage import versions

    monkeypatch.setenv("PATH", "")
    assert versions()["commit"] == "unknown"


def test_the_forced_optimizer_kernel_survives_a_resume(workers, run_copy):
    settings = replace(more_steps(run_copy), kernels=replace(run_copy.kernels, optimizer="reference"))
    assert workers.run(1, fused_after_resume, run_copy)[0] is True
    assert workers.run(1, fused_after_resume, settings)[0] is False


def fused_after_resume(config):
    from cases import build_trainer

    from megachameleon.parallel.context import parallel_context

    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context)
        assert trainer.step == 6
        return trainer.state.optimizer.param_groups[0]["fused"]
