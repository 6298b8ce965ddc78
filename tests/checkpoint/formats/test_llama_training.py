"""Training goes on from a Llama: pictures and text through its own tokenizer, at tensor 2 x pipeline 2."""

import math

import numpy as np
import pytest
from cases import build_trainer
from converting import convert_checkpoint
from tiny_llama import CODES, import_tokenizer, save_llama

from megachameleon.config import load_config
from megachameleon.data.shards.writer import ShardWriter
from megachameleon.parallel.context import parallel_context

pytest.importorskip("transformers", reason="an oracle of the tests only")

STEPS = 6


def losses(config):
    """Loss and learning rate of the first steps."""
    from megachameleon.training.step import train_step

    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context)
        reports = []
        for step in range(STEPS):
            report = train_step(trainer.state, trainer.data.train, config, context, step=step, consumed=8 * step)
            reports.append((report.losses.loss, report.lr))
        return reports


def write_shards(root, tokenizer):
    """Captions and their pictures, which are easy to learn."""
    vocabulary = tokenizer.vocabulary
    with ShardWriter(root / "pairs/shard", vocabulary, tokenizer=tokenizer.fingerprint, image_tokenizer="i") as writer:
        for number in range(80):
            picture = vocabulary.encode_image(np.arange(8) * (number % 3) % CODES)
            text = tokenizer.encode(f" return self.item[{number % 3}] # of a model")
            writer.add([vocabulary.bos, *text, *picture, vocabulary.eos])
        writer.commit()


@pytest.mark.parametrize("qk_norm", ["layernorm", "none"])
def test_training_goes_on(workers, qk_norm, tmp_path):
    llama = save_llama(tmp_path / "llama")
    tokenizer = import_tokenizer(llama, tmp_path / "tokenizer")
    write_shards(tmp_path, tokenizer)
    layout = {"tensor_parallel": 2, "pipeline_parallel": 2}
    options = {"tokenizer": tmp_path / "tokenizer", "qk_norm": qk_norm}
    start = convert_checkpoint(("hf", "megatron"), llama, tmp_path / "start", **layout, **options)
    overrides = [
        f"model.vocab_size={tokenizer.vocabulary.size}",
        *("model.hidden_size=128", "model.num_attention_heads=4", "model.num_query_groups=2"),
        *("model.ffn_hidden_size=96", "model.context_length=128", f"model.qk_norm={qk_norm}"),
        f"model.qk_norm_groups={1 if qk_norm == 'none' else 2}",
        f"data.tokenizer={tmp_path / 'tokenizer'}",
        f"data.train={{pairs: [{tmp_path / 'pairs'}]}}",
        "data.stages=[{weights: {pairs: 1}}]",
        *("optimizer.lr=3e-3", f"training.num_steps={STEPS}", f"checkpoint.init_from={start}"),
        *("logging.tensorboard=false", f"output_dir={tmp_path / 'run'}"),
    ]
    one = workers.run(1, losses, load_config("debug", overrides))[0]
    four = workers.run(4, losses, load_config("debug", [*overrides, *(f"parallel.{k}={v}" for k, v in layout.items())]))
    found = four[-1]
    assert found[0][1] == pytest.approx(1.5e-3)  # half of the rate: the schedule begins anew
    assert found[0][0] == pytest.approx(one[0][0], abs=1e-4)
    assert found[-1][0] < found[0][0] - 0.5 and all(math.isfinite(loss) for loss, _ in found)
