"""The fast operations against the plain ones, and the plain ones against textbook formulas.

fp32: 1e-5, the two sum in another order. bf16: 2e-2, a few units in the last place of eight bits.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import parallel_context

from megachameleon.config import ParallelConfig

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module", autouse=True)
def single_process():
    with parallel_context(ParallelConfig()) as context:
        yield context


def assert_near(got, expected, dtype):
    torch.testing.assert_close(got.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_norms(dtype):
    from megachameleon.model.kernels import native, reference

    x, weight, bias = torch.randn(5, 3, 16).to(dtype), torch.randn(16).to(dtype), torch.randn(16).to(dtype)
    assert_near(native.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), dtype)
    assert_near(native.layer_norm(x, weight, bias, 1e-5), reference.layer_norm(x, weight, bias, 1e-5), dtype)
    assert_near(reference.layer_norm(x, weight, bias, 1e-5), F.layer_norm(x, (16,), weight, bias, 1e-5), dtype)


def document_ids():
    """Long, short, single-token and padding runs; one row is a single document."""
    rows = [
        [0] * 7 + [1] + [2] * 12 + [3] * 4,
        [0] * 24,
        [0] * 10 + [1] * 3 + [-1] * 11,
    ]
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_documents", [True, False])
def test_attention_and_its_gradients(dtype, with_documents):
    from megachameleon.model.kernels import native, reference

    torch.manual_seed(0)
    ids = document_ids() if with_documents else None
    inputs = [torch.randn(24, 3, heads, 8).to(dtype) for heads in (4, 2, 2)]
    upstream = torch.randn(24, 3, 4, 8).to(dtype)
    results = []
    for kernel in (native.attention, reference.attention):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = kernel(*leaves, ids, 8**-0.5)
        output.backward(upstream)
        results.append([output, *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*results, strict=True):
        assert_near(got, expected, dtype)


def test_attention_of_packed_documents_equals_each_alone():
    from megachameleon.model.kernels import native

    torch.manual_seed(0)
    query, key, value = (torch.randn(24, 1, 4, 8) for _ in range(3))
    ids = document_ids()[:1]
    packed = native.attention(query, key, value, ids, 0.3)
    start = 0
    for length in (7, 1, 12, 4):
        part = slice(start, start + length)
        alone = native.attention(query[part], key[part], value[part], None, 0.3)
        torch.testing.assert_close(packed[part], alone, rtol=1e-5, atol=1e-6)
        start += length


def test_attention_of_new_positions_sees_the_past_and_not_the_padding():
    from megachameleon.model.kernels import native, reference

    torch.manual_seed(0)
    key, value = torch.randn(10, 2, 2, 8), torch.randn(10, 2, 2, 8)
    query = torch.randn(1, 2, 4, 8)
    ids = torch.tensor([[0] * 10, [-1] * 4 + [0] * 6], dtype=torch.int32)
    got = native.attention(query, key, value, ids, 0.3)
    assert_near(got, reference.attention(query, key, value, ids, 0.3), torch.float32)
    value[:4, 1], key[:4, 1] = 1e6, 100.0  # padding of the second row, which nobody may see
    torch.testing.assert_close(native.attention(query, key, value, ids, 0.3), got)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cross_entropy_and_log_z(dtype):
    from megachameleon.model.kernels import native, reference

    torch.manual_seed(0)
    logits, labels = (torch.randn(6, 3, 32) * 4).to(dtype), torch.randint(0, 32, (6, 3))
    results = []
    for kernel in (native.cross_entropy, reference.cross_entropy):
        leaf = logits.clone().requires_grad_()
        nll, log_z = kernel(leaf, labels, dist.group.WORLD)
        (nll.sum() + 0.1 * log_z.square().sum()).backward()
        results.append((nll, log_z, leaf.grad))
    leaf = logits.clone().requires_grad_()
    nll = F.cross_entropy(leaf.float().flatten(0, 1), labels.flatten(), reduction="none").view(6, 3)
    log_z = leaf.float().logsumexp(-1)
    (nll.sum() + 0.1 * log_z.square().sum()).backward()
    for result in results:
        for got, expected in zip(result, (nll, log_z, leaf.grad), strict=True):
            assert_near(got, expected, dtype)


def split_cross_entropy():
    """Run in two processes: loss and gradient of this rank's half of the vocabulary."""
    from megachameleon.model.kernels import native, reference

    with parallel_context(ParallelConfig(tensor_parallel=2)) as context:
        torch.manual_seed(0)
        logits, labels = torch.randn(6, 3, 32) * 4, torch.randint(0, 32, (6, 3))
        results = []
        for kernel in (native.cross_entropy, reference.cross_entropy):
            leaf = logits.chunk(2, -1)[context.tensor_rank].clone().requires_grad_()
            nll, log_z = kernel(leaf, labels, context.groups.tp)
            (nll.sum() + 0.1 * log_z.square().sum()).backward()
            results.append((nll.detach(), log_z.detach(), leaf.grad))
        return results


def test_cross_entropy_over_a_split_vocabulary(workers):
    torch.manual_seed(0)
    logits, labels = (torch.randn(6, 3, 32) * 4).requires_grad_(), torch.randint(0, 32, (6, 3))
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(6, 3)
    log_z = logits.logsumexp(-1)
    (nll.sum() + 0.1 * log_z.square().sum()).backward()
    for rank, results in enumerate(workers.run(2, split_cross_entropy)):
        for got_nll, got_log_z, grad in results:
            assert_near(got_nll, nll, torch.float32)
            assert_near(got_log_z, log_z, torch.float32)
            assert_near(grad, logits.grad.chunk(2, -1)[rank], torch.float32)


def test_forced_backends_are_honoured():
    from megachameleon.config import KernelsConfig
    from megachameleon.model.kernels import native, reference
    from megachameleon.model.kernels.table import choose_kernels, describe_kernels

    asked = KernelsConfig(attention="reference")
    kernels = choose_kernels(asked)
    assert kernels.attention is reference.attention
    assert kernels.cross_entropy is native.cross_entropy
    rows = {name: backend for name, backend, _ in describe_kernels(asked, kernels, torch.device("cpu"))}
    assert rows["attention"] == "reference (forced)" and rows["loss"] == "torch (chosen)"
