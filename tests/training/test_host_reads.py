"""How often a training step reads the device. On a GPU each read waits for all work before it, so a step has one, at
its end. Counted on the CPU, where the same lines run."""

import traceback
from collections import Counter

import pytest
import torch
from cases import build_trainer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megachameleon.parallel.context import parallel_context

READS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_dim", "equal", "is_nonzero"}
"""Operations whose result, or its shape, depends on values."""
METHODS = {"tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__"}
"""Methods that copy values to Python; some reach no operation on the CPU."""

ONLY_ON_THE_CPU = "segmented_attention.py"
"""Documents are cut into pieces there. See test_cuda_does_not_plan_by_pieces."""
THE_READ = "step.py: train_step: tolist"
"""The report and the gradient norm, together."""


def place():
    """The innermost line that is ours, or megatron-core's: file and function."""
    for frame in reversed(traceback.extract_stack()):
        if (
            "/megachameleon/" in frame.filename or "/megatron/" in frame.filename
        ) and "device.py" not in frame.filename:
            return f"{frame.filename.rpartition('/')[2]}: {frame.name}"
    return "?"


class Notes:
    def __init__(self):
        self.found = Counter()

    def note(self, what):
        where = place()
        if not where.startswith(ONLY_ON_THE_CPU):
            self.found[f"{where}: {what}"] += 1


class Operations(TorchDispatchMode):
    def __init__(self, notes):
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        if name in READS or (name in ("index", "index_put_", "index_put") and counts_a_mask(*args[1:])):
            self.notes.note(name)
        return func(*args, **(kwargs or {}))


def counts_a_mask(indices, values=None, *_):
    """Whether an index needs the number of true entries; one value for all of them is filled in without counting."""
    by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
    return by_mask and (values is None or values.numel() > 1)


class Methods(TorchFunctionMode):
    def __init__(self, notes):
        super().__init__()
        self.notes = notes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in METHODS:
            self.notes.note(name)
        return func(*args, **(kwargs or {}))


def reads_of_a_step(config):
    """Counts of reads by place, in the second step of a run, with all monitors at work."""
    from megachameleon.training.step import train_step

    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context)
        notes = Notes()
        for step in range(2):
            arguments = (trainer.state, trainer.data.train, trainer.config, context)
            consumed = step * config.training.global_batch_size
            if step == 0:
                train_step(*arguments, step=step, consumed=consumed)
                continue
            with Operations(notes), Methods(notes):
                train_step(*arguments, step=step, consumed=consumed, monitors=trainer.monitors)
        return dict(notes.found)


SETTINGS = {
    "one process": (1, []),
    "swin, groups, bf16": (1, ["model.norm_order=swin", "model.qk_norm_groups=2", "training.precision=bf16"]),
    "fp8": (1, ["kernels.fp8=scaled_mm", "training.precision=bf16"]),
    "tensor, sequence": (2, ["parallel.tensor_parallel=2", "parallel.sequence_parallel=true"]),
    "pipeline": (2, ["parallel.pipeline_parallel=2"]),
    "distributed optimizer": (2, ["parallel.distributed_optimizer=true", "parallel.overlap_grad_reduce=true"]),
    "recompute": (1, ["parallel.recompute=full"]),
    "selective recompute, dropout": (1, ["parallel.recompute=selective", "model.dropout=0.1"]),
    "one stream": (1, ["data.isolate_documents=false"]),
    "context": (2, ["parallel.context_parallel=2"]),
    "interleaved, overlapped": (
        2,
        [
            *("parallel.pipeline_parallel=2", "parallel.virtual_pipeline_parallel=2", "model.num_layers=4"),
            *("parallel.distributed_optimizer=true", "parallel.overlap_grad_reduce=true"),
            "parallel.overlap_param_gather=true",
        ],
    ),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_reads_the_device_once(workers, module_config, setting):
    world_size, overrides = SETTINGS[setting]
    for found in workers.run(world_size, reads_of_a_step, module_config("logging.monitor_every=1", *overrides)):
        assert found == {THE_READ: 1}


def test_reads_are_seen():
    """The counter itself: each kind of read, and not what looks like one."""
    notes = Notes()
    x = torch.arange(4.0)
    with Operations(notes), Methods(notes):
        x.sum().item(), float(x[1]), x.tolist(), x.nonzero(), x[x > 1], bool(x[0] == 0), torch.equal(x, x)
        seen = sum(notes.found.values())
        x.sum(), x[1:], x.where(x > 1, 0), x[torch.tensor([1, 2])]
        x[x > 1] = 0
    assert seen >= 7 and sum(notes.found.values()) == seen


def test_cuda_does_not_plan_by_pieces(monkeypatch):
    """Counting documents reads the device; on CUDA only masks are made, and not from counts."""
    from megachameleon.model.kernels import native
    from megachameleon.model.sequence_layout import SequenceLayout

    monkeypatch.setattr(native, "plan_segments", lambda layout: pytest.fail("planned by pieces"))
    monkeypatch.setattr(native, "_block_mask", lambda layout: "mask")
    for ids, expected in ((None, None), (torch.zeros(2, 8, dtype=torch.int32), "mask")):
        layout = SequenceLayout(
            batch=2, num_keys=8, query_chunks=((0, 8),), document_ids=ids, device=torch.device("cuda")
        )
        assert native.Attention().plan(layout) == expected
