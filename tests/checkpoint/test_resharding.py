"""From any layout, optimizer and precision to any other: the same state to the bit, and the same training after it.

Two steps at the source, a checkpoint, two more at the source; the target resumes from the checkpoint and takes the same
two. What the optimizers of both hold right after the save and the load is compared bit for bit. Losses and parameters
after the further steps, in fp32: at most 1e-6 apart, by relative L2 error, for sums over ranks run in another order
(1.3e-7 seen).
"""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import build_trainer, spread_norms
from whole import gather, gather_state, relative_errors

from megachameleon.checkpoint.boxes import Box, within
from megachameleon.checkpoint.folder import INDEX_FILE, resolve_checkpoint
from megachameleon.checkpoint.tensors import index_from_json
from megachameleon.files import read_json
from megachameleon.parallel.context import parallel_context
from megachameleon.parallel.replicas import gather_parameters
from megachameleon.training.callbacks.base import Callback

DISTRIBUTED = "distributed_optimizer=true"
OVERLAP = f"{DISTRIBUTED} overlap_grad_reduce=true overlap_param_gather=true bucket_size=3000"
"""Small buckets: several of them make up the model."""
SP = "tensor_parallel=2 sequence_parallel=true"
INTERLEAVED = "pipeline_parallel=2 virtual_pipeline_parallel=2"
LAYOUTS = {
    # name: (processes, settings of `parallel`)
    "1": (1, ""),
    "TP2": (2, "tensor_parallel=2"),
    "TP2-SP": (2, SP),
    "TP4-SP": (4, "tensor_parallel=4 sequence_parallel=true"),
    "PP4": (4, "pipeline_parallel=4"),
    "PP2-VPP2": (2, INTERLEAVED),
    "DP2": (2, ""),
    "DP4": (4, ""),
    "DP2-distributed": (2, DISTRIBUTED),
    "DP4-distributed": (4, DISTRIBUTED),
    "DP2-overlap": (2, OVERLAP),
    "DP2-overlap, larger buckets": (2, OVERLAP.replace("3000", "20000")),
    "CP2": (2, "context_parallel=2"),
    "CP2-overlap": (2, f"context_parallel=2 {OVERLAP}"),
    "TP2-SP-PP2": (4, f"{SP} pipeline_parallel=2"),
    "TP2-CP2": (4, "tensor_parallel=2 context_parallel=2"),
    "TP2-DP2-distributed": (4, f"tensor_parallel=2 {DISTRIBUTED}"),
    "TP2-SP-DP2-overlap": (4, f"{SP} {OVERLAP}"),
    "PP2-DP2-distributed": (4, f"pipeline_parallel=2 {DISTRIBUTED}"),
    "PP2-VPP2-DP2-overlap": (4, f"{INTERLEAVED} {OVERLAP}"),
    "PP2-VPP2-CP2": (4, f"{INTERLEAVED} context_parallel=2"),
    "CP2-DP2-distributed": (4, f"context_parallel=2 {DISTRIBUTED}"),
    "TP2-PP4": (8, "tensor_parallel=2 pipeline_parallel=4"),
    "DP8-overlap": (8, OVERLAP),
    "TP2-SP-PP2-VPP2-DP2-overlap": (8, f"{SP} {INTERLEAVED} {OVERLAP}"),
    "TP2-SP-PP2-CP2-distributed": (8, f"{SP} pipeline_parallel=2 context_parallel=2 {DISTRIBUTED}"),
    "CP4-DP2": (8, "context_parallel=4"),
}
ORDERS = {"pre": "model.norm_order=pre", "swin": "model.norm_order=swin model.qk_norm_groups=2"}
BASE = [
    "model.num_layers=4",
    "model.hidden_size=64",
    "model.num_attention_heads=8",
    "model.num_query_groups=4",
    "optimizer.lr=1e-3",
    "optimizer.warmup_steps=0",
    "optimizer.decay=constant",
    "training.micro_batch_size=1",
    "training.validate_every=0",
    "training.num_steps=4",
    "checkpoint.every=2",
    "checkpoint.keep_last=3",
]
SAVED = 2
"""Steps before the checkpoint."""

