"""Layouts that do not divide are refused with numbers that would work, and those do."""

import re

import pytest

from megachameleon.config import load_config

PIPELINE = ["parallel.pipeline_parallel=2", "model.num_layers=12"]
CONTEXT = "parallel.context_parallel"
SP = ["parallel.tensor_parallel=2", "parallel.sequence_parallel=true"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.virtual_pipeline_parallel=2"], r"parallel: 2 needs pipeline_parallel of 2 or more"),
        (["parallel.context_parallel=0"], r"context_parallel: 0 must be at least 1"),
        (["parallel.overlap_param_gather=true"], r"distributed_optimizer and overlap_grad_reduce; set both to true"),
        (
            ["parallel.overlap_param_gather=true", "parallel.distributed_optimizer=true"],
            r"needs distributed_optimizer and overlap_grad_reduce",
        ),
        (["parallel.bucket_size=0"], r"bucket_size: 0 must be at least 1"),
        (["parallel.recompute=selective", "parallel.recompute_modules=[]"], r"leaves nothing to recompute"),
        (
            ["parallel.recompute=selective", "parallel.recompute_modules=[layernorm]", "model.norm_order=swin"],
            r"\['layernorm'\] leaves nothing to recompute with model\.norm_order=swin; name one of mlp",
        ),
        (["parallel.recompute=some"], r"'some' is not one of none, selective, full"),
        (["parallel.recompute_modules=[core_attn]"], r"'core_attn' is not one of layernorm, mlp"),
    ],
)  # fmt: skip
def test_what_cannot_be_together_is_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config("debug", overrides)


@pytest.mark.parametrize(
    ("field", "value", "others", "works"),
    [
        ("parallel.tensor_parallel", 4, ["model.num_query_groups=2"], [1, 2]),
        ("parallel.pipeline_parallel", 5, PIPELINE[1:], [1, 2, 3, 4, 6, 12]),
        ("parallel.virtual_pipeline_parallel", 4, PIPELINE, [1, 2, 3, 6]),
        ("data.sequence_length", 65, SP, [64, 66]),
        ("data.sequence_length", 62, [f"{CONTEXT}=4"], [56, 64]),
        ("data.sequence_length", 62, [f"{CONTEXT}=2", *SP], [60, 64]),
        ("data.sequence_length", 3, [f"{CONTEXT}=2"], [4]),
    ],
)
def test_numbers_that_would_work_are_given(field, value, others, works):
    with pytest.raises(ValueError, match="does not divide") as caught:
        load_config("debug", [*others, f"{field}={value}"])
    given = re.findall(r"\d+", re.split(r"sizes that do:|; ", str(caught.value))[-1])
    assert [int(number) for number in given] == works
    for number in works:
        load_config("debug", [*others, f"{field}={number}"])


def test_world_counts_context_ranks():
    config = load_config("debug", ["parallel.context_parallel=2", "parallel.tensor_parallel=2"])
    assert config.parallel.model_parallel == 4
    assert config.parallel.data_parallel(8) == 2
    with pytest.raises(
        ValueError, match="context_parallel=2 = 4 does not divide the 6 processes; start a multiple of 4"
    ):
        config.validate_world(6)


def test_interleaved_schedule_needs_whole_rounds():
    overrides = [*PIPELINE, "parallel.virtual_pipeline_parallel=3", "training.micro_batch_size=2"]
    load_config("debug", overrides).validate_world(2)  # 4 micro-batches
    odd = [*overrides, "training.global_batch_size=6"]
    with pytest.raises(ValueError, match=r"global_batch_size=6 makes 3 on each rank; 4 or 8 would work"):
        load_config("debug", odd).validate_world(2)
    for batch in (4, 8):
        load_config("debug", [*overrides, f"training.global_batch_size={batch}"]).validate_world(2)
    with pytest.raises(ValueError, match=r"global_batch_size=4 makes 1 on each rank; 8 would work"):
        load_config("debug", [*overrides, "training.global_batch_size=4"]).validate_world(4)


def test_axes_in_words():
    config = load_config("debug", [*PIPELINE, "parallel.virtual_pipeline_parallel=3", "parallel.context_parallel=2"])
    assert config.parallel.describe(8) == "tensor 1 x pipeline 2 (3 chunks each) x context 2 x data 2"
    assert load_config("debug").parallel.describe(3) == "tensor 1 x pipeline 1 x data 3"
