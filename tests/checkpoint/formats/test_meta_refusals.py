"""What Meta's format cannot hold, or what is no release: refused in one line that says what to do."""

import json
import pickle

import pytest
import torch
from converting import VOCABULARY, convert_checkpoint
from meta_writer import read_shards, write_meta
from plain_weights import draw

from megachameleon.checkpoint.formats.grouping import averaging_note, largest_distance, regrouped
from megachameleon.checkpoint.formats.meta.sink import MetaSink
from megachameleon.checkpoint.formats.meta.source import MetaSource
from megachameleon.checkpoint.formats.plain import Description
from megachameleon.config import load_config

SMALL = ["model.vocab_size=128", "model.hidden_size=64", "model.ffn_hidden_size=80", "model.num_layers=3"]
FOUR = [*SMALL, "model.num_attention_heads=16", "model.num_query_groups=8", "model.qk_norm_groups=4"]


@pytest.fixture
def release(tmp_path):
    model = load_config("debug", FOUR).model
    return write_meta(tmp_path / "release", model, draw(model), shards=4, vocabulary=VOCABULARY)


def edit(path, **changes):
    values = json.loads(path.read_text())
    values.get("model", values).update(changes)
    path.write_text(json.dumps(values))


def shard(release, number, change):
    path = release / f"consolidated.{number:02}.pth"
    state = torch.load(path)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_heads": 7}, "hidden_size: 64 is not divisible by num_attention_heads=7"),
        ({"n_kv_heads": 4}, r"6 of another shape: layers.0.attention.wk.weight \[8, 64\] instead of \[4, 64\]"),
        ({"n_kv_heads": 2}, "qk_norm_groups: 4 does not divide"),
        ({"n_layers": 4}, "13 missing: layers.3.attention_norm.weight"),
        ({"n_layers": 2}, "13 unknown: layers.2"),
        ({"n_layers": 10**6}, "says n_layers=1000000, but a file has 42 tensors only"),
        ({"n_layers": 10**30}, "n_layers=1000000000.* cannot be"),
        ({"dim": "64"}, "dim=64 in params.json .* cannot be"),
        ({"dim": True}, "dim=True in params.json .* cannot be"),
        ({"dim": None}, "does not say dim"),
        ({"dim": 128, "multiple_of": None, "ffn_dim_multiplier": None}, "of another shape"),
        ({"vocab_size": 64}, "vocab_size is 64 and by the tensors 128"),
        ({"multiple_of": 256}, "the FFN's width, by dim, multiple_of and ffn_dim_multiplier, is 256 and by the .* 80"),
        ({"norm_eps": 1e-6}, "norm_eps=1e-06, while Meta's QK-norm has 1e-05"),
        ({"norm_eps": float("nan")}, "norm_eps=nan in params.json .* cannot be"),
        ({"rope_theta": 0}, "rope_theta=0 in params.json .* cannot be"),
        ({"rope_theta": 1e30}, "rope_theta=1e[+]30 in params.json .* cannot be"),
        ({"qk_normalization": False}, "says qk_normalization=False, but there are some tensors"),
        ({"swin_norm": "yes"}, "swin_norm=yes in params.json .* cannot be"),
        ({"seed": "x", "max_batch_size": [1]}, None),
        ({"vocab_size": -1, "multiple_of": None, "ffn_dim_multiplier": None, "rope_theta": None}, None),
    ],
)
def test_settings_that_contradict_the_tensors(release, changes, said):
    edit(release / "params.json", **changes)
    if said is None:
        assert MetaSource(release).description.model.ffn_hidden_size == 80
        return
    with pytest.raises(ValueError, match=said) as caught:
        MetaSource(release)
    assert str(caught.value).startswith(str(release)) and "\n" not in str(caught.value)


def test_settings_in_either_file(release):
    """The second file stands over the first, and is enough where it says all."""
    (release / "checklist.chk").unlink()
    expected = MetaSource(release).description.model
    edit(release / "params.json", model_parallel_size=8)
    assert MetaSource(release).description.model == expected
    edit(release / "consolidate_params.json", rope_theta=77.0)
    assert MetaSource(release).description.model.rope_theta == 77
    params = json.loads((release / "params.json").read_text())["model"]
    edit(release / "consolidate_params.json", **(params | {"model_parallel_size": 4}))
    (release / "params.json").unlink()
    assert MetaSource(release).description.model == expected
    (release / "consolidate_params.json").write_text('{"model_parallel_size": 4}')
    with pytest.raises(ValueError, match=r"does not say dim, n_layers, n_heads, and params.json is not there; copy it"):
        MetaSource(release)
    (release / "consolidate_params.json").unlink()
    with pytest.raises(ValueError, match=r"neither params.json nor consolidate_params.json"):
        MetaSource(release)


