"""There and back through our format at every layout, bit for bit; and each format into other files of its own."""

import itertools

import pytest
import torch
from converting import VOCABULARY, convert_checkpoint, save_again, tensors_of
from meta_writer import read_shards, write_meta
from safetensors.torch import load_file
from three_formats import SHAPES, Case, assert_holds, write

from megachameleon.checkpoint.folder import resolve_checkpoint

LAYOUTS = list(itertools.product((1, 2, 4, 8), (1, 2, 4)))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FAST = [
    *(("34B", "bf16", *layout) for layout in ((1, 1), (2, 4), (4, 2), (8, 1), (8, 4))),
    *(("7B", "fp32", *layout) for layout in ((1, 4), (4, 1), (8, 2))),
    *(("7B", "bf16", 2, 2), ("34B", "fp32", 4, 4)),
]
"""Each degree of each axis, with each shape and type."""
REST = sorted(set(itertools.product(("7B", "34B"), DTYPES, *zip(*LAYOUTS, strict=True))) - set(FAST))
ALL = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Shape, type and kind to a case and its checkpoint, each written once."""
    known = {}

    def get(shape, dtype, kind):
        if (shape, dtype, kind) not in known:
            case = Case([*SHAPES[shape], "model.num_layers=4"], DTYPES[dtype])
            known[shape, dtype, kind] = case, write(kind, tmp_path_factory.mktemp("written") / kind, case)
        return known[shape, dtype, kind]

    return get


def stored(kind, folder):
    """All tensors of a checkpoint as they stand in its files."""
    if kind == "hf":
        return [tensors_of(folder)]
    return [{name: t for name, t in shard.items() if name != "rope.freqs"} for shard in read_shards(folder)]


def assert_same_files(kind, one, other):
    one, other = stored(kind, one), stored(kind, other)
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def assert_files_of_ranks(folder, model, tensor, pipeline):
    """Each holds the layers of its stage, and of each matrix its rank's part; the format itself would allow any."""
    files = sorted(folder.glob("*/*.safetensors"))
    assert len(files) == tensor * pipeline
    for number, file in enumerate(files):
        stage, found = number // tensor, load_file(file)
        layers = {int(name.split("@")[1].split(",")[0]) for name in found if name.startswith("decoder.layers.")}
        assert layers == {n for n in range(model.num_layers) if n * pipeline // model.num_layers == stage}
        assert any(name.startswith("embedding.") for name in found) == (stage == 0)
        assert any(name.startswith("output_layer.") for name in found) == (stage == pipeline - 1)
        shapes = {tuple(t.shape) for name, t in found.items() if "linear_proj" in name}
        assert shapes == {(1, model.hidden_size, model.hidden_size // tensor)}


@pytest.mark.parametrize("kind", ["meta", "hf"])
@pytest.mark.parametrize(("shape", "dtype", "tensor", "pipeline"), ALL)
def test_there_and_back(written, kind, shape, dtype, tensor, pipeline, tmp_path):
    case, folder = written(shape, dtype, kind)
    layout = {"tensor_parallel": tensor, "pipeline_parallel": pipeline}
    ours = convert_checkpoint((kind, "megatron"), folder, tmp_path / "ours", **layout)
    assert_files_of_ranks(ours, case.model, tensor, pipeline)
    if tensor * pipeline == 8:
        assert_holds("megatron", ours, case)
    assert_same_files(kind, convert_checkpoint(("megatron", kind), ours, tmp_path / "back"), folder)


@pytest.mark.parametrize(
    ("tensor", "pipeline"),
    [(2, 1), pytest.param(8, 1, marks=pytest.mark.slow), pytest.param(2, 4, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("kind", ["meta", "hf"])
def test_through_real_ranks(written, kind, tensor, pipeline, tmp_path, workers):
    """Each rank loads its part of what was imported into a model and saves it, as training does."""
    _, folder = written("34B", "bf16", kind)
    layout = {"tensor_parallel": tensor, "pipeline_parallel": pipeline}
    ours = convert_checkpoint((kind, "megatron"), folder, tmp_path / "ours", **layout)
    workers.run(tensor * pipeline, save_again, str(ours), str(tmp_path / "ranks"), layout)
    saved = resolve_checkpoint(tmp_path / "ranks")
    assert len(list(saved.glob("*.safetensors"))) == tensor * pipeline
    assert_same_files(kind, convert_checkpoint(("megatron", kind), saved, tmp_path / "back"), folder)


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("shape", "shards"), [("7B", 2), ("7B", 8), ("34B", 4), ("34B", 8), ("2 shards", 4)])
def test_other_numbers_of_metas_files(written, shape, shards, dtype, tmp_path):
    """More shards than groups of QK-norm: several have the same."""
    case, folder = written(shape, dtype, "meta")
    again = convert_checkpoint(("meta", "meta"), folder, tmp_path / "again", meta_shards=shards)
    expected = write_meta(
        tmp_path / "expected", case.model, case.weights, shards=shards, vocabulary=VOCABULARY, dtype=DTYPES[dtype]
    )
    assert_same_files("meta", again, expected)
    back = convert_checkpoint(("meta", "meta"), again, tmp_path / "back", meta_shards=case.model.qk_norm_groups)
    assert_same_files("meta", back, folder)


def test_fewer_files_than_different_qk_norms(written, tmp_path):
    """A file has one QK-norm: refused with the distance, or averaged when asked."""
    case, folder = written("34B", "fp32", "meta")
    with pytest.raises(ValueError, match=r"(?s)differ.*--average-qk-norm"):
        convert_checkpoint(("meta", "meta"), folder, tmp_path / "refused", meta_shards=2)
    assert not (tmp_path / "refused").exists()
    fewer = convert_checkpoint(("meta", "meta"), folder, tmp_path / "fewer", meta_shards=2, average_qk_norm=True)
    name = "layers.3.attention.k_normalization.bias"
    for shard, rows in zip(read_shards(fewer), case.weights["3.k_norm.bias"].chunk(2), strict=True):
        torch.testing.assert_close(shard[name], rows.mean(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [100_000, 1_000_000, 10_000_000])
def test_other_sizes_of_hugging_faces_files(written, size, tmp_path):
    _, folder = written("34B", "bf16", "hf")
    again = convert_checkpoint(("hf", "hf"), folder, tmp_path / "again", shard_bytes=size)
    files = list(again.glob("*.safetensors"))
    total = sum(tensor.nbytes for tensor in tensors_of(folder).values())
    assert len(files) >= total / size and (len(files) == 1) == (total <= size)
    assert_same_files("hf", again, folder)


@pytest.mark.parametrize(("before", "after"), [((8, 1), (1, 4)), ((2, 4), (4, 2)), ((4, 2), (1, 1))])
def test_other_layouts_of_our_files(written, before, after, tmp_path):
    case, folder = written("34B", "bf16", "megatron")
    for number, (tensor, pipeline) in enumerate((before, after)):
        target = tmp_path / f"layout{number}"
        layout = {"tensor_parallel": tensor, "pipeline_parallel": pipeline}
        folder = convert_checkpoint(("megatron", "megatron"), folder, target, **layout)
        assert len(list(folder.glob("*/*.safetensors"))) == tensor * pipeline
    assert_holds("megatron", folder, case)
