"""Where checkpoints come from, and runs that begin with the weights of another."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import build_trainer, run_training

from megachameleon.checkpoint.folder import MANIFEST_FILE, parse_manifest, resolve_checkpoint, write_manifest
from megachameleon.checkpoint.lineage import versions
from megachameleon.files import sha256_of
from megachameleon.parallel.context import parallel_context

TRAIN = ["training.num_steps=4", "checkpoint.every=2"]
DISTRIBUTED = ["parallel.distributed_optimizer=true"]


def beginning(config):
    """What a run starts with: step, weights, and whether moments and counts are those of a new optimizer."""
    from whole import gather

    from megachameleon.parallel.optimizer_state import held_states, updates_done

    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context)
        weights = gather(trainer.state.model, context, gradients=False)
        optimizer = trainer.state.optimizer
        held = list(held_states(optimizer)) if config.checkpoint.init_from else []
        moments = [held.tensors[name].abs().max().item() for held in held for name in ("exp_avg", "exp_avg_sq")]
        masters = all(
            torch.equal(
                item.tensors["master"].to(item.parameter.dtype),
                item.parameter.detach().view(-1)[item.start : item.stop],
            )
            for item in held
            if "master" in item.tensors
        )
        return trainer.step, weights, max(moments, default=0), updates_done(optimizer), masters


@pytest.fixture(scope="module")
def source(workers, module_config):
    """A finished run and its weights."""
    settings = module_config(*TRAIN, output="source")
    _, _, weights = workers.run(2, run_training, settings)[0]
    return settings, weights


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, []),
        (2, ["parallel.tensor_parallel=2"]),
        (2, [*DISTRIBUTED, "parallel.pipeline_parallel=2"]),
        (2, [*DISTRIBUTED, "training.precision=bf16"]),
    ],
    ids=["one", "tensor 2", "pipeline 2, distributed", "data 2, distributed, bf16"],
)
def test_a_run_begins_with_the_weights_of_another(workers, source, config, world_size, overrides):
    before, expected = source
    settings = config(*TRAIN, *overrides, f"checkpoint.init_from={before.output_dir}")
    step, weights, largest_moment, updates, masters = workers.run(world_size, beginning, settings)[0]
    assert (step, largest_moment, updates, masters) == (0, 0, 0, True)
    for name, value in expected.items():
        rounded = value.bfloat16().float() if settings.training.precision == "bf16" else value
        assert torch.equal(weights[name], rounded), name


def beginning_beside_a_saving_run(config):
    """Steps of the sources that ranks take when the first sees an older newest checkpoint than the others."""
    import megachameleon.training.checkpointing as checkpointing

    with parallel_context(config.parallel) as context, pytest.MonkeyPatch.context() as patch:
        root = Path(config.checkpoint.init_from) / "checkpoints"
        found = root / ("step_00000004" if context.rank else "step_00000002")
        patch.setattr(checkpointing, "resolve_checkpoint", lambda path: found)
        trainer = build_trainer(config, context)
        return trainer.checkpointer._lineage.parent.step


def test_all_ranks_begin_with_the_same_checkpoint(workers, source, config):
    settings = config(*TRAIN, f"checkpoint.init_from={source[0].output_dir}")
    assert workers.run(2, beginning_beside_a_saving_run, settings) == [2, 2]


def test_a_checkpoint_may_have_been_given_another_name(workers, source, config, tmp_path):
    shutil.copytree(Path(source[0].output_dir) / "checkpoints/step_00000002", tmp_path / "my weights")
    settings = config(*TRAIN, f"checkpoint.init_from={tmp_path / 'my weights'}")
    assert workers.run(1, run_training, settings)[0][:2] == (0, 4)
    [start] = parse_manifest(Path(settings.output_dir) / "checkpoints/step_00000002").lineage["starts"][1:]
    assert start["source"]["step"] == 2


def test_the_chain_of_starts_and_the_parent_are_recorded(workers, source, config):
    before, _ = source
    settings = config(*TRAIN, f"checkpoint.init_from={before.output_dir}")
    workers.run(1, run_training, settings)
    longer = replace(settings, training=replace(settings.training, num_steps=6))
    assert workers.run(1, run_training, longer)[0][:2] == (4, 6)  # its own checkpoints count, not init_from
    root = Path(settings.output_dir) / "checkpoints"
    lineage = parse_manifest(root / "step_00000006").lineage
    assert [start["kind"] for start in lineage["starts"]] == ["new", "init_from", "resume"]
    assert [start["world_size"] for start in lineage["starts"]] == [2, 1, 1]
    sources = [start["source"] for start in lineage["starts"]]
    first = resolve_checkpoint(Path(before.output_dir))
    assert sources[0] is None
    assert sources[1] == {"path": str(first), "step": 4, "manifest_sha256": sha256_of(first / MANIFEST_FILE)}
    parent = root / "step_00000004"
    described = {"path": str(parent), "step": 4, "manifest_sha256": sha256_of(parent / MANIFEST_FILE)}
    assert sources[2] == lineage["parent"] == described
    assert parse_manifest(parent).lineage["parent"] != described
    assert set(lineage["datasets"]) == {"pairs", "text"}
    assert lineage["datasets"]["pairs"]["documents"] == 120 and lineage["datasets"]["pairs"]["content"]


def refusal(workers, settings):
    with pytest.raises(AssertionError) as caught:
        workers.run(1, beginning, settings)
    return str(caught.value).strip().splitlines()[-1]


def test_weights_that_do_not_fit_are_refused(workers, source, config, tmp_path):
    import shutil

    before, _ = source
    other = config("model.num_layers=4", f"checkpoint.init_from={before.output_dir}")
    assert "was trained with model.num_layers=2, the configuration says 4" in refusal(workers, other)
    copy = Path(shutil.copytree(before.output_dir, tmp_path / "copy"))
    newest = resolve_checkpoint(copy)
    manifest = parse_manifest(newest)
    write_manifest(newest, replace(manifest, tokenizers={"text": "another", "image": "i"}))
    settings = config(f"checkpoint.init_from={copy}")
    assert "was trained with another text tokenizer (another) than the one that made" in refusal(workers, settings)
    write_manifest(newest, manifest)
    data = bytearray((newest / "tensors_00000.safetensors").read_bytes())
    data[-3] ^= 4
    (newest / "tensors_00000.safetensors").write_bytes(data)
    assert "checkpoint.init_from: " in (said := refusal(workers, settings)) and "its SHA-256 differs" in said
    assert newest.is_dir()  # another run's checkpoint is not ours to rename
    settings = config(f"checkpoint.init_from={tmp_path / 'nowhere'}")
    assert "no complete checkpoint here" in refusal(workers, settings)


def test_versions_say_whether_the_checkout_was_changed(monkeypatch):
    found = versions()
    assert {"megachameleon", "torch", "megatron-core", "python", "commit"} <= set(found)
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, stdout="abc-dirty\n")
    )
    assert versions()["commit"] == "abc-dirty"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError("git")))
    assert versions()["commit"] == "unknown"
