"""Steppers on the real decoder: cached = uncached, any layout = one process, and training is left as it was."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as multiprocessing

from megachameleon.config import KernelsConfig, ModelConfig, ParallelConfig
from megachameleon.generation.engine import generate
from megachameleon.generation.sampling import SamplingSettings
from megachameleon.generation.settings import GenerationSettings
from megachameleon.model.kernels.table import choose_kernels
from megachameleon.parallel.context import parallel_context
from megachameleon.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary.compact(num_text_ids=40, num_image_codes=16, image_grid=(2, 3))
MODEL = ModelConfig(
    vocab_size=VOCABULARY.size,
    num_layers=2,
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
)


def build(context):
    from megachameleon.model.decoder import build_decoder

    return build_decoder(
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
        model = build(context)
        yield model, CachedStepper(model, 64), UncachedStepper(model, 64)


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
    state = torch.get_rng_state()
    write(cached)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    tokens = torch.arange(30, 38)[None]
    model(tokens, tokens, torch.zeros_like(tokens, dtype=torch.int32), labels=tokens).sum().backward()


def run_layouts(rank, port, folder):
    from megachameleon.generation.model_steppers import CachedStepper, UncachedStepper

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    for number, layout in enumerate(LAYOUTS):
        os.environ["MASTER_PORT"] = str(port + number)
        with parallel_context(layout) as context:
            model = build(context)
            cached = CachedStepper(model, 64)
            result = {"cached": read(cached), "uncached": read(UncachedStepper(model, 64)), "ids": write(cached)}
            assert model.config.sequence_parallel == layout.sequence_parallel
            torch.save(result, folder / f"{number}-{rank}.pt")


def test_every_layout_gives_the_logits_and_ids_of_one_process(one_process, tmp_path):
    _, cached, _ = one_process
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(run_layouts, (port, tmp_path), nprocs=2)
    expected, ids = read(cached), write(cached)
    for number in range(len(LAYOUTS)):
        for rank in range(2):
            result = torch.load(tmp_path / f"{number}-{rank}.pt", weights_only=True)
            torch.testing.assert_close(result["cached"], expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(result["uncached"], expected, atol=1e-5, rtol=1e-5)
            assert result["ids"] == ids
