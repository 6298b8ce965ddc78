"""The head against a dense fp64 one: sums, gradients, memory, and its bargain with `main_grad`."""

import shutil

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from head_cases import BATCH, HIDDEN, SEQUENCE, VOCAB, Z_LOSS, kernel, problem, split_head
from torch.utils._python_dispatch import TorchDispatchMode

from megachameleon.config import ParallelConfig
from megachameleon.model.kernels import chunked_head
from megachameleon.parallel.context import parallel_context

GRADIENT_ERROR = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
SUMS_ERROR = {torch.float32: 1e-6, torch.bfloat16: 1e-2}  # bf16: every logit is rounded to eight bits
RAGGED = (7, 10)
"""Blocks of 7 tokens and 10 ids, which divide neither 60 tokens nor 88, 44 or 22 ids."""


@pytest.fixture(scope="module", autouse=True)
def single_process():
    with parallel_context(ParallelConfig()) as context:
        yield context


def dense(dtype, seed=0):
    """Sums and gradients in fp64, from the formulas alone."""
    hidden, weight, targets = problem(dtype, seed)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = torch.einsum("sbh,vh->bsv", hidden, weight)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.labels.flatten(), reduction="none").view(BATCH, SEQUENCE)
    log_z = logits.logsumexp(-1)
    loss = (targets.weights.double() * (nll + Z_LOSS * log_z**2)).sum()
    loss.backward()
    text, image = (targets.weights > 0) & ~targets.is_image, (targets.weights > 0) & targets.is_image
    both = text | image
    sums = [loss, nll[text].sum(), nll[image].sum(), log_z[both].sum(), (log_z[both] ** 2).sum()]
    return torch.stack([*sums, text.sum(), image.sum()]).detach(), hidden.grad, weight.grad


def relative_error(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


def assert_near(got, expected, dtype):
    """Sums each on its own, gradients as whole tensors."""
    (sums, *gradients), (expected_sums, *expected_gradients) = got, expected
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, expected_sums, rtol=SUMS_ERROR[dtype], atol=0)
    assert torch.equal(sums[5:], expected_sums[5:])
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        assert relative_error(gradient, expected_gradient) <= GRADIENT_ERROR[dtype]


@pytest.mark.parametrize("sizes", [None, RAGGED], ids=["reference", "chunked"])
@pytest.mark.parametrize("dtype", GRADIENT_ERROR)
@pytest.mark.parametrize(
    ("tensor_parallel", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, False), (4, True)]
)
def test_equals_a_dense_head_in_fp64(workers, tensor_parallel, sequence_parallel, dtype, sizes):
    expected_sums, expected_hidden, expected_weight = dense(dtype)
    results = workers.run(tensor_parallel, split_head, tensor_parallel, sequence_parallel, dtype, sizes)
    weight = torch.cat([grad for _, _, grad in results])
    hidden = [torch.cat([grad for _, grad, _ in results])] if sequence_parallel else [grad for _, grad, _ in results]
    for sums, _, _ in results:
        assert torch.equal(sums, results[0][0])
        for whole in hidden:
            assert_near((sums, whole, weight), (expected_sums, expected_hidden, expected_weight), dtype)


def run(sizes, dtype=torch.float32, seed=0, weight=None):
    """Sums and gradients in this process; a weight given keeps its `main_grad`."""
    hidden, own, targets = problem(dtype, seed)
    weight = own.requires_grad_() if weight is None else weight
    hidden.requires_grad_()
    sums = kernel(sizes)(hidden, weight, targets, dist.group.WORLD, False)
    sums[0].backward()
    return sums.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("dtype", GRADIENT_ERROR)
@pytest.mark.parametrize("sizes", [(9, 5), (7, 88), (60, 10), (61, 89), (1 << 30, 1 << 30)])
def test_any_blocks_give_the_same(sizes, dtype):
    assert_near(run(sizes, dtype), dense(dtype), dtype)


def test_nothing_overflows_and_confident_tokens_keep_their_gradient():
    """Logits of some hundreds, whose exponentials have no fp32, and labels that are all but certain."""
    hidden, weight, targets = problem(torch.float32)
    hidden, weight = (hidden * 30).requires_grad_(), weight.requires_grad_()
    confident = torch.einsum("sbh,vh->bsv", hidden, weight).argmax(-1)
    targets = type(targets)(labels=confident, weights=targets.weights, is_image=targets.is_image, z_loss=0.0)
    sums = kernel(RAGGED)(hidden, weight, targets, dist.group.WORLD, False)
    sums[0].backward()
    wide = hidden.detach().double().requires_grad_()
    logits = torch.einsum("sbh,vh->bsv", wide, weight.detach().double())
    nll = F.cross_entropy(logits.flatten(0, 1), confident.flatten(), reduction="none").view(BATCH, SEQUENCE)
    loss = (nll * targets.weights).sum()
    loss.backward()
    assert float(sums[0].detach()) == pytest.approx(float(loss.detach()), rel=1e-4)
    assert relative_error(hidden.grad, wide.grad) < 1e-4


