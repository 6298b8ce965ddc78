"""What transformers makes of an export through its own processor: our ids, our codes, our logits, and answers."""

import json
import re
from pathlib import Path

import converting
import numpy as np
import pytest
import torch
from cases import parallel_context
from converting import convert_checkpoint, save_filled
from PIL import Image
from plain_weights import build_filled, decoder_logits, draw
from release_files import write_release

from megachameleon.config import load_config
from megachameleon.tokens.pictures import prepare_picture
from megachameleon.tokens.text.importing import import_text_tokenizer
from megachameleon.tokens.text.training import train_text_tokenizer
from megachameleon.tokens.vocabulary import Vocabulary
from megachameleon.tokens.vq import ImageTokenizer
from megachameleon.tokens.vq.quantizer import Codebook
from megachameleon.tokens.vq.tokenizer import flatten, save_image_tokenizer
from megachameleon.tokens.vq.vqgan import VQGAN, VQGANConfig

transformers = pytest.importorskip("transformers", reason="an oracle of the tests only")

COMPACT = Vocabulary.compact(num_text_ids=357, num_image_codes=24, image_grid=(4, 4))
SIZE = ["model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_layers=2", "model.norm_order=swin"]
HEADS = ["model.num_attention_heads=8", "model.num_query_groups=2", "model.qk_norm_groups=2"]
PROMPT = "Look: <image> what is it?"
LAST = 4
"""Positions whose logits are compared."""


class Export:
    """A checkpoint of ours with its tokenizers, what it was exported to, and both as their libraries load them."""

    def __init__(self, vocabulary, text, image, folder):
        self.vocabulary, self.text, self.image = vocabulary, text, image
        overrides = [*SIZE, *HEADS, f"model.vocab_size={vocabulary.size}"]
        self.weights, self.config = draw(load_config("debug", overrides).model), load_config("debug", overrides)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(converting, "VOCABULARY", vocabulary)
            patch.setattr(converting, "TOKENIZERS", {"text": text.fingerprint, "image": image.fingerprint})
            ours = save_filled(overrides, self.weights, folder / "ours")
        self.folder = convert_checkpoint(
            ("megatron", "hf"), ours, folder / "hf", tokenizer=folder / "text", image_tokenizer=folder / "image"
        )
        self.processor = transformers.AutoProcessor.from_pretrained(self.folder)
        self.model = transformers.ChameleonForConditionalGeneration.from_pretrained(self.folder, dtype=torch.float32)

    def ids(self, before, codes, after):
        """What our own prompt would be: int64 [n]."""
        picture = self.vocabulary.encode_image(codes).tolist()
        return [self.vocabulary.bos, *self.text.encode(before), *picture, *self.text.encode(after)]

    def our_logits(self, ids):
        """Of the last positions, behind the picture."""
        with parallel_context(self.config.parallel) as context, torch.no_grad():
            decoder = build_filled(self.config, context, self.weights)
            return decoder_logits(decoder, torch.tensor([ids]))[:, -LAST:].clone()


