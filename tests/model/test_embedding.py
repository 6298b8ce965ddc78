"""The embedding against megatron-core's, alone and split over two ranks."""

import os

import pytest
import torch

from megachameleon.config import ParallelConfig
from megachameleon.parallel.context import parallel_context

VOCABULARY, WIDTH = 12, 6


def gradients(sequence_parallel, with_main_grad):
    """Run in any number of processes: output and weight gradient of both embeddings after two micro-batches."""
    from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megachameleon.model.embedding import TokenEmbedding

    ranks = int(os.environ["WORLD_SIZE"])
    with parallel_context(ParallelConfig(tensor_parallel=ranks, sequence_parallel=sequence_parallel)) as context:
        config = TransformerConfig(
            num_layers=1,
            hidden_size=WIDTH,
            num_attention_heads=1,
            use_cpu_initialization=True,
            params_dtype=torch.float32,
        )
        config.embedding_init_method = lambda weight: weight
        plain = VocabParallelEmbedding(
            VOCABULARY,
            WIDTH,
            init_method=config.embedding_init_method,
            reduce_scatter_embeddings=sequence_parallel,
            config=config,
            tp_group=context.groups.tp,
        )
        torch.manual_seed(0)
        whole = torch.randn(VOCABULARY, WIDTH)
        with torch.no_grad():
            plain.weight.copy_(whole.chunk(ranks)[context.tensor_rank])
        ids = [torch.tensor([[0, 11, 3, 3], [5, 3, 0, 7]]), torch.tensor([[3, 1, 1, 1], [9, 10, 11, 0]])]
        results = []
        for embedding in (plain, TokenEmbedding.instead_of(plain, config)):
            embedding.weight.grad = None
            ours = embedding is not plain
            if ours and with_main_grad:
                embedding.weight.main_grad = torch.zeros_like(embedding.weight)
            for batch in ids:
                output = embedding(batch)
                torch.manual_seed(1)
                output.backward(torch.randn(output.shape))
                if ours and with_main_grad:
                    assert embedding.weight.grad_added_to_main_grad
                    embedding.weight.grad = None  # as DistributedDataParallel's hook does
            total = embedding.weight.main_grad if ours and with_main_grad else embedding.weight.grad
            results.append((output.detach(), total.clone()))
        return results


@pytest.mark.parametrize("with_main_grad", [True, False])
@pytest.mark.parametrize(("ranks", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_rows_and_gradients_are_megatron_cores(workers, ranks, sequence_parallel, with_main_grad):
    for (output, grad), (own_output, own_grad) in workers.run(ranks, gradients, sequence_parallel, with_main_grad):
        assert torch.equal(own_output, output)
        torch.testing.assert_close(own_grad, grad, rtol=1e-6, atol=1e-6)
        assert grad.abs().sum() > 0
