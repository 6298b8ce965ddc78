"""Our checkpoints as transformers loads them: the same logits, the right ids, tokenizer and pictures beside them."""

import json
import shutil

import pytest
import torch
from converting import CASES, VOCABULARY, convert_checkpoint, save_filled, tensors_of
from plain_weights import draw, draw_tokens, huggingface_state, run_decoder
from safetensors.torch import load_file, save_file

from megachameleon.checkpoint.formats.huggingface.pictures import open_picture_encoder
from megachameleon.config import load_config
from megachameleon.tokens.vocabulary import Vocabulary

transformers = pytest.importorskip("transformers", reason="an oracle of the tests only")


def huggingface_logits(folder, tokens):
    model = transformers.ChameleonForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        return model.model(input_ids=tokens, use_cache=False).last_hidden_state @ model.lm_head.weight.T


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    """Overrides, weights, our logits, and the exported folder."""
    folder = tmp_path_factory.mktemp("export")
    overrides = CASES[request.param]
    model = load_config("debug", overrides).model
    weights = draw(model)
    ours = run_decoder(overrides, weights)
    source = save_filled(overrides, weights, folder / "ours")
    hf = convert_checkpoint(("megatron", "hf"), source, folder / "hf", shard_bytes=300_000)
    return model, weights, ours, hf


def test_logits(exported):
    model, _, ours, folder = exported
    assert 0.5 < ours.std() < 2
    torch.testing.assert_close(huggingface_logits(folder, draw_tokens(model)), ours, rtol=0, atol=1e-5)


def test_many_files_are_found_by_the_index(exported):
    index = json.loads((exported[3] / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in exported[3].glob("*.safetensors"))
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(exported[3]).values())


