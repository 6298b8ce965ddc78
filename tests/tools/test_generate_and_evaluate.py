"""tools/generate.py and tools/evaluate.py from a checkpoint on disk to their files."""

import dataclasses
import importlib.util
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megachameleon.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, StageConfig, TrainingConfig
from megachameleon.data.shards.writer import ShardWriter
from megachameleon.parallel.context import parallel_context
from megachameleon.tokens.text import TextTokenizer
from megachameleon.tokens.text.training import train_text_tokenizer
from megachameleon.tokens.vocabulary import Vocabulary

TOOLS = Path(__file__).parents[2] / "tools"


def load(name):
    """A tool as a module."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def call(name, *arguments):
    """Run a tool's main in this process."""
    tool = load(name)
    tool.main(tool.build_parser().parse_args([str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with tokenizers, a gallery, shards, prompts and a checkpoint of an untrained model."""
    root = tmp_path_factory.mktemp("run")
    text = train_text_tokenizer(
        ["red heart, sun, dog face " * 20],
        Vocabulary.compact(num_text_ids=297, num_image_codes=16, image_grid=(2, 2)),
        root / "tokenizer",
    )
    _write_image_tokenizer(root / "image_tokenizer")
    _write_gallery(root)
    _write_shards(root / "shards", text)
    _write_checkpoint(root, text.vocabulary)
    return root


def _write_image_tokenizer(folder, seed=0):
    from megachameleon.tokens.vq.network import PatchAutoencoder, PatchConfig
    from megachameleon.tokens.vq.quantizer import Codebook
    from megachameleon.tokens.vq.tokenizer import save_image_tokenizer

    torch.manual_seed(seed)
    config = PatchConfig(image_size=8, grid=2, code_dim=4, fine_channels=8, coarse_channels=8)
    codebook = Codebook(16, 4)
    codebook.codes.normal_()
    save_image_tokenizer(folder, config, PatchAutoencoder(config), codebook, {})


def _write_gallery(root):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    (root / "gallery").mkdir()
    rows = []
    for key, picture, name in zip("abc", pixels, ("red heart", "sun", "dog face"), strict=True):
        Image.fromarray(picture).save(root / "gallery" / f"{key}.png")
        rows.append({"text": name, "key": key, "kind": "held-out tone" if key == "c" else "seen", "lang": "en"})
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_shards(folder, text):
    vocabulary = text.vocabulary
    with ShardWriter(folder / "x", vocabulary, tokenizer=text.fingerprint) as writer:
        for word in ("red heart", "sun"):
            picture = vocabulary.encode_image([1, 2, 3, 4])
            writer.add([vocabulary.bos, *text.encode(word), *picture, vocabulary.eos])
        writer.commit()


def _write_checkpoint(root, vocabulary):
    from megachameleon.checkpoint.folder import CheckpointManifest
    from megachameleon.checkpoint.retention import Retention
    from megachameleon.checkpoint.saving import Save, small_files, write_checkpoint
    from megachameleon.checkpoint.snapshot import live_snapshot
    from megachameleon.checkpoint.state import common_state, training_state
    from megachameleon.config import KernelsConfig
    from megachameleon.model.decoder import build_decoder
    from megachameleon.model.kernels.table import choose_kernels
    from megachameleon.tokens.vq import ImageTokenizer

    model = ModelConfig(
        vocab_size=vocabulary.size,
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        num_query_groups=2,
        ffn_hidden_size=16,
        context_length=48,
    )
    config = RunConfig(
        model=model,
        data=DataConfig(
            tokenizer=str(root / "tokenizer"), image_tokenizer=str(root / "image_tokenizer"), sequence_length=32
        ),
        training=TrainingConfig(num_steps=9_999, global_batch_size=1, micro_batch_size=1, precision="fp32"),
    )
    with parallel_context(ParallelConfig()) as context:
        kernels = choose_kernels(KernelsConfig())
        decoder = build_decoder(model, config.parallel, kernels, context.groups, dtype=torch.float32, seed=0)
        manifest = CheckpointManifest(
            step=7,
            consumed_samples=7,
            data_fingerprint="x",
            versions={},
            vocabulary=dataclasses.asdict(vocabulary),
            tokenizers={
                "text": TextTokenizer.load(root / "tokenizer").fingerprint,
                "image": ImageTokenizer.load(root / "image_tokenizer").fingerprint,
            },
            files={},
        )
        save = Save(
            root=root / "checkpoints",
            attempt="once",
            rank=0,
            world_size=1,
            snapshot=live_snapshot(training_state([decoder], None, context.groups)),
            manifest=manifest,
            texts=small_files(config, {}, common_state(None)),
            retention=Retention(keep_last=1),
        )
        write_checkpoint(save)


def test_generate_draws_and_writes(run, tmp_path, capsys):
    heart = run / "gallery" / "a.png"
    call("generate", run, "--prompt", "a <b>", "--image", heart, "--samples", 2, "--output", tmp_path / "both")
    rows = [json.loads(line) for line in (tmp_path / "both" / "results.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [[{"text": "a <b>"}, {"image": str(heart)}]] * 2
    assert rows[0]["segments"] != rows[1]["segments"]
    page = (tmp_path / "both" / "index.html").read_text()
    assert "a &lt;b&gt;" in page
    for row in rows:
        for name in row["pictures"]:
            assert Image.open(tmp_path / "both" / name).size == (8, 8)
            assert name in page
    assert capsys.readouterr().out.startswith("[0] ")


def test_generate_modalities(run, tmp_path):
    call("generate", run, "--prompts", run / "prompts.jsonl", "--modality", "image", "--output", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["pictures"] for row in rows] == [["000-0.png"], ["001-0.png"], ["002-0.png"]]
    call("generate", run, "--prompt", "sun", "--modality", "text", "--max-new-tokens", 5, "--output", tmp_path / "t")
    [row] = [json.loads(line) for line in (tmp_path / "t" / "results.jsonl").read_text().splitlines()]
    assert row["pictures"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "sun", "--tokenizer", "nowhere"], "nowhere: no such tokenizer folder"),
        (["--prompt", "sun", "--image-tokenizer", "nowhere"], "nowhere: no such image tokenizer folder"),
        (["--image", "nowhere.png"], r"nowhere.png: no such picture \(--image\)"),
        (["--prompt", "0123456789" * 5], "--prompt: 51 ids leave no room for 1 more in the model's context of 48"),
        (["--modality", "image", "--max-new-tokens", "5"], "--max-new-tokens: 5 is less than the 6 ids of a picture"),
        (["--temperature", "0"], "temperature=0.0 must be positive"),
        (["--prompt", "sun", "--prompts", "x.jsonl"], "--prompts: give either"),
        (["--prompt", "sun", "--tensor-parallel", "3"], "parallel.tensor_parallel: 3 does not divide"),
        (["--prompt", "sun", "--tensor-parallel", "2"], "does not divide the 1 processes"),
    ],
)
def test_generate_refuses(run, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        call("generate", run, *arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_generate_refuses_other_checkpoints_and_vocabularies(run, tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint"):
        call("generate", tmp_path, "--prompt", "sun", "--output", tmp_path / "out")
    other = tmp_path / "tokenizer"
    shutil.copytree(run / "tokenizer", other)
    compact = {"num_image_codes": 16, "image_grid": (1, 4)}
    Vocabulary.compact(num_text_ids=TextTokenizer.load(other).vocabulary.num_text_ids, **compact).save(other)
    with pytest.raises(ValueError, match="image_grid"):
        call("generate", run, "--prompt", "sun", "--tokenizer", other, "--output", tmp_path / "out")


def test_evaluate_retrieval(run, tmp_path, capsys):
    arguments = (run, "--prompts", run / "prompts.jsonl", "--gallery", run / "gallery")
    for name in ("first", "second"):
        call("evaluate", "retrieval", *arguments, "--output", tmp_path / name)
    report = json.loads((tmp_path / "first" / "retrieval.json").read_text())
    assert [group["name"] for group in report["groups"]] == ["seen", "held-out tone", "all"]
    assert report["groups"][0]["chance"] == pytest.approx(1 / 3)
    assert report == json.loads((tmp_path / "second" / "retrieval.json").read_text())
    assert Image.open(tmp_path / "first" / "drawings.png").size == (3 * 12 + 4, 16)
    assert "ceiling" in capsys.readouterr().out


def test_evaluate_captions(run, tmp_path):
    arguments = (run, "--prompts", run / "prompts.jsonl", "--gallery", run / "gallery", "--limit", 2)
    call("evaluate", "captions", *arguments, "--max-new-tokens", 3, "--output", tmp_path)
    report = json.loads((tmp_path / "captions.json").read_text())
    assert report["prompts"] == 2
    assert 0 <= report["groups"][0]["nearest_name"] <= 1


def test_evaluate_loss(run, tmp_path):
    call("evaluate", "loss", run, "--data", f"all={run / 'shards'}", "--output", tmp_path)
    losses = json.loads((tmp_path / "losses.json").read_text())["losses"]["all"]
    vocabulary = Vocabulary.load(run / "tokenizer")
    assert losses["loss_text"] == pytest.approx(np.log(vocabulary.size), rel=0.05)
    assert losses["num_image_tokens"] == 2 * 4
    assert _losses(run, _write_text_shards(tmp_path / "text", run), tmp_path)["loss_image"] is None
    with pytest.raises(ValueError, match="not NAME=PATH"):
        call("evaluate", "loss", run, "--data", "shards", "--output", tmp_path)


def test_evaluate_loss_takes_the_samples_of_validation(run):
    from megachameleon.evaluation.shard_losses import open_samples
    from megachameleon.generation.loading import read_checkpoint_info
    from megachameleon.training.batches import open_data

    info = read_checkpoint_info(run)
    shards = (str(run / "shards"),)
    stage = StageConfig(weights={"x": 1})
    data = replace(info.config.data, train={"x": shards}, validation={"x": shards}, stages=(stage,))
    for seed in range(4):
        training = replace(info.config.training, seed=seed)
        seeded = replace(info, config=replace(info.config, training=training))
        [wanted] = open_data(data, training).validation.values()
        [found] = open_samples({"x": run / "shards"}, seeded, 1).values()
        assert len(found) == 1 and np.array_equal(found[0].tokens, wanted[0].tokens)


@pytest.mark.parametrize(("kind", "made"), [("text", {"tokenizer": "x"}), ("image", {"image_tokenizer": "x"})])
def test_evaluate_loss_refuses_shards_of_other_tokenizers(run, tmp_path, kind, made):
    text = TextTokenizer.load(run / "tokenizer")
    with ShardWriter(tmp_path / "x", text.vocabulary, **{"tokenizer": text.fingerprint, **made}) as writer:
        writer.add([text.vocabulary.bos, *text.encode("sun"), text.vocabulary.eos])
        writer.commit()
    with pytest.raises(ValueError, match=rf"--data all=.*made with another {kind} tokenizer \(x\)"):
        call("evaluate", "loss", run, "--data", f"all={tmp_path}", "--output", tmp_path / "out")


def _losses(run, data, output):
    call("evaluate", "loss", run, "--data", f"all={data}", "--output", output)
    text = (output / "losses.json").read_text()
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["losses"]["all"]


def _write_text_shards(folder, run):
    text = TextTokenizer.load(run / "tokenizer")
    with ShardWriter(folder / "x", text.vocabulary, tokenizer=text.fingerprint) as writer:
        writer.add([text.vocabulary.bos, *text.encode("red heart"), text.vocabulary.eos])
        writer.commit()
    return folder


@pytest.mark.parametrize("name", ["generate", "evaluate"])
def test_examples_of_the_help_are_of_the_demo(name):
    tool = load(name)
    lines = tool.build_parser().epilog.replace("\\\n", " ").splitlines()
    examples = [shlex.split(line) for line in lines if f"tools/{name}.py" in line]
    assert len(examples) >= 3
    for words in examples:
        arguments = tool.build_parser().parse_args(words[words.index(f"tools/{name}.py") + 1 :])
        assert arguments.checkpoint == Path("runs/demo/train")


def test_another_image_tokenizer_is_refused(run, tmp_path):
    other = tmp_path / "other"
    _write_image_tokenizer(other, seed=1)
    with pytest.raises(ValueError, match="is not the image tokenizer that made the data"):
        call("generate", run, "--prompt", "red heart", "--image-tokenizer", other, "--output", tmp_path / "out")