FAST = [
    ("pre", "1", "TP2-SP"),
    ("pre", "1", "DP2-overlap"),
    ("pre", "DP2-overlap", "1"),
    ("pre", "DP2-overlap", "CP2-overlap"),
    ("pre", "DP2-overlap", "PP2-VPP2"),
    ("swin", "TP2-SP", "PP2-VPP2"),
    ("swin", "TP2-SP", "DP2-distributed"),
    ("swin", "PP2-VPP2", "DP2"),
    ("swin", "PP2-VPP2", "TP2-SP-PP2"),
]
SLOW = [
    ("swin", "1", "TP2-SP-PP2-VPP2-DP2-overlap"),
    ("pre", "TP4-SP", "PP4"),
    ("swin", "PP4", "TP2-CP2"),
    ("pre", "CP2", "TP2"),
    ("swin", "DP4", "TP2-DP2-distributed"),
    ("pre", "DP4-distributed", "DP2-distributed"),
    ("pre", "DP2-overlap", "DP2-overlap, larger buckets"),
    ("swin", "TP2-DP2-distributed", "PP2-DP2-distributed"),
    ("swin", "PP2-VPP2-DP2-overlap", "TP4-SP"),
    ("swin", "PP2-VPP2-DP2-overlap", "CP2-DP2-distributed"),
    ("pre", "CP2-DP2-distributed", "PP2-VPP2-CP2"),
    ("pre", "DP8-overlap", "TP2-PP4"),
    ("swin", "TP2-SP-PP2-CP2-distributed", "1"),
    ("pre", "TP2-SP-PP2-VPP2-DP2-overlap", "CP4-DP2"),
    ("swin", "CP4-DP2", "DP8-overlap"),
]


class Recorder(Callback):
    """Keeps the losses, and the whole state as it was when the checkpoint was taken."""

    def __init__(self):
        self.losses, self.state = [], None

    def on_step(self, trainer, event):
        self.losses.append(event.report.losses.loss)
        if event.step == SAVED:
            gather_parameters(trainer.state.model, trainer.config.parallel)
            self.state = gather_state(trainer.state.model, trainer.state.optimizer, trainer.context)


def train(config):
    """Steps before, state at the checkpoint, losses after it, final parameters: of a fresh run or of a resumed one."""
    recorder = Recorder()
    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context, [recorder])
        start = trainer.step
        if start:
            recorder.state = gather_state(trainer.state.model, trainer.state.optimizer, context)
        else:
            spread_norms(trainer)
        trainer.run()
        gather_parameters(trainer.state.model, config.parallel)
        final = gather(trainer.state.model, context, gradients=False)
        return start, recorder.state, recorder.losses[SAVED - start :], final


@pytest.fixture(scope="module")
def sources(workers, module_config):
    """What became of a run at a layout, and its folder as it was after its checkpoint."""
    cache = {}

    def get(layout, order, precision):
        key = layout, order, precision
        if key not in cache:
            processes, overrides = settings(layout, order, precision)
            config = module_config(*overrides, output=f"source{len(cache)}")
            results = workers.run(processes, train, config)[0]
            shutil.rmtree(Path(config.output_dir) / "checkpoints" / "step_00000004")
            cache[key] = config, results
        return cache[key]

    return get


def settings(layout, order, precision):
    processes, parallel = LAYOUTS[layout]
    overrides = [*(f"parallel.{setting}" for setting in parallel.split()), f"training.precision={precision}"]
    return processes, [*BASE, *ORDERS[order].split(), *overrides]


@pytest.fixture
def resume(workers, module_config, tmp_path):
    """The same results of a run that goes on from a source's checkpoint."""

    def run(source, layout, order, precision):
        processes, overrides = settings(layout, order, precision)
        folder = shutil.copytree(source.output_dir, tmp_path / "target")
        return workers.run(processes, train, replace(module_config(*overrides), output_dir=str(folder)))[0]

    return run