def test_the_order_of_norms_is_said_or_noted(release):
    assert MetaSource(release).description.notes == ()
    edit(release / "params.json", swin_norm=None)
    (note,) = MetaSource(release).description.notes
    assert "do not say swin_norm" in note
    edit(release / "params.json", swin_norm=True)
    assert MetaSource(release).description.model.norm_order == "swin"


@pytest.mark.parametrize("name", ["params.json", "consolidate_params.json"])
@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, " " * (1 << 20) + "{}"])
def test_settings_that_are_no_settings(release, name, text):
    (release / name).write_text(text)
    with pytest.raises(
        ValueError, match=rf"{release / name}: (is not a JSON object|not valid JSON|has 1,048,578 bytes)"
    ):
        MetaSource(release)


def test_files_that_are_missing(release):
    (release / "checklist.chk").rename(release / "kept")
    (release / "consolidated.03.pth").rename(release / "03")
    with pytest.raises(ValueError, match="says model_parallel_size=4, but there are 3 files"):
        MetaSource(release)
    (release / "consolidated.01.pth").unlink()
    with pytest.raises(ValueError, match=r"has consolidated.00.pth, consolidated.02.pth, not consolidated.00.pth to"):
        MetaSource(release)
    (release / "03").rename(release / "consolidated.pth")
    with pytest.raises(ValueError, match="but there are 1 files"):
        MetaSource(release)
    with pytest.raises(ValueError, match="no such folder"):
        MetaSource(release / "absent")


def test_all_that_is_wrong_is_listed_by_file(release):
    def less(state):
        del state["norm.weight"], state["layers.1.attention.wq.weight"]

    def more(state):
        state["layers.0.attention.wq.bias"] = torch.zeros(1)
        state["layers.2.feed_forward.w2.weight"] = torch.zeros(2, 3)

    shard(release, 1, less)
    shard(release, 3, more)
    with pytest.raises(ValueError) as caught:
        MetaSource(release)
    said = str(caught.value)
    assert "consolidated.01.pth: not the tensors of the model" in said and "consolidated.00" not in said
    assert "2 missing: layers.1.attention.wq.weight, norm.weight" in said
    assert "consolidated.03.pth: not the tensors" in said and "1 unknown: layers.0.attention.wq.bias" in said
    assert "1 of another shape: layers.2.feed_forward.w2.weight [2, 3] instead of [64, 20]" in said


def test_copies_that_differ(release):
    def change(state):
        state["layers.2.ffn_norm.weight"][3] += 1e-3
        state["norm.weight"][0] += 1e-3

    shard(release, 2, change)
    with pytest.raises(ValueError, match=r"the files differ in layers.2.ffn_norm.weight, norm.weight, of which each"):
        MetaSource(release)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ([1, 2], "holds a list, not named tensors"),
        ({"model": {"norm.weight": torch.zeros(2)}}, "model: not tensors"),
        ({"norm.weight": 3}, "norm.weight: not tensors"),
    ],
)
def test_files_of_other_things(release, state, said):
    torch.save(state, release / "consolidated.02.pth")
    with pytest.raises(ValueError, match=rf"consolidated.02.pth: {said}"):
        MetaSource(release)


def test_weights_are_floats(release):
    shard(release, 1, lambda state: state.update({"norm.weight": torch.ones(64, dtype=torch.int64)}))
    shard(release, 0, lambda state: state.update({"norm.weight": torch.ones(64, dtype=torch.int64)}))
    for number in (2, 3):
        shard(release, number, lambda state: state.update({"norm.weight": torch.ones(64)}))
    with pytest.raises(ValueError, match=r"tensors of type int64; only floats are weights"):
        MetaSource(release)


class Harmful:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_executed(release, tmp_path, zipped):
    mark = tmp_path / "executed"
    if zipped:
        shard(release, 3, lambda state: state.update({"x": Harmful(mark)}))
    else:
        (release / "consolidated.03.pth").write_bytes(pickle.dumps(Harmful(mark)))
    with pytest.raises(ValueError, match=r"consolidated.03.pth: (holds an object of|is not a zip file)"):
        MetaSource(release)
    assert not mark.exists()


def test_damage_that_only_the_checksum_knows(release, tmp_path):
    path = release / "consolidated.02.pth"
    data = bytearray(path.read_bytes())
    data[-3000] ^= 1
    path.write_bytes(data)
    MetaSource(release)
    with pytest.raises(ValueError, match=r"consolidated.02.pth: its MD5 differs from that in checklist.chk"):
        convert_checkpoint(("meta", "megatron"), release, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("0" * 32 + "  ../consolidated.00.pth", "is not an MD5 and the name of a file beside it"),
        ("0" * 32 + "  /etc/passwd", "is not an MD5 and the name"),
        ("0" * 31 + "  params.json", "is not an MD5 and the name"),
        ("0" * 32 + "  consolidated.07.pth", "names 'consolidated.07.pth', which is not beside it"),
        ("x" * (1 << 20), "has 1,048,57. bytes"),
    ],
)
def test_a_checklist_that_is_none(release, line, said):
    (release / "checklist.chk").write_text(line + "\n")
    with pytest.raises(ValueError, match=said):
        MetaSource(release)


