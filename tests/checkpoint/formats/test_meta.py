"""Meta's release format in any number of files: read by boxes, written, and there and back bit for bit."""

import hashlib
import json
import shutil

import pytest
import torch
from converting import CASES, VOCABULARY, convert_checkpoint, save_filled
from meta_oracle import NORMS, ROWS, halves_apart
from meta_writer import read_meta, read_shards, write_meta
from plain_weights import draw

from megachameleon.checkpoint.boxes import Box, within
from megachameleon.checkpoint.folder import resolve_checkpoint
from megachameleon.checkpoint.formats.meta.params import ffn_width, stated_ffn
from megachameleon.checkpoint.formats.meta.source import MetaSource
from megachameleon.checkpoint.formats.plain import plain_shapes, whole
from megachameleon.checkpoint.loading import saved_config
from megachameleon.config import load_config

FOUR = CASES["swin, 4 groups"]
MODEL = load_config("debug", FOUR).model
SMALL = ["model.vocab_size=128", "model.hidden_size=64", "model.ffn_hidden_size=80", "model.num_layers=1"]


def of_groups(groups):
    return [*SMALL, "model.num_attention_heads=16", "model.num_query_groups=8", f"model.qk_norm_groups={groups}"]


def written(folder, overrides, *, shards=None, **options):
    """A release of drawn weights, and the weights."""
    model = load_config("debug", overrides).model
    weights = draw(model)
    options = {"vocabulary": VOCABULARY, **options}
    return write_meta(folder, model, weights, shards=shards or model.qk_norm_groups, **options), model, weights


