"""Training goes on from every imported format, with a fresh optimizer, from the loss that the source itself has."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import build_trainer
from converting import VOCABULARY, convert_checkpoint
from huggingface_writer import write_huggingface
from meta_oracle import meta_logits
from meta_writer import write_meta
from three_formats import Case, heads, read

from megachameleon.checkpoint.folder import resolve_checkpoint
from megachameleon.checkpoint.loading import saved_config
from megachameleon.config import load_config
from megachameleon.data.shards.writer import ShardWriter
from megachameleon.parallel.context import parallel_context
from megachameleon.training.batches import open_data

LAYOUT = {"tensor_parallel": 2, "pipeline_parallel": 2}
STEPS = 6
TRAIN = [f"training.num_steps={STEPS}", "optimizer.warmup_steps=0", "optimizer.lr=3e-3"]
SMALL = ["model.vocab_size=128", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_layers=2"]
GROUPED = [*SMALL, *heads(8, 4, 4, "swin")]
ONE = [*SMALL, *heads(8, 8, 1, "pre")]
IMPORTS = {"meta": ("meta", GROUPED), "transformers": ("hf", GROUPED), "lumina": ("hf", GROUPED), "anole": ("hf", ONE)}


def train(config):
    """Step at which it begins, losses, and the largest moment that the optimizer has before."""
    from megachameleon.training.step import train_step

    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context)
        states = trainer.state.optimizer.optimizer.state.values()
        moment = max(float(value.abs().max()) for state in states for value in state.values() if torch.is_tensor(value))
        losses = []
        for step in range(config.training.num_steps):
            consumed = step * config.training.global_batch_size
            report = train_step(trainer.state, trainer.data.train, config, context, step=step, consumed=consumed)
            losses.append(report.losses.loss)
        return trainer.step, losses, moment


def first_loss(config, logits_of):
    """Mean over the labels of the first global batch; each document by itself, as if it were alone."""
    data = open_data(config.data, config.training)
    batch = data.train.batch(range(config.training.global_batch_size))
    total, count = 0.0, 0.0
    for tokens, labels, weights, documents in zip(
        *(torch.as_tensor(getattr(batch, name)) for name in ("tokens", "labels", "loss_mask", "document_ids")),
        strict=True,
    ):
        for document in documents.unique():
            mine = documents == document
            if not weights[mine].any():  # padding
                continue
            logits = logits_of(tokens[mine].long()[None])[0]
            losses = F.cross_entropy(logits, labels[mine].long(), reduction="none")
            total += float((losses * weights[mine]).sum())
            count += float(weights[mine].sum())
    return total / count


def write_import(name, folder, case):
    if name == "meta":
        return write_meta(folder, case.model, case.weights, shards=4, vocabulary=VOCABULARY)
    return write_huggingface(folder, case.model, case.weights, vocabulary=VOCABULARY, variant=name)


@pytest.mark.parametrize("name", IMPORTS)
def test_it_goes_on_from_the_sources_own_loss(name, config, tmp_path, workers):
    kind, overrides = IMPORTS[name]
    case = Case(overrides)
    imported = convert_checkpoint(
        (kind, "megatron"), write_import(name, tmp_path / "source", case), tmp_path / "imported", **LAYOUT
    )
    settings = config(*overrides, *TRAIN, *(f"parallel.{axis}={n}" for axis, n in LAYOUT.items()),
                      f"checkpoint.init_from={imported}")  # fmt: skip
    step, losses, moment = workers.run(4, train, settings)[-1]
    expected = first_loss(settings, lambda tokens: meta_logits(case.model, case.weights, tokens))
    assert (step, moment) == (0, 0)
    assert losses[0] == pytest.approx(expected, abs=1e-5)
    assert losses[-1] < losses[0] - 0.3


def test_it_goes_on_from_a_llama(tmp_path, workers):
    """Of text alone, without QK-norm; rows of embedding and head that Llama has are found again by their bits."""
    pytest.importorskip("transformers", reason="an oracle of the tests only")
    from tiny_llama import import_tokenizer, save_llama
    from transformers import LlamaForCausalLM

    llama = save_llama(tmp_path / "llama")
    text = import_tokenizer(llama, tmp_path / "tokenizer")
    imported = convert_checkpoint(
        ("hf", "megatron"), llama, tmp_path / "ours", tokenizer=tmp_path / "tokenizer", qk_norm="none", **LAYOUT
    )
    layout = [f"parallel.{axis}={n}" for axis, n in LAYOUT.items()]
    where = [f"output_dir={tmp_path / 'run'}", f"checkpoint.init_from={imported}"]
    settings = load_config("debug", [*TRAIN, *layout, *where, *write_text(text, tmp_path)])
    settings = replace(settings, model=saved_config(resolve_checkpoint(imported)).model)
    step, losses, moment = workers.run(4, train, settings)[-1]

    theirs = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    ours = read("megatron", imported, settings.model)
    embedding, head = ours["embedding.word_embeddings.weight"], ours["output_layer.weight"]
    rows = {row.numpy().tobytes(): number for number, row in enumerate(theirs.model.embed_tokens.weight.detach())}
    ids = torch.tensor([rows.get(row.numpy().tobytes(), -1) for row in embedding])
    assert (ids >= 0).sum() == 500 and torch.equal(head[ids >= 0], theirs.lm_head.weight[ids[ids >= 0]])

    def logits(tokens):
        assert (ids[tokens] >= 0).all()
        with torch.no_grad():
            return theirs.model(input_ids=ids[tokens], use_cache=False).last_hidden_state @ head.T

    assert (step, moment) == (0, 0)
    assert losses[0] == pytest.approx(first_loss(settings, logits), abs=1e-5)
    assert losses[-1] < losses[0] - 0.3


def write_text(text, root):
    """Shards of sentences, and what makes a configuration read them."""
    words = ["message", "header", "field", "name", "of", "the", "model", "value", "body", "encoded", "charset"]
    with ShardWriter(root / "text" / "shard", text.vocabulary, tokenizer=text.fingerprint, image_tokenizer=None) as out:
        for number in range(80):
            ids = text.encode(" ".join(words[number * step % len(words)] for step in range(1, 12)))[:50]
            out.add([text.vocabulary.bos, *ids, text.vocabulary.eos])
        out.commit()
    return [
        f"data.tokenizer={root / 'tokenizer'}", f"data.train={{text: [{root / 'text'}]}}",
        "data.stages=[{weights: {text: 1}}]", "data.validation={}", "logging.tensorboard=false",
    ]  # fmt: skip