def test_a_checklist_may_know_less_and_in_other_words(release):
    (release / "checklist.chk").write_text(
        "0123456789ABCDEF0123456789abcdef *params.json\n\n00000000000000000000000000000000 vqgan.ckpt"
    )
    (known,) = MetaSource(release).hashes()
    assert (known.path, known.algorithm) == (release / "params.json", "md5")
    assert known.digest == "0123456789abcdef" * 2
    (release / "checklist.chk").unlink()
    assert MetaSource(release).hashes() == []


@pytest.mark.parametrize(
    ("overrides", "options", "said"),
    [
        ([], {"shards": 3}, r"--shards 3: 3 files do not divide heads 16, key/value heads 8, .*; 1, 2, 4, 8 would"),
        ([], {"shards": 16}, r"16 files do not divide key/value heads 8"),
        (["model.vocab_size=130"], {"shards": 4}, r"4 files do not divide vocabulary 130; 1, 2 would"),
        (["model.qk_norm=rmsnorm"], {}, "model.qk_norm=rmsnorm, and Meta's Chameleon has layernorm or none only"),
        (["model.norm_eps=1e-6"], {}, "model.norm_eps=1e-06, while Meta's QK-norm has 1e-05"),
        (
            ["model.num_attention_heads=12", "model.num_query_groups=12", "model.hidden_size=192",
             "model.qk_norm_groups=4", "model.ffn_hidden_size=96", "model.vocab_size=96"],
            {"shards": 6},
            "--shards 6: the model has 4 groups of QK-norm; give a multiple of it, or a divisor",
        ),
    ],
)  # fmt: skip
def test_models_that_do_not_fit(tmp_path, overrides, options, said):
    with pytest.raises(ValueError, match=said):
        MetaSink(described([*FOUR, *overrides], tmp_path), torch.float32, **options)


def described(overrides, origin):
    """A model of which no weights are needed."""
    return Description(
        model=load_config("debug", overrides).model,
        dtype=torch.float32,
        origin=origin,
        identity="x",
        tokenizers={},
        lineage={},
    )


def test_heads_that_differ_are_refused_with_the_distance(release, tmp_path):
    with pytest.raises(ValueError) as caught:
        convert_checkpoint(("meta", "meta"), release, tmp_path / "two", meta_shards=2)
    said = str(caught.value)
    assert "heads of a group differ in 12 QK-norm tensors (by up to" in said and "; layers 0-2)" in said
    assert "give --shards 4, or a multiple of it, or --average-qk-norm, which changes the model" in said
    assert not list(tmp_path.glob("*two*"))


def test_heads_that_differ_are_refused_at_the_latest_when_they_are_written(tmp_path):
    sink = MetaSink(described(FOUR, tmp_path), torch.float32, 2)
    (piece,) = (piece for piece in sink.files()[1].pieces if piece.name == "layers.2.attention.k_normalization.bias")
    assert [(cut.box.offset, cut.box.shape) for cut in piece.cuts] == [((2, 0), (2, 4))]
    assert sink.make(piece, [torch.ones(2, 4)]).tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"heads of a group differ in layers.2.k_norm.bias; give more --shards"):
        sink.make(piece, [torch.arange(8.0).view(2, 4)])


def test_heads_that_differ_may_be_averaged(release, tmp_path):
    out = convert_checkpoint(("meta", "meta"), release, tmp_path / "two", meta_shards=2, average_qk_norm=True)
    before, after = read_shards(release), read_shards(out)
    for name in ("layers.1.attention.q_normalization.weight", "layers.2.attention.k_normalization.bias"):
        for i, found in enumerate(after):
            mean = (before[2 * i][name] + before[2 * i + 1][name]) / 2
            torch.testing.assert_close(found[name], mean, rtol=0, atol=1e-6)


def test_groups():
    values = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0], [3.0, 4.5]])
    assert regrouped(values, 8).tolist() == values.repeat_interleave(2, 0).tolist()
    assert torch.equal(regrouped(values, 4), values)
    assert regrouped(values, 2).tolist() == [[1.0, 2.0], [3.0, 4.25]]
    assert largest_distance(values, 8) == largest_distance(values, 4) == 0
    assert (largest_distance(values, 2), largest_distance(values, 1)) == (0.5, 2.5)
    far = {f"layers.{i}.q_norm.bias": float(i) for i in (0, 1, 2, 3, 7)}
    with pytest.raises(
        ValueError, match=r"^x: .* in 4 QK-norm tensors \(by up to 7 in layers.7.q_norm.bias; layers 1-3, 7\)"
    ):
        averaging_note("x", far, averaged=False, remedy="do")
    assert "up to 7 apart" in averaging_note("x", far, averaged=True, remedy="do")
    assert averaging_note("x", {"layers.0.q_norm.bias": 0.0}, averaged=False, remedy="do") is None
