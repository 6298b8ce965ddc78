"""The fast operations against the plain ones, and the plain ones against textbook formulas.

fp32: 1e-5, the two sum in another order. bf16: 2e-2, a few units in the last place of eight bits.
"""

import pytest
import torch
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
    assert_near(reference.rms_norm(x, weight, 1e-5), F.rms_norm(x, (16,), weight, 1e-5), dtype)
    assert_near(reference.head_norm(x, weight, bias, 1e-5), F.layer_norm(x, (16,), weight, bias, 1e-5), dtype)


def document_ids():
    """Long, short, single-token and padding runs; one row is a single document."""
    rows = [
        [0] * 7 + [1] + [2] * 12 + [3] * 4,
        [0] * 24,
        [0] * 10 + [1] * 3 + [-1] * 11,
    ]
    return torch.tensor(rows, dtype=torch.int32)


def results_and_gradients(function, *inputs):
    """Output of `function` and the gradients of its inputs under a fixed upstream gradient."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype))
    return [output, *(leaf.grad for leaf in leaves if leaf is not None)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", ["shared", "by head"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_norms_of_heads_and_their_gradients(dtype, shape, with_bias):
    from megachameleon.model.kernels import native, reference

    torch.manual_seed(0)
    affine = (16,) if shape == "shared" else (4, 16)
    x, weight = torch.randn(6, 2, 4, 16).to(dtype), torch.randn(affine).to(dtype)
    bias = torch.randn(affine).to(dtype) if with_bias else None
    got, expected = (
        results_and_gradients(lambda x, w, b, norm=norm: norm(x, w, b, 1e-5), x, weight, bias)
        for norm in (native.head_norm, reference.head_norm)
    )
    for one, other in zip(got, expected, strict=True):
        assert_near(one, other, dtype)


def test_gradients_of_a_bf16_affine_are_summed_in_fp32():
    """torch's own bf16 LayerNorm is 9 % off here."""
    from megachameleon.model.kernels import native

    torch.manual_seed(0)
    x, weight, bias = torch.randn(8192, 16).bfloat16(), torch.randn(16).bfloat16(), torch.randn(16).bfloat16()
    got, exact = (
        results_and_gradients(lambda *i: native.head_norm(*i, 1e-5), *(t.to(dtype) for t in (x, weight, bias)))
        for dtype in (torch.bfloat16, torch.float64)
    )
    for mine, true in zip(got[2:], exact[2:], strict=True):
        assert (mine - true).norm() < 0.01 * true.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rms_norm_swiglu_and_rotary_with_their_gradients(dtype):
    from megachameleon.model.kernels import native, reference
    from megachameleon.model.sequence_layout import rotary_tables

    torch.manual_seed(0)
    positions = torch.randint(0, 500, (2, 6))
    tables = rotary_tables(positions, 16, 10_000.0, dtype)
    x, weight = torch.randn(6, 2, 4, 16).to(dtype), torch.randn(16).to(dtype)
    for name, call, inputs in (
        ("rms_norm", lambda room, x, w: room.rms_norm(x, w, 1e-5), (x, weight)),
        ("swiglu", lambda room, x: room.swiglu(x), (x,)),
        ("rotary", lambda room, x: room.rotary(x, *tables), (x,)),
    ):
        got, expected = (
            results_and_gradients(lambda *i, room=room, call=call: call(room, *i), *inputs)
            for room in (native, reference)
        )
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(
                one.float(),
                other.float(),
                rtol=TOLERANCE[dtype],
                atol=TOLERANCE[dtype],
                msg=lambda m, n=name: f"{n}: {m}",
            )


def test_rotary_turns_each_pair_by_its_angle():
    """As complex numbers: x_i + j x_(i + D/2) times exp(j position theta^(-2i/D))."""
    from megachameleon.model.kernels import reference
    from megachameleon.model.sequence_layout import rotary_tables

    x, positions = torch.randn(5, 2, 3, 8), torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    got = reference.rotary(x, *rotary_tables(positions, 8, 100.0, torch.float32))
    pairs = torch.complex(x[..., :4], x[..., 4:])
    angles = positions.t()[:, :, None, None] * 100.0 ** (-2 * torch.arange(4) / 8)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(got, torch.cat((turned.real, turned.imag), -1))


def sequence_layout(ids, num_keys=24, batch=3, chunks=None):
    from megachameleon.model.sequence_layout import SequenceLayout

    return SequenceLayout(
        batch=batch,
        num_keys=num_keys,
        query_chunks=chunks or ((0, num_keys),),
        document_ids=ids,
        device=torch.device("cpu"),
    )


def attend(kernels, layout, *inputs, scale=8**-0.5):
    attention = kernels.Attention()
    return attention(*inputs, attention.plan(layout), scale)


