"""A text-only Llama as the start of a mixed-modal model: old ids as they were, new rows, near-identity QK-norm."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from converting import convert_checkpoint, tensors_of
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2
from tiny_llama import CODES, import_tokenizer, llama_logits, save_llama

from megachameleon.checkpoint.folder import read_manifest, resolve_checkpoint
from megachameleon.checkpoint.formats.llama import source as llama_source
from megachameleon.checkpoint.formats.llama.ids import NEW
from megachameleon.checkpoint.formats.llama.qk_norm import near_identity
from megachameleon.checkpoint.formats.llama.source import LlamaSource
from megachameleon.checkpoint.formats.plain import plain_shapes, whole
from megachameleon.checkpoint.formats.registry import Options, open_source
from megachameleon.checkpoint.verifying.conversion import verify_conversion
from megachameleon.checkpoint.verifying.verification import Side, logits_of

pytest.importorskip("transformers", reason="an oracle of the tests only")

CASES = {
    "grouped queries": {},
    "as many keys": {"num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 5e5},
    "tied": {"tie_word_embeddings": True},
}


class Case:
    """A Llama, our tokenizer of its own, and tokens in both."""

    def __init__(self, folder, settings):
        self.llama = save_llama(folder / "llama", **settings)
        self.tokenizer = import_tokenizer(self.llama, folder / "tokenizer")
        self.tokenizer_folder = folder / "tokenizer"
        self.ids = torch.from_numpy(self.source(qk_norm="none").ids)
        self.known = (self.ids != NEW).nonzero().flatten()
        chosen = torch.randint(0, len(self.known), (2, 24), generator=torch.Generator().manual_seed(0))
        self.tokens = self.known[chosen]
        self.logits = llama_logits(self.llama, self.ids[self.tokens])[..., self.ids[self.known]]

    def source(self, **options):
        return LlamaSource(self.llama, tokenizer=self.tokenizer_folder, **options)

    def convert(self, folder, **options):
        return convert_checkpoint(("hf", "megatron"), self.llama, folder, tokenizer=self.tokenizer_folder, **options)

    def distance(self, folder):
        """Of our logits of old ids from Llama's, by their standard deviation."""
        found = logits_of("megatron", folder, self.tokens, torch.float32)[..., self.known]
        return ((found - self.logits).std() / self.logits.std()).item()


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("llama"), CASES["grouped queries"])


@pytest.mark.parametrize("name", CASES)
def test_without_qk_norm_old_ids_keep_their_logits(name, tmp_path):
    case = Case(tmp_path, CASES[name])
    ours = case.convert(tmp_path / "ours", qk_norm="none", tensor_parallel=2, pipeline_parallel=2)
    found = logits_of("megatron", ours, case.tokens, torch.float32)
    assert case.logits.std() > 0.5
    torch.testing.assert_close(found[..., case.known], case.logits, rtol=0, atol=1e-5)
    new = (case.ids == NEW).nonzero().flatten()
    share = found.softmax(-1)[..., new].sum(-1)
    assert 0 < share.mean() < len(new) / len(case.ids)  # k / (n + k)


