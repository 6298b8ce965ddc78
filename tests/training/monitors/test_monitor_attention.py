"""Maxima of attention's scores, against all scores."""

import math

import pytest
import torch
from cases import build_trainer, spread_norms
from monitor_cases import own_model

from megachameleon.parallel.context import parallel_context

LOGITS = "logging.monitors=[attention_logits]"


def scores_by_hand(config):
    """The report of a step, and by block: largest sampled score, largest score, bound; of micro-batches together."""
    from megachameleon.training.step import train_step

    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context)
        spread_norms(trainer)
        seen = {}

        def look(layer):
            def hook(attention, arguments, named):
                inputs = named["packed_seq_params"]
                query, key = (attention.kernels.rotary(x.detach(), *inputs.query_rotary) for x in arguments[:2])
                seen.setdefault(layer, []).append((query.double(), key.double(), attention.scale))

            return hook

        documents = []
        decoder = trainer.state.model[0].module
        decoder.register_forward_pre_hook(lambda _, arguments: documents.append(arguments[2]))
        for layer in decoder.decoder.layers:
            attention = layer.self_attention.core_attention
            attention.register_forward_pre_hook(look(layer.layer_number - 1), with_kwargs=True)
        report = train_step(
            trainer.state, trainer.data.train, trainer.config, context, step=0, consumed=0, monitors=trainer.monitors
        )
        return report.monitors, {layer: maxima(batches, documents) for layer, batches in seen.items()}


def maxima(batches, documents):
    every, sampled, queries, keys = [], [], [], []
    for (query, key, scale), ids in zip(batches, documents, strict=True):
        length, repeats = len(query), query.size(2) // key.size(2)
        scores = torch.einsum("qbnd,kbnd->bnqk", query, key.repeat_interleave(repeats, 2)) * scale
        visible = torch.ones(length, length, dtype=torch.bool).tril()
        real = torch.ones(length, query.size(1), dtype=torch.bool)
        if ids is not None:
            visible = visible & (ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, None]
            visible, real = visible[:, None], (ids >= 0).t()
        scores = scores.masked_fill(~visible, -math.inf)
        every.append(scores.max())
        sampled.append(scores[:, :, length // 16 - 1 :: length // 16].max())
        queries.append((query.norm(dim=-1) * real[..., None]).amax((0, 1)))
        keys.append((key.norm(dim=-1) * real[..., None]).amax((0, 1)).repeat_interleave(repeats))
    bound = (torch.stack(queries).amax(0) * torch.stack(keys).amax(0)).max() * scale
    return float(torch.stack(sampled).max()), float(torch.stack(every).max()), float(bound)


@pytest.mark.parametrize("isolate", ["true", "false"])
def test_they_box_in_the_largest_score(workers, module_config, isolate):
    config = module_config(*own_model(LOGITS, f"data.isolate_documents={isolate}"))
    measured, by_hand = workers.run(1, scores_by_hand, config)[0]
    assert len(by_hand) == 4
    for layer, (sampled, largest, bound) in by_hand.items():
        assert measured[f"attention_logit_sampled/{layer}"] == pytest.approx(sampled, rel=1e-5)
        assert measured[f"attention_logit_bound/{layer}"] == pytest.approx(bound, rel=1e-5)
        assert sampled <= largest <= bound