CHUNKS = {"whole": ((0, 24),), "first and last": ((0, 6), (18, 6)), "middle": ((6, 6), (12, 6)), "third": ((8, 4),)}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_documents", [True, False])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_attention_and_its_gradients(dtype, with_documents, chunks, monkeypatch):
    """Also for queries that are a part of the sequence. Half of the runs attend in the inputs' own precision."""
    from megachameleon.model.kernels import native, reference, segmented_attention

    torch.manual_seed(0)
    monkeypatch.setattr(segmented_attention, "SHORT", 0 if with_documents else 10**6)
    layout = sequence_layout(document_ids() if with_documents else None, chunks=CHUNKS[chunks])
    query = torch.randn(len(layout.query_positions()), 3, 4, 8).to(dtype)
    key, value = (torch.randn(24, 3, 2, 8).to(dtype) for _ in range(2))
    results = [
        results_and_gradients(lambda *x, room=room: attend(room, layout, *x), query, key, value)
        for room in (native, reference)
    ]
    for got, expected in zip(*results, strict=True):
        assert_near(got, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_scores_of_hundreds_leave_finite_gradients(dtype):
    """Rows that fill up a short piece repeat its first query, which no loss keeps from large scores with later keys.

    A score of several hundred is rounded by 1e-4 in fp32 and by 2 in bf16, and exp passes that on: so 1e-3, and finite.
    """
    from megachameleon.model.kernels import native, reference

    torch.manual_seed(0)
    layout = sequence_layout(torch.tensor([[0] * 5 + [1] * 8 + [2] * 6 + [3] * 13]), 32, 1)
    inputs = [F.layer_norm(torch.randn(32, 1, 2, 64), (64,)).mul(gain).to(dtype) for gain in (20, 20, 1)]
    got, expected = (
        results_and_gradients(lambda *x, room=room: attend(room, layout, *x, scale=64**-0.5), *inputs)
        for room in (native, reference)
    )
    for one, other in zip(got, expected, strict=True):
        assert one.isfinite().all()
        assert dtype == torch.bfloat16 or (one - other).norm() <= 1e-3 * other.norm()


def test_segments_hold_no_dense_mask():
    """Index tensors only, with less than one padded entry for each position."""
    from megachameleon.model.kernels import native

    plan = native.Attention().plan(sequence_layout(document_ids()))
    assert sum(bucket.queries.numel() for bucket in plan.buckets) < 2 * 3 * 24
    assert not plan.prefixes


def test_attention_of_packed_documents_equals_each_alone():
    from megachameleon.model.kernels import native

    torch.manual_seed(0)
    query, key, value = (torch.randn(24, 1, 4, 8) for _ in range(3))
    packed = attend(native, sequence_layout(document_ids()[:1], batch=1), query, key, value)
    start = 0
    for length in (7, 1, 12, 4):
        part = slice(start, start + length)
        alone = attend(native, sequence_layout(None, length, 1), query[part], key[part], value[part])
        torch.testing.assert_close(packed[part], alone, rtol=1e-5, atol=1e-6)
        start += length


def test_attention_of_new_positions_sees_the_past_and_not_the_padding():
    from megachameleon.model.kernels import native, reference

    torch.manual_seed(0)
    key, value = torch.randn(10, 2, 2, 8), torch.randn(10, 2, 2, 8)
    query = torch.randn(1, 2, 4, 8)
    ids = torch.tensor([[0] * 10, [-1] * 4 + [0] * 6], dtype=torch.int32)
    layout = sequence_layout(ids, 10, 2, ((9, 1),))
    got = attend(native, layout, query, key, value)
    assert_near(got, attend(reference, layout, query, key, value), torch.float32)
    value[:4, 1], key[:4, 1] = 1e6, 100.0  # padding of the second row, which nobody may see
    torch.testing.assert_close(attend(native, layout, query, key, value), got)


def test_flex_attention_masks_like_the_reference():
    """What CUDA uses for documents. On the CPU it runs uncompiled and forward only."""
    from torch.nn.attention.flex_attention import flex_attention

    from megachameleon.model.kernels import native, reference

    torch.manual_seed(0)
    for chunks in (((0, 256),), ((64, 64), (128, 64))):
        ids = torch.arange(256).div(90, rounding_mode="floor").expand(2, -1)
        layout = sequence_layout(ids, 256, 2, chunks)
        query, key, value = (
            torch.randn(n, 2, h, 16) for n, h in ((len(layout.query_positions()), 4), (256, 2), (256, 2))
        )
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        got = flex_attention(q, k, v, block_mask=native._block_mask(layout), scale=0.3, enable_gqa=True)
        assert_near(got.permute(2, 0, 1, 3), attend(reference, layout, query, key, value, scale=0.3), torch.float32)


def test_forced_backends_are_honoured():
    from megachameleon.config import KernelsConfig
    from megachameleon.model.kernels import chunked_head, reference
    from megachameleon.model.kernels.table import choose_kernels, describe_kernels

    asked = KernelsConfig(attention="reference")
    kernels = choose_kernels(asked)
    assert isinstance(kernels.attention, reference.Attention)
    assert isinstance(kernels.head_loss, chunked_head.ChunkedHead)
    rows = {name: backend for name, backend, _ in describe_kernels(asked, kernels)}
    assert rows["attention"] == "reference (forced)" and rows["loss"] == "torch (chosen)"