def test_rows_stand_where_their_pieces_stand(case):
    vocabulary = case.tokenizer.vocabulary
    assert case.ids[[vocabulary.bos, vocabulary.eos, vocabulary.unk]].tolist() == [1, 2, 0]
    assert case.ids[vocabulary.text_start :].tolist() == list(range(3, 500))
    assert int((case.ids == NEW).sum()) == vocabulary.size - 500
    source, stored = case.source(), tensors_of(case.llama)
    for name, theirs in (("embedding", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
        table = source.read(name, whole(name, (vocabulary.size, 128)).box)
        assert torch.equal(table[case.known], stored[theirs][case.ids[case.known]])


def test_new_rows_are_apart_and_around_the_mean(case):
    source, vocabulary = case.source(), case.tokenizer.vocabulary
    for name, theirs in (("embedding", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
        table = source.read(name, whole(name, (vocabulary.size, 128)).box)
        new, old = table[case.ids == NEW], tensors_of(case.llama)[theirs]
        assert len(new.unique(dim=0)) == len(new) > CODES
        apart = (new - old.mean(0)) / old.std(0)
        assert apart.std() == pytest.approx(0.1, rel=0.05) and apart.mean().abs() < 0.01


def test_a_tied_head_is_a_copy(tmp_path):
    case = Case(tmp_path, CASES["tied"])
    source, shape = case.source(), (case.tokenizer.vocabulary.size, 128)
    embedding, head = (source.read(name, whole(name, shape).box) for name in ("embedding", "head"))
    assert torch.equal(embedding, head)


def test_boxes_are_parts_of_the_whole(case):
    """Of every tensor, as any layout cuts it; another reader draws the same rows."""
    source, other = case.source(), case.source()
    for name, shape in plain_shapes(source.description.model).items():
        cut = whole(name, shape)
        values = source.read(name, cut.box)
        half = tuple(n // 2 for n in shape)
        part = other.read(name, type(cut.box)(half, tuple(n - h for n, h in zip(shape, half, strict=True))))
        assert torch.equal(part, values[tuple(slice(h, None) for h in half)]), name


def ones_instead(*arguments, **options):
    found = near_identity(*arguments, **options)
    return replace(found, scales=(1.0,) * len(found.scales))


@pytest.mark.parametrize("qk_norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("groups", [None, 1])
def test_a_qk_norm_is_nearer_than_one_of_ones(case, qk_norm, groups, tmp_path, monkeypatch):
    """Which is what a fresh norm would have."""
    near = case.distance(case.convert(tmp_path / "near", qk_norm=qk_norm, qk_norm_groups=groups))
    monkeypatch.setattr(llama_source, "near_identity", ones_instead)
    ones = case.distance(case.convert(tmp_path / "ones", qk_norm=qk_norm, qk_norm_groups=groups))
    assert near < (0.9 if groups else 0.8) * ones


def test_more_groups_are_nearer(case, tmp_path):
    """Each head of keys has a scale of its own."""
    distances = [
        case.distance(case.convert(tmp_path / str(groups), qk_norm="rmsnorm", qk_norm_groups=groups))
        for groups in (1, 2)
    ]
    assert distances[1] < distances[0]
    assert case.source().description.model.qk_norm_groups == 2


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_what_is_expected_of_a_norm_is_what_drawn_inputs_show(kind):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4 * 16, 96, generator=generator).unflatten(0, (4, 16))
    weight *= torch.tensor([0.5, 1.0, 1.5, 2.0])[:, None, None]
    weight += 0.3 * torch.randn(4, 1, 96, generator=generator)  # so that the mean over a head's dimensions counts
    norm = torch.rand(96, generator=generator) + 0.5
    found = near_identity(weight.flatten(0, 1), norm, heads=4, groups=2, kind=kind)
    vectors = (torch.randn(20_000, 96, generator=generator) * norm) @ weight.flatten(0, 1).T
    heads = vectors.unflatten(1, (4, 16))
    left = heads - heads.mean(-1, keepdim=True) if kind == "layernorm" else heads
    squares = left.square().mean((0, 2))
    assert found.scales == pytest.approx(squares.view(2, 2).mean(1).sqrt().tolist(), rel=0.02)
    lost = 1 - left.square().sum() / heads.square().sum()
    assert found.mean_share == pytest.approx(lost.item(), abs=0.005)
    lengths = left.square().mean(-1)
    variation = (lengths.std(0) / lengths.mean(0)).mean() / 2
    assert found.length_variation == pytest.approx(variation.item(), rel=0.05)
    own = squares.sqrt() / torch.tensor(found.scales).repeat_interleave(2) - 1
    assert found.head_variation == pytest.approx(own.abs().max().item(), abs=0.02)


def test_notes_say_what_is_new_and_what_is_not_identity(case):
    notes = case.source().description.notes
    assert f"497 rows of text and 3 of control tokens are Llama's; {CODES} of picture codes and" in notes[0]
    assert "2 groups" in notes[1] and notes[2].startswith("queries: lengths") and notes[3].startswith("keys: lengths")
    assert "most in layer" in notes[2] and "the mean over a head's dimensions, now gone" in notes[2]
    assert "now gone" not in case.source(qk_norm="rmsnorm").description.notes[2]
    assert "logits of old ids are Llama's" in case.source(qk_norm="none").description.notes[1]


def test_the_checkpoint_knows_where_it_comes_from(case, tmp_path):
    manifest = read_manifest(resolve_checkpoint(case.convert(tmp_path / "ours")))
    assert manifest.lineage["imported_from"]["format"] == "Hugging Face, Llama's layout"
    assert manifest.tokenizers == {"text": case.tokenizer.fingerprint, "image": None}
    assert manifest.vocabulary["size"] == case.tokenizer.vocabulary.size


def test_half_precision_goes_to_bf16(tmp_path):
    """Llama 2 is stored in fp16."""
    llama = save_llama(tmp_path / "llama", dtype=torch.float16)
    import_tokenizer(llama, tmp_path / "tokenizer")
    options = {"tokenizer": tmp_path / "tokenizer", "dtype": "bf16"}
    ours = convert_checkpoint(("hf", "megatron"), llama, tmp_path / "ours", **options)
    assert {tensor.dtype for tensor in tensors_of(ours / "step_00000000").values()} == {torch.bfloat16}


def test_it_goes_on_to_a_chameleon_of_transformers(case, tmp_path):
    from transformers import AutoTokenizer

    ours = case.convert(tmp_path / "ours")
    options = {"tokenizer": case.tokenizer_folder}
    hf = convert_checkpoint(("hf", "hf"), case.llama, tmp_path / "hf", **options)
    known = logits_of("megatron", ours, case.tokens, torch.float32)
    torch.testing.assert_close(logits_of("hf", hf, case.tokens, torch.float32), known, rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(hf)
    assert tokenizer(" self").input_ids == [0, *case.tokenizer.encode(" self")]
    settings = json.loads((hf / "config.json").read_text())
    assert settings["vocabulary_map"]["<image>"] == case.tokenizer.vocabulary.turn_separator + 1


def test_more_rows_are_verified_over_those_of_llama(case, tmp_path):
    rows = case.tokenizer.vocabulary.size + 128
    options = {"tokenizer": case.tokenizer_folder, "vocab_size": rows}
    hf = convert_checkpoint(("hf", "hf"), case.llama, tmp_path / "hf", **options)
    before, after = Side(kind="hf", path=case.llama), Side(kind="hf", path=hf)
    lines = list(verify_conversion(open_source("hf", case.llama, Options(**options)), before, after, torch.float32))
    assert lines[0].startswith("verified:") and "with the QK-norms that DST was given" in lines[1]
    assert len(tensors_of(hf)["lm_head.weight"]) == rows


@pytest.fixture
def broken(case, tmp_path):
    return shutil.copytree(case.llama, tmp_path / "broken")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("attention_bias", True, "attention_bias=True"),
        ("mlp_bias", True, "mlp_bias=True"),
        ("hidden_act", "gelu", "hidden_act='gelu'"),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}, "RoPE of type 'llama3'"),
        ("head_dim", 64, "head_dim=64"),
        ("num_key_value_heads", 3, "num_query_groups=3"),
        ("hidden_size", "128", "hidden_size is '128'"),
        ("vocab_size", None, "vocab_size is None"),
        ("vocab_size", 501, r"2 of another shape: model.embed_tokens.weight \[500, 128\] instead of \[501, 128\]"),
        ("num_hidden_layers", 3, "9 missing: model.layers.2.input_layernorm.weight"),
        ("num_hidden_layers", 1, "9 unknown: model.layers.1.input_layernorm.weight"),
        ("rms_norm_eps", "x", "rms_norm_eps is 'x'"),
        ("intermediate_size", 97, "instead of"),
    ],
)
def test_other_models_are_refused(case, broken, field, value, message):
    settings = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(settings | {field: value}))
    with pytest.raises(ValueError, match=message) as error:
        open_source("hf", broken, Options(tokenizer=case.tokenizer_folder))
    assert "broken" in str(error.value) and "\n" not in str(error.value)


def test_a_number_of_layers_that_would_fill_the_memory_is_refused(case, broken):
    settings = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 10**9}))
    with pytest.raises(ValueError, match="1,000,000,000 layers are no model's"):
        open_source("hf", broken, Options(tokenizer=case.tokenizer_folder))