def plain(weights, model):
    """Weights as `write_meta` takes them, under the names and in the order of the plain form."""
    found = halves_apart(weights, *ROWS, *NORMS)
    named = {f"layers.{name}" if name[0].isdigit() else name: weight for name, weight in found.items()}
    return {name: named[name].reshape(shape) for name, shape in plain_shapes(model).items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_every_box_is_read(tmp_path, shards):
    folder, model, weights = written(tmp_path / "meta", of_groups(shards))
    source, expected = MetaSource(folder), plain(weights, model)
    assert source.description.model.qk_norm_groups == shards
    for name, shape in plain_shapes(source.description.model).items():
        assert torch.equal(source.read(name, whole(name, shape).box), expected[name]), name
        for cut in range(len(shape)):  # odd thirds, so that boxes begin and end within heads and files
            for third in range(3):
                first, last = (shape[cut] * n // 3 for n in (third, third + 1))
                offset, size = [0] * len(shape), list(shape)
                offset[cut], size[cut] = first, last - first
                box = Box(tuple(offset), tuple(size))
                part = expected[name][within(Box((0,) * len(shape), shape), box)]
                assert torch.equal(source.read(name, box), part), (name, box)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_there_and_back(tmp_path, shards, dtype):
    folder, model, _ = written(tmp_path / "meta", of_groups(shards), dtype=dtype)
    ours = convert_checkpoint(("meta", "megatron"), folder, tmp_path / "ours", tensor_parallel=2)
    back = convert_checkpoint(("megatron", "meta"), ours, tmp_path / "back")
    for before, after in zip(read_shards(folder), read_shards(back), strict=True):
        freqs = after.pop("rope.freqs")
        torch.testing.assert_close(freqs, before.pop("rope.freqs"))
        assert freqs.dtype == torch.float32 and all(tensor.dtype == dtype for tensor in after.values())
        assert_same(after, before)
    assert_same(read_meta(back, model), read_meta(folder, model))


@pytest.mark.parametrize(("few", "many"), [(1, 2), (1, 8), (2, 4), (4, 8)])
def test_more_files_and_fewer_again(tmp_path, few, many):
    folder, model, weights = written(tmp_path / "meta", of_groups(few))
    more = convert_checkpoint(("meta", "meta"), folder, tmp_path / "more", meta_shards=many)
    expected = weights | {
        name: weight.repeat_interleave(many // few, 0) for name, weight in weights.items() if name.endswith(NORMS)
    }
    assert len(read_shards(more)) == many
    assert_same({n: w.reshape(expected[n].shape) for n, w in read_meta(more, model).items()}, expected)
    again = convert_checkpoint(("meta", "meta"), more, tmp_path / "again", meta_shards=few)
    for before, after in zip(read_shards(folder), read_shards(again), strict=True):
        assert_same(
            {n: t for n, t in after.items() if n != "rope.freqs"}, {n: before[n] for n in before if "rope" not in n}
        )


def test_groups_that_are_repeated_alone_come_back_as_they_were(tmp_path):
    folder, *_ = written(tmp_path / "meta", of_groups(2))
    more = convert_checkpoint(("meta", "meta"), folder, tmp_path / "more", meta_shards=8)
    assert MetaSource(more).description.model.qk_norm_groups == 2
    again = convert_checkpoint(("meta", "meta"), more, tmp_path / "again")
    assert len(read_shards(again)) == 2
    path = more / "consolidated.03.pth"
    shard = torch.load(path)
    shard["layers.0.attention.k_normalization.bias"][1] += 1
    torch.save(shard, path)
    (more / "checklist.chk").unlink()
    assert MetaSource(more).description.model.qk_norm_groups == 8


def test_our_own_settings_survive(tmp_path):
    overrides = [*of_groups(2), "model.context_length=300", "model.rope_theta=50000", "model.dropout=0.1"]
    model = load_config("debug", overrides).model
    ours = save_filled(overrides, draw(model), tmp_path / "ours")
    meta = convert_checkpoint(("megatron", "meta"), ours, tmp_path / "meta")
    back = convert_checkpoint(("meta", "megatron"), meta, tmp_path / "back")
    assert saved_config(resolve_checkpoint(back)).model == model
    (meta / "megachameleon.json").unlink()
    assert MetaSource(meta).description.model.context_length == 4096
    assert MetaSource(meta).description.model.rope_theta == 50000


def test_what_is_beside_the_weights(tmp_path):
    folder, *_ = written(tmp_path / "meta", FOUR)
    out = convert_checkpoint(("meta", "meta"), folder, tmp_path / "out", dtype="bf16")
    params = json.loads((out / "params.json").read_text())
    assert params.keys() == {"model"}
    inner = params["model"]
    assert (inner["dim"], inner["n_layers"], inner["n_heads"], inner["n_kv_heads"]) == (128, 2, 16, 8)
    assert inner["qk_normalization"] is True and inner["swin_norm"] is True and inner["vocab_size"] == 128
    assert inner["norm_eps"] == 1e-5 and inner["rope_theta"] == 10_000
    # By the rule of Meta's feed-forward layer.
    width = int(inner["ffn_dim_multiplier"] * int(2 * (4 * inner["dim"]) / 3))
    multiple = inner["multiple_of"]
    assert multiple * ((width + multiple - 1) // multiple) == MODEL.ffn_hidden_size
    kept = json.loads((out / "consolidate_params.json").read_text())
    assert kept["dtype"] == "bf16" and kept["model_parallel_size"] == 4
    lines = dict(reversed(line.split()) for line in (out / "checklist.chk").read_text().splitlines())
    files = {"params.json", "consolidate_params.json", *(f"consolidated.{i:02}.pth" for i in range(4))}
    assert lines == {name: hashlib.md5((out / name).read_bytes()).hexdigest() for name in files}
    extra = json.loads((out / "megachameleon.json").read_text())
    assert extra["vocabulary"]["size"] == 128 and extra["model"]["context_length"] == 4096


@pytest.mark.parametrize(
    ("dim", "width"),
    [(4096, 11008), (8192, 22016), (128, 160), (128, 161), (64, 1), (4096, 14336), (5120, 13824), (96, 4097)],
)
def test_the_width_of_the_ffn_can_be_said(dim, width):
    multiple, multiplier = stated_ffn(dim, width)
    assert ffn_width(dim, multiple, multiplier) == width
    if (dim, width) in ((4096, 11008), (8192, 22016)):
        assert (multiple, multiplier) == (256, None)


def test_a_release_is_found_in_what_was_downloaded(tmp_path):
    folder, *_ = written(tmp_path / "data" / "models" / "7b", of_groups(1))
    (tmp_path / "data" / "tokenizer").mkdir()
    for path in (tmp_path, tmp_path / "data", tmp_path / "data" / "models", folder):
        assert MetaSource(path).description.origin == folder
    shutil.copytree(folder, folder.with_name("30b"))
    with pytest.raises(ValueError, match=r"several models: .*/30b, .*/7b; name one"):
        MetaSource(tmp_path)
    with pytest.raises(ValueError, match=r"no consolidated\*.pth there"):
        MetaSource(tmp_path / "data" / "tokenizer")


@pytest.mark.parametrize("rope", ["buffer", None, "absent"])
def test_frequencies_are_not_needed(tmp_path, rope):
    folder, _, weights = written(tmp_path / "meta", of_groups(1), rope=rope)
    assert torch.equal(MetaSource(folder).read("head", Box((0, 0), (128, 64))), weights["head"])


def test_types_may_be_mixed(tmp_path):
    folder, _, weights = written(tmp_path / "meta", of_groups(1), dtype=torch.bfloat16)
    shard = torch.load(folder / "consolidated.pth")
    shard["norm.weight"] = weights["final_norm"]
    torch.save(shard, folder / "consolidated.pth")
    source = MetaSource(folder)
    assert source.description.dtype == torch.float32
    assert torch.equal(source.read("final_norm", Box((0,), (64,))), weights["final_norm"])
    assert torch.equal(source.read("head", Box((0, 0), (2, 64))), weights["head"][:2].bfloat16().float())


def test_views_of_larger_tensors_are_read(tmp_path):
    """A fused matrix of which each name has its rows, and a transposed one."""
    folder, model, weights = written(tmp_path / "meta", of_groups(1))
    path = folder / "consolidated.pth"
    shard = torch.load(path)
    names = [f"layers.0.attention.w{name}.weight" for name in "qkv"]
    fused = torch.cat([shard[name] for name in names])
    shard |= dict(zip(names, fused.split([len(shard[name]) for name in names]), strict=True))
    shard["output.weight"] = shard["output.weight"].T.contiguous().T
    torch.save(shard, path)
    assert path.stat().st_size < 1.1 * sum(tensor.nbytes for tensor in shard.values())
    source, expected = MetaSource(folder), plain(weights, model)
    for name, shape in plain_shapes(model).items():
        assert torch.equal(source.read(name, whole(name, shape).box), expected[name]), name


def test_no_qk_norm(tmp_path):
    """A Llama in Meta's layout."""
    folder, *_ = written(tmp_path / "meta", of_groups(1))
    shard = torch.load(folder / "consolidated.pth")
    torch.save({name: t for name, t in shard.items() if "normalization" not in name}, folder / "consolidated.pth")
    params = json.loads((folder / "params.json").read_text())
    params["model"] |= {"qk_normalization": False, "norm_eps": 1e-6}
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "checklist.chk").unlink()
    read = MetaSource(folder).description.model
    assert (read.qk_norm, read.qk_norm_groups, read.norm_eps) == ("none", 1, 1e-6)
    out = convert_checkpoint(("meta", "meta"), folder, tmp_path / "out", meta_shards=2)
    assert MetaSource(out).description.model == read
