"""Between runs and other formats: what a run has trained is exported, and what was imported is trained further."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import build_trainer, run_training
from converting import convert_checkpoint, tensors_of

from megachameleon.checkpoint.folder import resolve_checkpoint
from megachameleon.checkpoint.verifying.verification import largest_difference, logits_of, some_tokens
from megachameleon.parallel.context import parallel_context

pytest.importorskip("transformers", reason="an oracle of the tests only")

MODEL = ["model.norm_order=swin", "model.qk_norm_groups=2"]
TRAIN = ["training.num_steps=3", "checkpoint.every=3"]


@pytest.fixture(scope="module")
def trained(workers, module_config):
    """A bf16 run whose distributed optimizer has cut weights and masters anywhere."""
    settings = module_config(
        *(*MODEL, *TRAIN, "training.precision=bf16", "parallel.distributed_optimizer=true"), output="trained"
    )
    workers.run(2, run_training, settings)
    return settings


def begin(config):
    """Loss of two steps from imported weights, and the first step's learning rate."""
    from megachameleon.training.step import train_step

    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context)
        state, reports = trainer.state, []
        for step in range(2):
            report = train_step(state, trainer.data.train, config, context, step=step, consumed=8 * step)
            reports.append(report.losses.loss)
        return trainer.step, reports


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_run_is_exported(trained, dtype, tmp_path):
    """fp32 takes the masters, which the bf16 weights are rounded from."""
    run = Path(trained.output_dir)
    hf = convert_checkpoint(("megatron", "hf"), run, tmp_path / "hf", dtype=dtype)
    kind = getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[dtype])
    assert {tensor.dtype for tensor in tensors_of(hf).values()} == {kind}
    tokens = some_tokens(128)
    ours = logits_of("megatron", run, tokens, torch.float32, exact=dtype == "fp32")
    theirs = logits_of("hf", hf, tokens, torch.float32)
    assert largest_difference(ours, theirs)[1] < 1e-5
    other = logits_of("megatron", run, tokens, torch.float32, exact=dtype != "fp32")
    assert largest_difference(other, theirs)[1] > 1e-4  # so the two kinds of weights were told apart


def test_training_goes_on_from_an_import(workers, trained, config, tmp_path):
    """At tensor 2 x pipeline 2, with a fresh optimizer, from the loss of the exported model."""
    hf = convert_checkpoint(("megatron", "hf"), Path(trained.output_dir), tmp_path / "hf", dtype="fp32")
    layout = {"tensor_parallel": 2, "pipeline_parallel": 2}
    ours = convert_checkpoint(("hf", "megatron"), hf, tmp_path / "imported", **layout)
    overrides = [*MODEL, *TRAIN, "parallel.tensor_parallel=2", "parallel.pipeline_parallel=2"]
    settings = config(*overrides, f"checkpoint.init_from={ours}")
    found = workers.run(4, begin, settings)[-1]
    longer = replace(trained, output_dir=str(tmp_path / "fork"))
    direct = replace(longer, checkpoint=replace(longer.checkpoint, init_from=trained.output_dir))
    direct = replace(direct, training=replace(direct.training, precision="fp32"))
    direct = replace(direct, parallel=replace(direct.parallel, distributed_optimizer=False))
    expected = workers.run(1, begin, direct)[0]
    assert found[0] == expected[0] == 0
    assert found[1] == pytest.approx(expected[1], abs=1e-5)
    fresh = workers.run(1, begin, replace(direct, checkpoint=replace(direct.checkpoint, init_from=None)))[0]
    assert abs(fresh[1][0] - expected[1][0]) > 1e-3
    assert resolve_checkpoint(ours).name == "step_00000000"
