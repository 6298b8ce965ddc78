"""A folder in the form of Hugging Face's release of Chameleon: its config, bf16, tokenizer, processor, VQ weights."""

import json
import shutil

import numpy as np
import pytest
import torch
from converting import assert_same_tensors, convert_checkpoint, tensors_of
from PIL import Image
from release_files import release_file, write_release
from safetensors.torch import load_file, save_file

from megachameleon.checkpoint.formats.registry import Options, make_sink, open_source
from megachameleon.checkpoint.verifying.verification import logits_of
from megachameleon.tokens.text.importing import import_text_tokenizer
from megachameleon.tokens.vocabulary import Vocabulary
from megachameleon.tokens.vq import ImageTokenizer
from megachameleon.tokens.vq.importing import import_image_tokenizer
from megachameleon.tokens.vq.vqgan import VQGANConfig

transformers = pytest.importorskip("transformers", reason="an oracle of the tests only")

SIZE = {
    "vocab_size": 65536, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "model_parallel_size": 2, "swin_norm": True,
}  # fmt: skip
VQ = {
    "embed_dim": 8, "num_embeddings": 8192, "double_latent": False, "latent_channels": 8, "resolution": 64,
    "in_channels": 3, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": None,
    "dropout": 0.0, "attn_type": "vanilla", "model_type": "chameleon_vqgan",
}  # fmt: skip
OLD_VQ = {"ch": 32, "ch_mult": [1, 1], "n_embed": 8192, "out_ch": 3, "double_z": False, "z_channels": 8}
SHAPE = VQGANConfig(
    image_size=64, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, latent_channels=8, code_dim=8
)