def make_image_tokenizer(folder, *, image_size, num_codes):
    config = VQGANConfig(
        image_size=image_size, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, latent_channels=8,
        code_dim=8, num_codes=num_codes,
    )  # fmt: skip
    torch.manual_seed(0)
    network, codebook = VQGAN(config).eval(), Codebook(num_codes, 8)
    some = torch.rand(num_codes // config.grid**2 + 1, 3, image_size, image_size) * 2 - 1
    with torch.no_grad():  # codes are what pictures become, so that many are in use
        codebook.codes.copy_(flatten(network.encode(some))[:num_codes])
    folder.mkdir()
    save_image_tokenizer(folder, config, network, codebook, {})
    return ImageTokenizer.load(folder)


@pytest.fixture(scope="module", params=["compact", "release"])
def export(request, tmp_path_factory):
    """Of a vocabulary without reserved ids, and of Chameleon's own with its byte-level text and 1,024 codes."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "compact":
        texts = [path.read_text() for path in sorted(Path(re.__file__).parent.glob("*.py"))]
        text = train_text_tokenizer(texts, COMPACT, folder / "text")
        return Export(COMPACT, text, make_image_tokenizer(folder / "image", image_size=8, num_codes=24), folder)
    text = import_text_tokenizer(write_release(folder / "text_tokenizer.json"), folder / "text")
    return Export(Vocabulary(), text, make_image_tokenizer(folder / "image", image_size=64, num_codes=8192), folder)


@pytest.fixture(scope="module")
def picture(export):
    """Twice as large as the tokenizer's, and transparent in a corner."""
    size = 2 * export.image.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[: size // 2, : size // 2, 3] = 0
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def codes(export, picture):
    return export.image.encode(prepare_picture(picture, export.image.image_size)[None])[0]


def test_ids_of_text_and_pictures(export, picture, codes):
    """The separator ends a turn unless the text is to be gone on with."""
    found = export.processor(text=PROMPT, images=[picture], return_for_text_completion=True)
    ids = found["input_ids"][0].tolist()
    expected = export.ids("Look: ", np.zeros_like(codes), " what is it?")
    placeholder = {COMPACT.size: COMPACT.unk, 65536: 8711}[export.vocabulary.size]
    first = expected.index(export.vocabulary.begin_image) + 1
    expected[first : first + len(codes)] = [placeholder] * len(codes)
    assert ids == expected
    turn = export.processor(text=PROMPT, images=[picture])["input_ids"][0].tolist()
    assert turn == [*expected, export.vocabulary.turn_separator]
    assert export.processor.decode(turn, skip_special_tokens=True) == "Look:  what is it?"


def test_pictures_get_our_codes_and_logits(export, picture, codes):
    vocabulary = export.vocabulary
    inputs = export.processor(text=PROMPT, images=[picture], return_for_text_completion=True)
    ids = export.ids("Look: ", codes, " what is it?")
    with torch.no_grad():
        assert torch.equal(
            export.model.get_image_tokens(inputs["pixel_values"])[0].long(), codes + vocabulary.image_code_start
        )
        theirs = export.model(**inputs, logits_to_keep=LAST).logits
    ours = export.our_logits(ids)
    kept = ~vocabulary.is_image_code(torch.arange(vocabulary.size))  # transformers hides the others
    assert 0.5 < ours.std() < 2 and len(set(codes.tolist())) > 8
    torch.testing.assert_close(theirs[..., kept], ours[..., kept], rtol=0, atol=1e-5)
    other = export.our_logits(export.ids("Look: ", codes.flip(0), " what is it?"))
    assert (other - ours)[:, -1, kept].abs().max() > 1e-3  # the picture shows in what follows it


def test_generating_goes_on_from_a_picture(export, picture, codes):
    inputs = export.processor(text=PROMPT, images=[picture])
    made = export.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)[0, -3:].tolist()
    ids = [*export.ids("Look: ", codes, " what is it?"), export.vocabulary.turn_separator]
    kept = ~export.vocabulary.is_image_code(torch.arange(export.vocabulary.size))
    kept[export.vocabulary.eos] = False  # at least three
    for _ in range(3):
        ids.append(export.our_logits(ids)[0, -1].where(kept, -torch.inf).argmax().item())
    assert made == ids[-3:]


def test_a_batch_is_padded(export, picture):
    inputs = export.processor(text=[PROMPT, "No picture."], images=[picture], padding=True)
    assert inputs["input_ids"].shape[0] == 2 and inputs["input_ids"][1, -1] == export.vocabulary.pad


def test_pixels_are_metas(export, picture):
    size = export.image.image_size
    settings = json.loads((export.folder / "preprocessor_config.json").read_text())
    assert settings["size"] == {"shortest_edge": size} and settings["crop_size"] == {"height": size, "width": size}
    white = export.processor.image_processor(Image.new("RGB", (size, size), "white"))["pixel_values"]
    assert np.array(white).shape == (1, 3, size, size) and np.abs(np.array(white) - 1).max() < 1e-6


def test_codes_that_transformers_made_are_drawn_by_the_decoder_beside(export, picture, codes):
    """Those of a picture that it was given."""
    inputs = export.processor(text="<image>", images=[picture])
    ids = export.model.get_image_tokens(inputs["pixel_values"]).long()
    drawn = ImageTokenizer.load(export.folder / "image_tokenizer").decode(ids - export.vocabulary.image_code_start)
    assert torch.equal(drawn, export.image.decode(codes[None]))


def test_transformers_writes_the_codes_that_we_would(export):
    """As the guide has it: the head is applied outside, since `forward` hides picture codes. Here the likeliest."""
    saved = json.loads((export.folder / "megachameleon.json").read_text())["vocabulary"]
    vocabulary = Vocabulary.from_dict(saved, origin="megachameleon.json")
    tokenizer, model = export.processor.tokenizer, export.model
    step, past, codes = tokenizer(f"A cat{tokenizer.boi_token}", return_tensors="pt")["input_ids"], None, []
    ids = step[0].tolist()
    head = model.lm_head.weight[vocabulary.image_code_start : vocabulary.image_code_end]
    with torch.no_grad():
        for _ in range(4):
            output = model.model(input_ids=step, past_key_values=past, use_cache=True)
            past = output.past_key_values
            codes.append((output.last_hidden_state[:, -1] @ head.T).argmax(-1, keepdim=True))
            step = codes[-1] + vocabulary.image_code_start
    for code in torch.cat(codes, 1)[0].tolist():
        ours = export.our_logits(ids)[0, -1, vocabulary.image_code_start : vocabulary.image_code_end]
        assert code == ours.argmax()
        ids.append(code + vocabulary.image_code_start)


def test_a_model_in_bf16_has_exact_codes_when_its_encoder_is_read_again(export, picture, codes):
    """As the guide has it: transformers has one precision for all of a model."""
    from safetensors import safe_open

    model = transformers.ChameleonForConditionalGeneration.from_pretrained(export.folder, dtype=torch.bfloat16)
    encoder = model.model.vqmodel.float()
    for file in export.folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in (name for name in tensors.keys() if name.startswith("model.vqmodel.")):  # noqa: SIM118
                encoder.get_parameter(name.removeprefix("model.vqmodel.")).data.copy_(tensors.get_tensor(name))
    inputs = export.processor(text=PROMPT, images=[picture])
    assert torch.equal(
        model.get_image_tokens(inputs["pixel_values"])[0].long(), codes + export.vocabulary.image_code_start
    )
    assert model.generate(**inputs, max_new_tokens=1).shape[1] == inputs["input_ids"].shape[1] + 1


def test_a_text_may_be_ended_by_name(export):
    """What trainers of transformers do with each document."""
    tokenizer = export.processor.tokenizer
    ids = tokenizer(f"The end.{tokenizer.eos_token}")["input_ids"]
    assert ids == [export.vocabulary.bos, *export.text.encode("The end."), export.vocabulary.eos]
