"""Steppers on the real decoder: cached = uncached, any layout = one process, and training is left as it was."""

import pytest
import torch

from megachameleon.config import KernelsConfig, ModelConfig, ParallelConfig
from megachameleon.generation.engine import generate
from megachameleon.generation.replicas import generate_shared
from megachameleon.generation.sampling import SamplingSettings
from megachameleon.generation.settings import GenerationSettings
from megachameleon.model.head import Targets
from megachameleon.model.kernels.table import choose_kernels
from megachameleon.parallel.context import parallel_context
from megachameleon.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary.compact(num_text_ids=40, num_image_codes=16, image_grid=(2, 3))
MODEL = ModelConfig(
    vocab_size=VOCABULARY.size,
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=48,
    context_length=64,
    init_std=0.3,
)
LAYOUTS = (
    ParallelConfig(tensor_parallel=2, sequence_parallel=True),
    ParallelConfig(pipeline_parallel=2),
    ParallelConfig(tensor_parallel=2, pipeline_parallel=2),
    ParallelConfig(pipeline_parallel=2, virtual_pipeline_parallel=2),
)
CONTEXT = ParallelConfig(tensor_parallel=2, context_parallel=2)


def build(context):
    from megachameleon.model.decoder import build_chunks

    return build_chunks(
        MODEL, context.config, choose_kernels(KernelsConfig()), context.groups, dtype=torch.float32, seed=0
    )


def read(stepper):
    """Logits of a padded prefill and five further ids, [6, streams, vocabulary]."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(23, 63, (3, 8), generator=generator)
    document_ids = torch.zeros(3, 8, dtype=torch.int32)
    document_ids[1, :3], document_ids[2, :7] = -1, -1
    logits = [stepper.prefill(tokens, document_ids, 5)]
    logits += [stepper.decode(torch.randint(23, 63, (3,), generator=generator)) for _ in range(5)]
    return torch.stack(logits)


def write(stepper):
    """Generated ids of mixed rows."""
    hot = SamplingSettings(temperature=1.5, top_p=1.0)
    settings = GenerationSettings(text=hot, image=hot, guidance=2.0, max_new_tokens=30)
    prompts = [[VOCABULARY.bos, 40], [VOCABULARY.bos, 41, 42, VOCABULARY.begin_image]]
    return generate(stepper, VOCABULARY, prompts, settings)


@pytest.fixture(scope="module")
def one_process():
    from megachameleon.generation.model_steppers import CachedStepper, UncachedStepper

    with parallel_context(ParallelConfig()) as context:
        [model] = build(context)
        yield model, CachedStepper([model], 64), UncachedStepper([model], 64)


def test_cached_logits_equal_uncached(one_process):
    _, cached, uncached = one_process
    torch.testing.assert_close(read(cached), read(uncached), atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing(one_process):
    """A padded row's logits are those of the row alone."""
    _, cached, _ = one_process
    tokens = torch.arange(30, 38)[None]
    alone = cached.prefill(tokens, torch.zeros_like(tokens, dtype=torch.int32), 1)
    padded = torch.cat((torch.full((1, 5), VOCABULARY.pad), tokens), dim=1)
    document_ids = torch.tensor([[-1] * 5 + [0] * 8], dtype=torch.int32)
    torch.testing.assert_close(cached.prefill(padded, document_ids, 1), alone, atol=1e-5, rtol=1e-5)


def test_generation_is_the_same_with_and_without_cache(one_process):
    _, cached, uncached = one_process
    assert write(cached) == write(uncached)


def test_training_goes_on_as_before(one_process):
    """Mode, random state and gradients survive generation between two steps."""
    model, cached, _ = one_process
    model.train()
    before = backward(model)
    state = torch.get_rng_state()
    write(cached)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())
    model.zero_grad()
    after = backward(model)
    assert any(gradient.any() for gradient in after.values())
    assert all(torch.equal(after[name], before[name]) for name in before)
    model.zero_grad()


def backward(model):
    """Gradients of one small batch by name."""
    tokens = torch.arange(30, 38)[None]
    positions = torch.arange(8)[None]
    targets = Targets(labels=tokens, weights=torch.ones(1, 8), is_image=tokens < 0, z_loss=0.0)
    model(tokens, positions, torch.zeros_like(tokens, dtype=torch.int32), targets=targets)[0].backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def run_layout(layout):
    from megachameleon.generation.model_steppers import CachedStepper, UncachedStepper

    with parallel_context(layout) as context:
        chunks = build(context)
        cached = CachedStepper(chunks, 64)
        logits, plain, ids = read(cached), read(UncachedStepper(chunks, 64)), write(cached)
        assert chunks[0].config.sequence_parallel == layout.sequence_parallel
        return logits.numpy(), plain.numpy(), ids


@pytest.mark.parametrize("layout", LAYOUTS, ids=["TP2-SP", "PP2", "TP2-PP2", "PP2-VPP2"])
def test_every_layout_gives_the_logits_and_ids_of_one_process(one_process, workers, layout):
    _, cached, _ = one_process
    expected, expected_ids = read(cached), write(cached)
    for logits, plain, ids in workers.run(layout.model_parallel, run_layout, layout):
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.from_numpy(plain), expected, atol=1e-5, rtol=1e-5)
        assert ids == expected_ids


def run_context_parallel():
    """Only the cached stepper: without its context, the model takes ids for this rank's part of a sequence."""
    from megachameleon.generation.model_steppers import CachedStepper

    with parallel_context(CONTEXT) as context:
        return read(CachedStepper(build(context), 64)).numpy()


def test_context_parallel_ranks_do_the_same_work_side_by_side(one_process, workers):
    expected = read(one_process[1])
    for logits in workers.run(CONTEXT.model_parallel, run_context_parallel):
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-5, rtol=1e-5)


def share(prompts):
    from megachameleon.generation.model_steppers import CachedStepper

    with parallel_context(ParallelConfig()) as context:
        hot = SamplingSettings(temperature=1.5, top_p=1.0)
        settings = GenerationSettings(text=hot, image=hot, guidance=2.0, max_new_tokens=30)
        stepper = CachedStepper(build(context), 64)
        return generate_shared(stepper, VOCABULARY, prompts, settings, replicas=context.groups.dp)


def test_replicas_share_the_prompts_and_all_get_the_results(workers):
    prompts = [[VOCABULARY.bos, 40 + i] for i in range(5)]
    [alone] = workers.run(1, share, prompts)
    assert workers.run(2, share, prompts) == [alone, alone]