def test_every_weight_stands_where_transformers_wants_it(exported):
    model, weights, _, folder = exported
    expected, found = huggingface_state(weights, model), tensors_of(folder)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_ids_and_settings(exported):
    model, _, _, folder = exported
    config = transformers.ChameleonConfig.from_pretrained(folder)
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (0, 1, 2)
    assert (config.model_parallel_size, config.swin_norm) == (model.qk_norm_groups, model.norm_order == "swin")
    assert config.rope_parameters["rope_theta"] == 10_000.0 and config.rms_norm_eps == 1e-5
    assert config.vocabulary_map["IMGIMGBFZ"] == VOCABULARY.image_code_start + 15
    assert config.vocabulary_map["<racm3:break>"] == VOCABULARY.begin_image and config.dtype == torch.float32
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert (generation.bos_token_id, generation.pad_token_id, generation.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize("wrong", ["averaged", "not permuted"])
def test_wrong_qk_norms_miss(exported, wrong, tmp_path):
    """What the logits of a converter with a known fault would be, so the comparison above can fail."""
    model, _, ours, folder = exported
    if wrong == "averaged" and model.qk_norm_groups == 1:
        pytest.skip("one group is its own average")
    broken = shutil.copytree(folder, tmp_path / "broken")
    for path in broken.glob("*.safetensors"):
        tensors = load_file(path)
        for name in (name for name in tensors if "q_norm" in name or "k_norm" in name):
            rows = tensors[name]
            pairs = rows.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
            tensors[name] = (rows.mean(0, keepdim=True).expand_as(rows) if wrong == "averaged" else pairs).contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
    assert (huggingface_logits(broken, draw_tokens(model)) - ours).abs().max() > 0.1


@pytest.fixture(scope="module")
def image_tokenizer(tmp_path_factory):
    """A VQ-GAN with a square grid of 4 x 4 codes of 24."""
    from megachameleon.tokens.vq.quantizer import Codebook
    from megachameleon.tokens.vq.tokenizer import save_image_tokenizer
    from megachameleon.tokens.vq.vqgan import VQGAN, VQGANConfig

    config = VQGANConfig(
        image_size=8, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, latent_channels=8, code_dim=8,
        num_codes=24,
    )  # fmt: skip
    torch.manual_seed(0)
    codebook = Codebook(24, 8)
    codebook.codes.copy_(torch.randn(24, 8) * 0.2)
    folder = tmp_path_factory.mktemp("image")
    save_image_tokenizer(folder, config, VQGAN(config), codebook, {})
    return folder


def test_pictures_get_the_same_codes(image_tokenizer, tmp_path, monkeypatch):
    """transformers' own encoder from the export, in fp32 although the decoder is bf16."""
    import converting

    from megachameleon.tokens.vq import ImageTokenizer

    vocabulary = Vocabulary.compact(num_text_ids=80, num_image_codes=24, image_grid=(4, 4))
    assert vocabulary.size == 128
    monkeypatch.setattr(converting, "VOCABULARY", vocabulary)
    ours = ImageTokenizer.load(image_tokenizer)
    monkeypatch.setitem(converting.TOKENIZERS, "image", ours.fingerprint)
    overrides = CASES["swin, 4 groups"]
    source = save_filled(overrides, draw(load_config("debug", overrides).model), tmp_path / "ours")
    hf = convert_checkpoint(("megatron", "hf"), source, tmp_path / "hf", image_tokenizer=image_tokenizer, dtype="bf16")
    pictures = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    theirs = transformers.ChameleonForConditionalGeneration.from_pretrained(hf, dtype=torch.float32)
    found = theirs.model.get_image_tokens(pictures.float() / 127.5 - 1)
    assert torch.equal(found.long(), ours.encode(pictures) + vocabulary.image_code_start)
    beside = ImageTokenizer.load(hf / "image_tokenizer")
    assert beside.can_decode and beside.fingerprint == ours.fingerprint
    with pytest.raises(ValueError, match="is another image tokenizer"):
        open_picture_encoder(image_tokenizer, vocabulary, "of the data")
    again = convert_checkpoint(("hf", "hf"), hf, tmp_path / "again")
    assert tensors_of(again).keys() == tensors_of(hf).keys()
    assert ImageTokenizer.load(again / "image_tokenizer").fingerprint == ours.fingerprint
    assert json.loads((again / "config.json").read_text()) == json.loads((hf / "config.json").read_text())


def test_files_with_another_picture_encoder_are_not_gone_on_with(image_tokenizer, tmp_path, monkeypatch):
    """Of the same shape; else there would be a part of each in one export."""
    import converting

    from megachameleon.checkpoint.formats import conversion

    vocabulary = Vocabulary.compact(num_text_ids=80, num_image_codes=24, image_grid=(4, 4))
    monkeypatch.setattr(converting, "VOCABULARY", vocabulary)
    monkeypatch.setattr(converting, "TOKENIZERS", {"text": None, "image": None})
    overrides = CASES["pre-norm, 1 group"]
    source = save_filled(overrides, draw(load_config("debug", overrides).model), tmp_path / "run")
    other = shutil.copytree(image_tokenizer, tmp_path / "other")
    with monkeypatch.context() as broken, pytest.raises(OSError, match="broken"):
        broken.setattr(conversion, "_complete", lambda *_: (_ for _ in ()).throw(OSError(5, "broken")))
        convert_checkpoint(("megatron", "hf"), source, tmp_path / "hf", image_tokenizer=image_tokenizer)
    with pytest.raises(ValueError, match="was left by another conversion to hf"):
        convert_checkpoint(("megatron", "hf"), source, tmp_path / "hf", image_tokenizer=other)
    convert_checkpoint(("megatron", "hf"), source, tmp_path / "hf", image_tokenizer=image_tokenizer)


def test_pictures_of_another_vocabulary_are_refused(image_tokenizer, exported, tmp_path):
    """The checkpoint's has 16 codes on a grid of 2 x 4."""
    source = exported[3].parent / "ours"
    with pytest.raises(ValueError, match=r"has 24 codes on a grid of \(4, 4\), the checkpoint's vocabulary 16"):
        convert_checkpoint(("megatron", "hf"), source, tmp_path / "hf", image_tokenizer=image_tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_the_small_network_of_patches_goes_along_for_drawing(tmp_path, monkeypatch):
    """transformers cannot make codes with it, but codes that a model is given and writes are made and drawn by it."""
    import converting

    from megachameleon.checkpoint.formats.registry import Options, make_sink, open_source
    from megachameleon.tokens.vq import ImageTokenizer
    from megachameleon.tokens.vq.network import PatchAutoencoder, PatchConfig
    from megachameleon.tokens.vq.quantizer import Codebook
    from megachameleon.tokens.vq.tokenizer import save_image_tokenizer

    config = PatchConfig(image_size=16, grid=4, code_dim=8)
    codebook = Codebook(24, 8)
    (tmp_path / "image").mkdir()
    save_image_tokenizer(tmp_path / "image", config, PatchAutoencoder(config), codebook, {})
    monkeypatch.setattr(
        converting, "VOCABULARY", Vocabulary.compact(num_text_ids=80, num_image_codes=24, image_grid=(4, 4))
    )
    monkeypatch.setitem(converting.TOKENIZERS, "image", ImageTokenizer.load(tmp_path / "image").fingerprint)
    overrides = [*CASES["pre-norm, 1 group"], f"data.image_tokenizer={tmp_path / 'image'}"]
    source = save_filled(overrides, draw(load_config("debug", overrides).model), tmp_path / "ours")
    hf = convert_checkpoint(("megatron", "hf"), source, tmp_path / "hf")
    again = convert_checkpoint(("hf", "hf"), hf, tmp_path / "again")
    assert ImageTokenizer.load(again / "image_tokenizer").can_decode
    assert not any("vqmodel" in name for name in tensors_of(again))
    assert not (again / "preprocessor_config.json").exists()
    notes = make_sink("hf", open_source("hf", again, Options()).description, Options()).notes
    assert any("small network of patches, which lies in image_tokenizer/" in note for note in notes)