def tokenizer_file():
    """As Hugging Face changed Meta's: `<image>`, and bos before a text."""
    text = release_file()
    text["model"]["vocab"]["<image>"] = text["model"]["vocab"].pop("<reserved08707>")
    text["added_tokens"][8711]["content"] = "<image>"
    start, rest = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    text["post_processor"] = {
        "type": "TemplateProcessing", "single": [start, rest], "pair": [start, rest],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }  # fmt: skip
    return text


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    text = tokenizer_file()
    names = text["model"]["vocab"]
    torch.manual_seed(0)
    config = transformers.ChameleonConfig(**SIZE, vocabulary_map=names, pad_token_id=1, vq_config=VQ)
    model = transformers.ChameleonForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name or "lm_head" in name or "embed" in name:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            if "vqmodel" not in name and "norm" in name:
                rows = 0.3 * torch.randn(2, 4) if parameter.dim() == 2 else 0.3 * torch.randn(32)
                parameter.add_(rows.repeat_interleave(len(parameter) // len(rows), 0))
    model.bfloat16().save_pretrained(folder, max_shard_size="4MB")
    settings = {
        "architectures": ["ChameleonForConditionalGeneration"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02, **SIZE,
        "max_position_embeddings": 4096, "mlp_bias": False, "model_type": "chameleon", "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0", "use_cache": True, "vocabulary_map": names,
        "vq_config": {**VQ, **OLD_VQ},
    }  # fmt: skip
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    files = {
        "config.json": settings,
        "tokenizer.json": text,
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizerFast", "processor_class": "ChameleonProcessor",
            "sep_token": "<reserved08706>", **tokens,
        },
        "special_tokens_map.json": {**tokens, "sep_token": "<reserved08706>"},
        "processor_config.json": {
            "image_seq_length": 1024, "image_token": "<image>", "processor_class": "ChameleonProcessor",
        },
        "preprocessor_config.json": {
            "image_processor_type": "ChameleonImageProcessor", "processor_class": "ChameleonProcessor", "resample": 1,
            "size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}, "rescale_factor": 0.0078,
            "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0],
        },
        "generation_config.json": {
            "bos_token_id": 1, "eos_token_id": [2, 8710], "pad_token_id": 1, "temperature": 0.7, "do_sample": True,
            "transformers_version": "4.43.0.dev0",
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture
def changed(release, tmp_path):
    """A copy with another config.json, in which all weights are in one file."""

    def change(tensors=lambda found: None, **settings):
        folder = tmp_path / "changed"
        folder.mkdir()
        found = tensors_of(release)
        tensors(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((release / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))
        return folder

    return change


def load(folder):
    return transformers.ChameleonForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


def test_it_is_imported(release, tmp_path):
    """With sizes of grouped queries that are head_dim x key/value heads: 8 is not 2 squared."""
    source = open_source("hf", release, Options())
    assert source.description.dtype == torch.bfloat16
    assert Vocabulary.from_dict(source.description.vocabulary, origin="") == Vocabulary()
    ours = convert_checkpoint(("hf", "megatron"), release, tmp_path / "ours", tensor_parallel=2, pipeline_parallel=2)
    tokens = torch.tensor([[0, 8197, *range(1000, 1020), 8196, 20000, 30000, 8710]])
    model = load(release)
    with torch.no_grad():
        theirs = model.model(input_ids=tokens, use_cache=False).last_hidden_state @ model.lm_head.weight.T
    assert 0.5 < theirs.std() < 2
    mine = logits_of("megatron", ours, tokens, torch.float32)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_other_files_of_the_same_have_all_of_it(release, tmp_path):
    again = convert_checkpoint(("hf", "hf"), release, tmp_path / "again", shard_bytes=3_000_000)
    assert_same_tensors(dict(sorted(tensors_of(again).items())), dict(sorted(tensors_of(release).items())))
    assert len(list(again.glob("*.safetensors"))) > 2
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        assert (again / name).read_bytes() == (release / name).read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (release, again))
    assert after["vq_config"] == before["vq_config"] and after["vocabulary_map"] == before["vocabulary_map"]
    generation = transformers.GenerationConfig.from_pretrained(again)
    assert (generation.bos_token_id, generation.pad_token_id, generation.temperature) == (0, 1, 0.7)
    assert generation.eos_token_id == [2, 8710]
    config = transformers.AutoConfig.from_pretrained(again)
    assert (config.bos_token_id, config.pad_token_id, config.dtype) == (0, 1, torch.bfloat16)


def test_other_files_of_the_same_answer_like_it(release, tmp_path):
    again = convert_checkpoint(("hf", "hf"), release, tmp_path / "again", shard_bytes=3_000_000)
    answers = []
    for folder in (release, again):
        processor = transformers.AutoProcessor.from_pretrained(folder)
        inputs = processor(text="<image> what?", images=[picture()])
        assert inputs["input_ids"][0, :3].tolist() == [0, 8197, 8711] and inputs["input_ids"].shape[1] > 1026
        answers.append(load(folder).generate(**inputs, max_new_tokens=3, do_sample=False)[0, -3:].tolist())
    assert answers[0] == answers[1]


def test_there_and_back_with_imported_tokenizers(release, tmp_path):
    text = import_text_tokenizer(release, tmp_path / "text")
    image = import_image_tokenizer(release, tmp_path / "image", config=SHAPE)
    ours = convert_checkpoint(("hf", "megatron"), release, tmp_path / "ours", tokenizer=tmp_path / "text")
    beside = {"tokenizer": tmp_path / "text", "image_tokenizer": tmp_path / "image"}
    back = convert_checkpoint(("megatron", "hf"), ours, tmp_path / "back", **beside)
    before, after = tensors_of(release), tensors_of(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].float(), after[name].float()) for name in before)
    assert all(after[name].dtype == torch.bfloat16 for name in after if "vqmodel" not in name)
    names = [json.loads((folder / "config.json").read_text())["vocabulary_map"] for folder in (release, back)]
    assert names[0] == names[1]
    theirs, mine = (transformers.AutoProcessor.from_pretrained(folder) for folder in (release, back))
    said = "<image> the self (1 2)\n x"
    one, other = (p(text=said, images=[picture()])["input_ids"].tolist() for p in (theirs, mine))
    assert one == other and other[0][1027:-1] == text.encode(" the self (1 2)\n x")
    pixels = mine(text=said, images=[picture()])["pixel_values"]
    codes = load(back).get_image_tokens(pixels)[0].long() - 4
    assert torch.equal(codes, image.encode(np.array(picture()).transpose(2, 0, 1)[None])[0])


def test_a_release_has_no_picture_decoder_and_the_note_says_where_one_is(release):
    source = open_source("hf", release, Options())
    (note,) = make_sink("hf", source.description, Options()).notes
    assert note.startswith("no picture decoder") and "vqgan.ckpt" in note and "--image-tokenizer" in note


def test_ids_without_names_are_chameleons_if_they_are_as_many(changed):
    vocabulary = open_source("hf", changed(vocabulary_map=None), Options()).description.vocabulary
    assert Vocabulary.from_dict(vocabulary, origin="") == Vocabulary()


def test_names_that_disagree_are_refused(release, changed, tmp_path):
    names = json.loads((release / "config.json").read_text())["vocabulary_map"]
    moved = {name: i + 4 if 4 <= i < 8196 else i for name, i in names.items()}
    with pytest.raises(ValueError, match=r"'IMGIMGAZ' is 8 and not 4, .* and 8184 more; give the text tokenizer"):
        open_source("hf", changed(vocabulary_map=moved), Options())
    other = write_release(tmp_path / "other.json")
    content = json.loads(other.read_text())
    vocab = content["model"]["vocab"]
    vocab["Ġthe"], vocab["Ġof"] = vocab["Ġof"], vocab["Ġthe"]
    other.write_text(json.dumps(content))
    import_text_tokenizer(other, tmp_path / "other")
    with pytest.raises(ValueError, match=r"vocabulary_map disagrees with .*other: 'Ġthe' is \d+ and not \d+"):
        open_source("hf", release, Options(tokenizer=tmp_path / "other"))


def test_another_place_of_image_is_kept(release, changed, tmp_path):
    names = json.loads((release / "config.json").read_text())["vocabulary_map"]
    names["<reserved08707>"], names["<image>"] = 8711, names.pop("<reserved08796>")
    again = convert_checkpoint(("hf", "hf"), changed(vocabulary_map=names), tmp_path / "again")
    assert transformers.AutoConfig.from_pretrained(again).image_token_id == 8800


def test_a_vocabulary_map_of_something_else_is_refused(changed):
    with pytest.raises(ValueError, match="vocabulary_map does not map names to ids"):
        open_source("hf", changed(vocabulary_map={"<s>": [0]}), Options())


def test_a_picture_encoder_must_be_whole_and_of_the_vocabulary(changed, tmp_path):
    def spoil(found):
        del found["model.vqmodel.quant_conv.bias"]
        found["model.vqmodel.quantize.ema"] = torch.zeros(3)

    def sink(folder):
        return make_sink("hf", open_source("hf", folder, Options()).description, Options())

    with pytest.raises(ValueError, match=r"1 missing: model.vqmodel.quant_conv.bias; 1 unknown: .*quantize.ema"):
        sink(changed(spoil))
    shutil.rmtree(tmp_path / "changed")
    with pytest.raises(
        ValueError, match=r"has 8192 codes on a grid of \(16, 16\), the checkpoint's vocabulary 8192 on"
    ):
        sink(changed(vq_config={**VQ, "resolution": 32}))
    shutil.rmtree(tmp_path / "changed")
    large = {"num_res_blocks": 10**7}, {"base_channels": 2**62}, {"channel_multiplier": [2.0]}
    for wrong in ({**VQ, "base_channels": "many"}, [["resolution", 64]], *({**VQ, **more} for more in large)):
        with pytest.raises(ValueError, match=r"vq_config is not that of a VQ-GAN"):
            sink(changed(vq_config=wrong))
        shutil.rmtree(tmp_path / "changed")


def test_what_is_written_last_is_looked_at_first(release, changed, tmp_path):
    folder = changed()
    (folder / "generation_config.json").write_text("[2]")
    with pytest.raises(ValueError, match=r"generation_config.json: holds no settings"):
        convert_checkpoint(("hf", "hf"), folder, tmp_path / "again")
    shutil.copyfile(release / "tokenizer.json", folder / "tokenizer.json")
    (folder / "generation_config.json").unlink()
    again = convert_checkpoint(("hf", "hf"), folder, tmp_path / "again")  # without tokenizer_config.json
    assert json.loads((again / "processor_config.json").read_text())["image_token"] == "<image>"
    assert json.loads((again / "generation_config.json").read_text())["eos_token_id"] == 2


def test_pickled_weights_are_refused_unopened(release, tmp_path):
    shutil.copyfile(release / "config.json", tmp_path / "config.json")
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/executed'\ntR.")
    with pytest.raises(ValueError, match=r"pickles \(pytorch_model-00001-of-00002.bin\).*only safetensors are read"):
        open_source("hf", tmp_path, Options())


def test_another_width_of_heads_is_refused(changed):
    with pytest.raises(ValueError, match=r"head_dim=8, but 32 / 8 in Chameleon"):
        open_source("hf", changed(head_dim=8), Options())


def test_a_decoder_that_comes_along_is_shipped_and_carried_on(release, tmp_path):
    """Made of an encoder and decoder as in vqgan.ckpt."""
    from megachameleon.tokens.vq.quantizer import Codebook
    from megachameleon.tokens.vq.tokenizer import save_image_tokenizer
    from megachameleon.tokens.vq.vqgan import CODEBOOK_TENSOR, VQGAN

    found = {n.removeprefix("model.vqmodel."): t.float() for n, t in tensors_of(release).items() if "vqmodel" in n}
    codebook, network = Codebook(8192, 8), VQGAN(SHAPE)
    codebook.codes.copy_(found.pop(CODEBOOK_TENSOR))
    missing, unknown = network.load_state_dict(found, strict=False)
    assert not unknown and all(name.startswith("decoder.") for name in missing)
    (tmp_path / "image").mkdir()
    save_image_tokenizer(tmp_path / "image", SHAPE, network, codebook, {})
    first = convert_checkpoint(("hf", "hf"), release, tmp_path / "first", image_tokenizer=tmp_path / "image")
    again = convert_checkpoint(("hf", "hf"), first, tmp_path / "again")
    assert ImageTokenizer.load(again / "image_tokenizer").can_decode
    codes = torch.arange(1024)[None]
    drawn = (ImageTokenizer.load(f / "image_tokenizer").decode(codes) for f in (first, again))
    assert torch.equal(*drawn)
    names = load_file(again / "model.safetensors").keys()
    assert not any(".decoder." in name for name in names)
    source = open_source("hf", again, Options())
    assert make_sink("hf", source.description, Options()).notes == ()
