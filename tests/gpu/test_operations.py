"""Every backend of every operation against the plain one, in bf16, with gradients."""

import pytest
import torch
from cases_gpu import DEVICE, assert_like_reference

from megachameleon.config import KernelsConfig
from megachameleon.config.kernels import OPERATIONS


def backends(operation):
    from typing import get_args, get_type_hints

    return [
        backend
        for backend in get_args(get_type_hints(KernelsConfig)[operation])
        if backend not in ("auto", "reference")
    ]


def each(*operations):
    assert set(operations) <= set(OPERATIONS)
    return pytest.mark.parametrize(
        ("operation", "backend"), [(operation, backend) for operation in operations for backend in backends(operation)]
    )


def kernels(operation, backend):
    from megachameleon.model.kernels.table import choose_kernels

    return choose_kernels(KernelsConfig(**{operation: backend}), DEVICE)


@each("norm", "qk_norm", "rotary", "swiglu")
def test_operation(operation, backend, require_backend):
    from megachameleon.model.sequence_layout import rotary_tables

    require_backend(operation, backend)
    x, weight, bias = (torch.randn(*shape) for shape in ((64, 2, 8, 128), (128,), (128,)))
    tables = rotary_tables(torch.arange(64, device=DEVICE).expand(2, -1), 128, 10_000.0, torch.bfloat16)
    calls = {
        "norm": (lambda k: lambda x, w: k.rms_norm(x, w, 1e-5), (x, weight)),
        "qk_norm": (lambda k: lambda x, w, b: k.head_norm(x, w, b, 1e-5), (x, weight, bias)),
        "rotary": (lambda k: lambda x: k.rotary(x, *tables), (x,)),
        "swiglu": (lambda k: lambda x: k.swiglu(x.flatten(2)), (x,)),
    }
    call, inputs = calls[operation]
    assert_like_reference(call(kernels(operation, backend)), call(kernels(operation, "reference")), *inputs)


@each("attention")
@pytest.mark.parametrize("with_documents", [True, False])
@pytest.mark.parametrize("groups", [8, 2])
def test_attention(operation, backend, with_documents, groups, require_backend):
    from megachameleon.model.sequence_layout import SequenceLayout

    require_backend(operation, backend)
    ids = torch.tensor([[0] * 100 + [1] * 156, [0] * 255 + [-1]], dtype=torch.int32, device=DEVICE)
    layout = SequenceLayout(
        batch=2,
        num_keys=256,
        query_chunks=((0, 256),),
        document_ids=ids if with_documents else None,
        device=torch.device(DEVICE),
    )

    def attend(which):
        attention = kernels(operation, which).attention
        return lambda q, k, v: attention(q, k, v, attention.plan(layout), 64**-0.5)

    inputs = [torch.randn(256, 2, heads, 64) for heads in (8, groups, groups)]
    assert_like_reference(attend(backend), attend("reference"), *inputs)


def test_weight_gradients_are_summed_in_fp32():
    """Sixty-four products of bf16 into one sum: rounding each to bf16 first would cost 2e-3."""
    from megachameleon.model.kernels.linear import add_torch_weight_gradient

    total = torch.zeros(96, 64, device=DEVICE)
    exact = torch.zeros(96, 64, dtype=torch.float64, device=DEVICE)
    for _ in range(64):
        grad, x = (torch.randn(32, n, device=DEVICE).bfloat16() for n in (96, 64))
        add_torch_weight_gradient(grad, x, total)
        exact += grad.double().t() @ x.double()
    assert (total - exact).norm() < 1e-5 * exact.norm()


def test_scaled_mm():
    from megachameleon.model.kernels import float8

    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs a GPU of Ada, Hopper or later")
    x, weight = (torch.randn(n, 256, device=DEVICE).bfloat16() for n in (33, 128))
    (x8, x_scale), (w8, w_scale) = float8.quantize_rows(x), float8.quantize_rows(weight)
    emulated = (x8.double() * x_scale) @ (w8.double() * w_scale).t()
    got = float8.output(x, weight)
    assert (got - emulated).norm() < 5e-3 * emulated.norm()
    assert 0.01 < (got - x @ weight.t()).norm() / (x @ weight.t()).norm() < 0.05


@pytest.mark.parametrize("sizes", [None, (32, 40)], ids=["as chosen", "ragged"])
def test_the_head_adds_what_a_dense_one_in_fp64_does(one_gpu, sizes):
    """The compiled passes over logits, and products that add to the fp32 sum."""
    from megachameleon.model.head import Targets
    from megachameleon.model.kernels import chunked_head

    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 2, 64).bfloat16().to(DEVICE), (torch.randn(96, 64) / 4).bfloat16().to(DEVICE)
    labels, weights = torch.randint(0, 96, (2, 40), device=DEVICE), torch.rand(2, 40, device=DEVICE)
    targets = Targets(labels=labels, weights=weights, is_image=labels < 20, z_loss=0.02)
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = torch.einsum("sbh,vh->bsv", x, w)
    log_z = logits.logsumexp(-1)
    nll = log_z - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    loss = (weights.double() * (nll + 0.02 * log_z**2)).sum()
    loss.backward()
    hidden.requires_grad_(), weight.requires_grad_()
    weight.main_grad = torch.zeros(weight.shape, device=DEVICE)
    chosen = None if sizes is None else chunked_head.BlockSizes(tokens=sizes[0], vocabulary=sizes[1])
    sums = chunked_head.ChunkedHead(chosen)(hidden, weight, targets, one_gpu.groups.tp, False)
    sums[0].backward()
    assert float(sums[0]) == pytest.approx(float(loss), rel=1e-2)
    assert (hidden.grad.double() - x.grad).norm() < 1e-2 * x.grad.norm()
    assert (weight.main_grad.double() - w.grad).norm() < 1e-2 * w.grad.norm()
