"""Each format by hands that are not the converter's: written, read, and computed with by the software it belongs to.

The weights are those of `plain_weights.draw` in Meta's order of dimensions. Its logits have a standard deviation of
about one, so a difference of 1e-5 is one of fp32's rounding.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from converting import VOCABULARY, save_filled
from huggingface_writer import read_huggingface, write_huggingface
from meta_oracle import NORMS, ROWS, halves_apart, meta_logits
from meta_writer import read_meta, write_meta
from plain_weights import decoder_logits, decoder_state, draw, draw_tokens

from megachameleon.checkpoint.folder import resolve_checkpoint
from megachameleon.checkpoint.loading import load_checkpoint, saved_config
from megachameleon.config import ParallelConfig, load_config
from megachameleon.model.decoder import build_decoder
from megachameleon.model.kernels.table import choose_kernels
from megachameleon.parallel.context import parallel_context

KINDS = ("meta", "hf", "megatron")
TOLERANCE = 1e-5
SMALL = ["model.vocab_size=128", "model.hidden_size=128", "model.ffn_hidden_size=160", "model.num_layers=2"]


def heads(queries, keys, groups, order):
    return [f"model.num_attention_heads={queries}", f"model.num_query_groups={keys}",
            f"model.qk_norm_groups={groups}", f"model.norm_order={order}"]  # fmt: skip


SHAPES = {
    "7B": [*SMALL, *heads(8, 8, 1, "pre")],
    "34B": [*SMALL, "model.hidden_size=256", *heads(64, 8, 4, "swin")],
    "2 shards": [*SMALL, *heads(16, 4, 2, "pre"), "model.rope_theta=1000"],
    "8 shards": [*SMALL, *heads(16, 8, 8, "swin")],
}
"""Structure of the released models, and others; keys and values of `2 shards` are not the root of the queries."""


@dataclass(frozen=True)
class Case:
    """A tiny model by its overrides, and its weights rounded to a type."""

    overrides: list
    dtype: torch.dtype = torch.float32

    @cached_property
    def model(self):
        return load_config("debug", self.overrides).model

    @cached_property
    def weights(self):
        return {name: weight.to(self.dtype).float() for name, weight in draw(self.model).items()}

    @cached_property
    def tokens(self):
        return draw_tokens(self.model)

    @cached_property
    def logits(self):
        """What the released code computes."""
        logits = meta_logits(self.model, self.weights, self.tokens)
        assert 0.5 < logits.std() < 2
        return logits


def write(kind, folder, case):
    """A checkpoint of this format, as Meta's or Hugging Face's or our own software leaves it."""
    model, weights = case.model, case.weights
    if kind == "meta":
        shards = model.qk_norm_groups
        return write_meta(folder, model, weights, shards=shards, vocabulary=VOCABULARY, dtype=case.dtype)
    if kind == "hf":
        return write_huggingface(folder, model, weights, vocabulary=VOCABULARY, dtype=case.dtype)
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[case.dtype]
    return save_filled(case.overrides, halves_apart(weights, *ROWS, *NORMS), folder, precision)


def read(kind, folder, model):
    """What stands in a checkpoint, by names of its own for ours."""
    if kind == "megatron":
        with opened(folder) as decoder:
            return {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}
    return (read_meta if kind == "meta" else read_huggingface)(folder, model)


def assert_holds(kind, folder, case):
    """That a checkpoint has the weights of a case, bit for bit."""
    model, expected = case.model, case.weights
    if kind == "megatron":
        expected = decoder_state(halves_apart(expected, *ROWS, *NORMS), model)
    found = read(kind, folder, model)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def logits(kind, folder, case):
    """fp32 [b, s, vocabulary] of the case's tokens: by Meta's mathematics, by transformers, by our decoder."""
    with torch.no_grad():
        if kind == "meta":
            model = replace(case.model, qk_norm_groups=len(list(folder.glob("consolidated*.pth"))))
            return meta_logits(model, read_meta(folder, model), case.tokens)
        if kind == "hf":
            return transformers_logits(folder, case.tokens)
        with opened(folder) as decoder:
            return decoder_logits(decoder, case.tokens)


def transformers_logits(folder, tokens):
    """The head is applied here, since transformers overwrites the logits of picture codes."""
    from transformers import ChameleonForConditionalGeneration

    model = ChameleonForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model.model(input_ids=tokens, use_cache=False).last_hidden_state @ model.lm_head.weight.T


@contextmanager
def opened(folder):
    """Our decoder in fp32 with the weights of a checkpoint of ours, as training loads them, in one process."""
    checkpoint, layout = resolve_checkpoint(folder), ParallelConfig()
    config = saved_config(checkpoint)
    with parallel_context(layout) as context:
        kernels = choose_kernels(config.kernels)
        decoder = build_decoder(config.model, layout, kernels, context.groups, dtype=torch.float32, seed=None)
        load_checkpoint(checkpoint, [decoder], None, context)
        yield decoder.eval()
