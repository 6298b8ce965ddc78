from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from megachameleon.generation.prompts import Prompt, encode_prompt, read_prompts, require_fits
from megachameleon.generation.settings import GenerationSettings


class Texts:
    def encode(self, text):
        return [15 + ord(c) - ord("a") for c in text]


class Pictures:
    image_size = 4

    def encode(self, pictures):
        assert pictures.shape == (1, 3, 4, 4)
        return torch.arange(6)[None] + (pictures[:, 0, 0, :1] > 0)


def test_prompts_of_both_modalities(vocabulary, tmp_path):
    Image.fromarray(np.full((5, 7, 3), 255, dtype=np.uint8)).save(tmp_path / "a.png")
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"segments": [{"text": "ab"}, {"image": "a.png"}, {"text": "c"}]}\n\n{"text": "z"}\n')
    first, second = read_prompts(file)
    ids = encode_prompt(first, vocabulary, Texts(), Pictures())
    assert ids == [vocabulary.bos, 15, 16, *vocabulary.encode_image(np.arange(1, 7)).tolist(), 17]
    assert encode_prompt(second, vocabulary, Texts(), None) == [vocabulary.bos, 40]
    assert second.origin == f"{file}:3"


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"segments": [{"sound": "x"}]}', '{"segments": [{"text": 3}]}', "{}"]
)
def test_lines_that_are_no_prompts_are_named(tmp_path, line):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"prompts.jsonl:2: not a prompt"):
        read_prompts(file)


def test_files_that_are_no_prompts(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_prompts(tmp_path / "prompts.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no prompts"):
        read_prompts(tmp_path / "empty.jsonl")


def test_pictures_that_cannot_be_read(vocabulary, tmp_path):
    prompt = Prompt(segments=(tmp_path / "a.png",), origin="--image")
    with pytest.raises(ValueError, match=r"a\.png: no such picture"):
        encode_prompt(prompt, vocabulary, Texts(), Pictures())
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"a\.png"):
        encode_prompt(prompt, vocabulary, Texts(), Pictures())
    with pytest.raises(ValueError, match="--image-tokenizer"):
        encode_prompt(prompt, vocabulary, Texts(), None)


def test_prompts_must_fit(vocabulary):
    prompt = Prompt(segments=("a",), origin="line 1")
    settings = GenerationSettings(modality="image")
    require_fits([prompt], [[0] * 4], 12, settings, vocabulary)
    with pytest.raises(ValueError, match="line 1: 5 ids leave no room for 8"):
        require_fits([prompt], [[0] * 5], 12, settings, vocabulary)
    for enough in (8, None):
        require_fits([prompt], [[0]], 12, replace(settings, max_new_tokens=enough), vocabulary)
    with pytest.raises(ValueError, match="--max-new-tokens: 7 is less than the 8 ids of a picture; give at least 8"):
        require_fits([prompt], [[0]], 12, replace(settings, max_new_tokens=7), vocabulary)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
def test_impossible_scales_are_refused(scale):
    for name in ("guidance", "image_guidance"):
        with pytest.raises(ValueError, match=f"^{name}={scale} must be a number of at least 0"):
            GenerationSettings(**{name: scale})