def test_without_a_tokenizer_the_way_to_one_is_told(case, broken):
    with pytest.raises(ValueError, match=r"--tokenizer \(tools/import_tokenizer.py text"):
        open_source("hf", case.llama, Options())
    (broken / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer\.model beside the model"):
        open_source("hf", broken, Options(tokenizer=case.tokenizer_folder))


def test_another_tokenizer_of_llama_is_another_conversion(case, broken):
    """Its pieces say which row goes where, so files that were made by the one do not fit to those of the other."""
    before = open_source("hf", broken, Options(tokenizer=case.tokenizer_folder)).description.identity
    assert open_source("hf", broken, Options(tokenizer=case.tokenizer_folder)).description.identity == before
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((broken / "tokenizer.model").read_bytes())
    one, other = model.pieces[-1], model.pieces[-2]
    one.piece, other.piece = other.piece, one.piece
    (broken / "tokenizer.model").write_bytes(model.SerializeToString())
    assert open_source("hf", broken, Options(tokenizer=case.tokenizer_folder)).description.identity != before


def test_groups_must_divide_the_heads_of_keys(case):
    with pytest.raises(ValueError, match="qk_norm_groups: 4 does not divide"):
        open_source("hf", case.llama, Options(tokenizer=case.tokenizer_folder, qk_norm_groups=4))
    with pytest.raises(ValueError, match="says nothing with --qk-norm none"):
        open_source("hf", case.llama, Options(tokenizer=case.tokenizer_folder, qk_norm_groups=2, qk_norm="none"))


def test_a_damaged_file_is_refused_in_a_line(case, broken):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="damaged") as error:
        open_source("hf", broken, Options(tokenizer=case.tokenizer_folder))
    assert "\n" not in str(error.value)


