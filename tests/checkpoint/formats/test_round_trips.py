"""There and back again, bit for bit, whatever layout wrote the files or will read them."""

import itertools
from dataclasses import asdict

import pytest
import torch
from converting import (
    CASES,
    VOCABULARY,
    assert_same_tensors,
    convert_checkpoint,
    save_again,
    save_filled,
    tensors_of,
)
from plain_weights import draw

from megachameleon.checkpoint.boxes import Box
from megachameleon.checkpoint.folder import parse_manifest, read_manifest, resolve_checkpoint, verify_hashes
from megachameleon.checkpoint.formats.megatron.source import MegatronSource
from megachameleon.checkpoint.formats.plain import plain_shapes
from megachameleon.checkpoint.loading import saved_config
from megachameleon.config import load_config

LAYOUTS = list(itertools.product((1, 2, 4), (1, 2)))


def plain(source):
    """Every plain tensor of a checkpoint of ours."""
    shapes = plain_shapes(source.description.model)
    return {name: source.read(name, Box((0,) * len(shape), shape)) for name, shape in shapes.items()}


@pytest.fixture(scope="module", params=itertools.product(CASES, ("fp32", "bf16")), ids=" ".join)
def original(request, tmp_path_factory):
    """A checkpoint of one process, and its export."""
    case, precision = request.param
    folder = tmp_path_factory.mktemp("original")
    ours = save_filled(CASES[case], draw(load_config("debug", CASES[case]).model), folder / "ours", precision)
    return ours, convert_checkpoint(("megatron", "hf"), ours, folder / "hf")


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_import_and_export(original, tensor, pipeline, tmp_path):
    ours, hf = original
    imported = convert_checkpoint(
        ("hf", "megatron"), hf, tmp_path / "ours", tensor_parallel=tensor, pipeline_parallel=pipeline
    )
    assert_same_tensors(plain(MegatronSource(imported)), plain(MegatronSource(ours)))
    again = convert_checkpoint(("megatron", "hf"), imported, tmp_path / "hf")
    assert_same_tensors(tensors_of(again), tensors_of(hf))


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 2), (4, 1)])
def test_files_are_those_that_ranks_write(original, tensor, pipeline, tmp_path, request, workers):
    """By name, shape and bits; and what the ranks have written is read like any other."""
    if "swin" not in request.node.callspec.id or ("bf16" in request.node.callspec.id and pipeline > 1):
        pytest.skip("real ranks for a few layouts only")
    ours, _ = original
    layout = {"tensor_parallel": tensor, "pipeline_parallel": pipeline}
    workers.run(tensor * pipeline, save_again, str(ours), str(tmp_path / "ranks"), layout)
    converted = resolve_checkpoint(convert_checkpoint(("megatron", "megatron"), ours, tmp_path / "files", **layout))
    ranks = resolve_checkpoint(tmp_path / "ranks")
    for number in range(tensor * pipeline):
        name = f"tensors_{number:05d}.safetensors"
        assert_same_tensors(load(converted / name), load(ranks / name))
    assert (converted / "index.json").read_text() == (ranks / "index.json").read_text()
    exported = convert_checkpoint(("megatron", "hf"), ranks, tmp_path / "hf")
    assert_same_tensors(tensors_of(exported), tensors_of(original[1]))


def load(path):
    from safetensors.torch import load_file

    return load_file(path)


def test_the_checkpoint_says_what_it_is(original, tmp_path):
    ours, hf = original
    imported = resolve_checkpoint(convert_checkpoint(("hf", "megatron"), hf, tmp_path / "ours"))
    manifest = read_manifest(imported)
    verify_hashes(imported, manifest.files, manifest)
    before = parse_manifest(resolve_checkpoint(ours))
    assert (manifest.step, manifest.vocabulary) == (0, asdict(VOCABULARY) | {"image_grid": [2, 4]})
    assert manifest.tokenizers == before.tokenizers == {"text": "t", "image": "i"}
    assert manifest.lineage["parent"]["step"] == 7
    model, other = saved_config(imported).model, saved_config(resolve_checkpoint(ours)).model
    free = {"dropout", "embedding_dropout", "init_std", "depth_scaled_init"}  # of training, not of the model
    assert all(getattr(model, name) == getattr(other, name) for name in asdict(model).keys() - free)


@pytest.mark.parametrize("target", ["bf16", "fp32"])
def test_another_precision_is_rounded_once(original, target, tmp_path):
    _, hf = original
    converted = tensors_of(convert_checkpoint(("hf", "hf"), hf, tmp_path / "hf", dtype=target))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[target]
    assert_same_tensors(converted, {name: tensor.to(dtype) for name, tensor in tensors_of(hf).items()})


def test_several_workers_write_the_same_bytes(original, tmp_path, request):
    if "swin, 4 groups bf16" not in request.node.callspec.id:
        pytest.skip("processes are slow to start")
    ours, _ = original
    sizes = {"shard_bytes": 250_000}
    one = convert_checkpoint(("megatron", "hf"), ours, tmp_path / "one", **sizes)
    two = convert_checkpoint(("megatron", "hf"), ours, tmp_path / "two", workers=2, **sizes)
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in two.iterdir()) and len(files) > 5
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files)