def require_equal_states(got, expected):
    assert got.keys() == expected.keys()
    assert {key.split()[0] for key in got} >= {"weight", "exp_avg", "exp_avg_sq"}
    for key in expected:
        assert got[key].dtype == expected[key].dtype and torch.equal(got[key], expected[key]), key


def require_trained_alike(got, expected, bound):
    assert got[2] == pytest.approx(expected[2], rel=bound)
    assert max(relative_errors(got[3], expected[3]).values()) < bound


PAIRS = [*FAST, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)]


@pytest.mark.parametrize(("order", "before", "after"), PAIRS, ids=str)
def test_another_layout_has_the_same_state_and_trains_on_alike(sources, resume, order, before, after):
    source, expected = sources(before, order, "fp32")
    got = resume(source, after, order, "fp32")
    assert (expected[0], got[0]) == (0, SAVED)
    assert len(got[2]) == len(expected[2]) == 2
    require_equal_states(got[1], expected[1])
    assert got[2] == pytest.approx(expected[2], rel=1e-6)
    assert max(relative_errors(got[3], expected[3]).values()) < 1e-6


PRECISIONS = [
    ("fp32", "1", "bf16", "DP2-overlap"),
    ("bf16", "DP2-overlap", "fp32", "1"),
    pytest.param("fp32", "TP2-SP-PP2", "bf16", "CP2-DP2-distributed", marks=pytest.mark.slow),
    pytest.param("bf16", "PP2-VPP2", "fp32", "TP2-SP-DP2-overlap", marks=pytest.mark.slow),
    pytest.param("bf16", "TP2-SP-DP2-overlap", "bf16", "PP2-VPP2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("old", "before", "new", "after"), PRECISIONS, ids=str)
def test_another_precision_has_the_same_masters_and_moments(sources, resume, old, before, new, after):
    """A weight of fp32 is the master of bf16, whose weight is its rounding. Losses afterwards differ by bf16's rounding
    of the weights and of all that is computed: 1e-3 of the loss at most (1e-4 seen)."""
    source, expected = sources(before, "pre", old)
    got = resume(source, after, "pre", new)
    require_equal_states(in_precision(got[1], "fp32"), in_precision(expected[1], "fp32"))
    require_equal_states(in_precision(got[1], "bf16"), in_precision(expected[1], "bf16"))
    assert {str(got[1][key].dtype) for key in got[1] if key.startswith("weight")} == {
        {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[new]
    }
    assert got[2] == pytest.approx(expected[2], rel=1e-3)


def in_precision(state, precision):
    """A state as a run of a precision would hold it: in fp32 without masters, in bf16 with them."""
    masters = {key.split()[1]: values for key, values in state.items() if key.startswith("master")}
    state = {key: values for key, values in state.items() if not key.startswith("master")}
    for key in [key for key in state if key.startswith("weight")]:
        name = key.split()[1]
        master = masters.get(name, state[key])
        assert torch.equal(state[key], master.to(state[key].dtype)), name
        if precision == "fp32":
            state[key] = master
        else:
            state |= {key: master.bfloat16(), f"master {name}": master}
    return state


@pytest.mark.parametrize(
    "layout",
    [
        "DP2",
        "DP2-overlap",
        "TP2-SP",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("DP4", "TP2-SP-PP2-CP2-distributed")),
    ],
)
def test_every_value_is_stored_once_and_ranks_store_alike_much(sources, layout):
    """Padding, norms that tensor-parallel ranks share, and pipeline stages of other sizes make the rest."""
    source, _ = sources(layout, "swin" if "TP" in layout else "pre", "fp32")
    checkpoint = resolve_checkpoint(Path(source.output_dir))
    index = index_from_json(read_json(checkpoint / INDEX_FILE), origin="index")
    for key, entry in index.items():
        times = torch.zeros(entry.shape, dtype=torch.int)
        for part in entry.parts:
            times[within(Box((0,) * len(entry.shape), entry.shape), part.box)] += 1
        assert (times == 1).all(), key
    sizes = [path.stat().st_size for path in sorted(checkpoint.glob("*.safetensors"))]
    assert len(sizes) == LAYOUTS[layout][0]
    if "PP" not in layout:
        assert max(sizes) < 1.2 * min(sizes)