def parameter_with_main_grad(dtype):
    weight = torch.nn.Parameter(problem(dtype)[1])
    weight.main_grad = torch.zeros(VOCAB, HIDDEN)
    weight.grad_added_to_main_grad = False
    return weight


@pytest.mark.parametrize("dtype", GRADIENT_ERROR)
def test_micro_batches_accumulate_into_main_grad(dtype):
    weight = parameter_with_main_grad(dtype)
    expected = torch.zeros(VOCAB, HIDDEN, dtype=torch.float64)
    for seed in range(3):
        run(RAGGED, dtype, seed, weight)
        assert weight.grad_added_to_main_grad
        assert weight.grad.shape == weight.shape  # what the hook of DistributedDataParallel waits for, and drops
        weight.grad = None
        expected += dense(dtype, seed)[2]
    assert relative_error(weight.main_grad, expected) <= GRADIENT_ERROR[dtype]


def test_without_autograd_only_sums_are_computed():
    weight = parameter_with_main_grad(torch.float32)
    hidden, _, targets = problem(torch.float32)
    hidden.requires_grad_()
    with torch.no_grad():
        sums = kernel(RAGGED)(hidden, weight, targets, dist.group.WORLD, False)
    assert torch.equal(sums, run(RAGGED)[0])
    assert not sums.requires_grad
    assert not weight.main_grad.any()
    assert not weight.grad_added_to_main_grad


@pytest.mark.parametrize("upstream", [torch.eye(7)[0] * 2, torch.eye(7)[1], torch.ones(7)])
def test_a_scaled_loss_or_a_learned_report_is_refused(upstream):
    hidden, weight, targets = problem(torch.float32)
    sums = kernel(RAGGED)(hidden.requires_grad_(), weight, targets, dist.group.WORLD, False)
    with pytest.raises(RuntimeError, match="must be 1"):
        sums.backward(upstream.double())


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any result had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_logits_of_a_chunk_at_most_are_held():
    tokens, vocabulary, chunk = 512, 256, 64
    hidden = torch.randn(tokens, 1, HIDDEN, requires_grad=True)
    weight = torch.randn(vocabulary, HIDDEN, requires_grad=True)
    like = problem(torch.float32)[2]
    labels = torch.randint(0, vocabulary, (1, tokens))
    targets = type(like)(labels=labels, weights=torch.ones(1, tokens), is_image=labels < 9, z_loss=Z_LOSS)
    largest = {}
    for sizes in (None, (chunk, 100)):
        with LargestTensor() as mode:
            kernel(sizes)(hidden, weight, targets, dist.group.WORLD, False)[0].backward()
        largest[sizes] = mode.elements
    assert largest[None] == tokens * vocabulary
    assert largest[chunk, 100] == chunk * vocabulary


@pytest.mark.parametrize("dtype", GRADIENT_ERROR)
def test_what_cuda_compiles_is_what_the_cpu_computes(dtype):
    """Uncompiled here; `make test-slow` compiles it."""
    compare_forms(dtype, chunked_head.statistics, chunked_head.gradient)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on the CPU needs g++")
def test_the_compiled_forms():
    compare_forms(torch.bfloat16, chunked_head.COMPILED_STATISTICS, chunked_head.COMPILED_GRADIENT)


def compare_forms(dtype, statistics, gradient):
    torch.manual_seed(0)
    logits, local = (torch.randn(9, 40) * 5).to(dtype), torch.randint(-30, 70, (9,))
    local[0], local[1] = 3, 40
    log_z, scale, weights = logits.float().logsumexp(-1) + 0.3, torch.rand(9), torch.rand(9)
    work = chunked_head._Workspace(torch.empty(40, 4, dtype=dtype), 9, 40, dist.group.WORLD, chunked_head.ChunkedHead())
    for got, expected in zip(statistics(logits, local), work._statistics(logits.clone(), local), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    got, expected = (
        gradient(logits, local, log_z, scale, weights),
        work._gradient(logits.clone(), local, log_z, scale, weights),
    )
    torch.testing.assert_close(got, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