def test_values_that_are_not_finite_are_refused(case, broken, tmp_path):
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="not finite"):
        convert_checkpoint(("hf", "megatron"), broken, tmp_path / "ours", tokenizer=case.tokenizer_folder)


def test_a_text_tokenizer_of_other_pieces_takes_what_it_finds(case, tmp_path):
    """Such as one that was trained for other languages: rows by spelling, the rest is new."""
    from llama_tokenizers import train_like_llama

    other = tmp_path / "tokenizer.model"
    other.write_bytes(train_like_llama(520))
    from megachameleon.tokens.text.importing import import_any_text_tokenizer

    tokenizer = import_any_text_tokenizer(other, tmp_path / "ours", num_image_codes=CODES, image_grid=(2, 4))
    source = LlamaSource(case.llama, tokenizer=tmp_path / "ours")
    text = source.ids[tokenizer.vocabulary.text_start :]
    processor = tokenizer.engine.processor
    piece = processor.id_to_piece(300)
    from sentencepiece import SentencePieceProcessor

    theirs = SentencePieceProcessor(model_file=str(case.llama / "tokenizer.model"))
    assert text[299] == theirs.piece_to_id(piece) != 0
    assert (text == NEW).sum() == 20 and any("20 text pieces are not Llama's" in n for n in source.description.notes)
