"""What verification is made of: the tokens, weights that are there only while they are used, torch files."""

import pickle
import re

import pytest
import torch
from torch import nn

from megachameleon.checkpoint.verifying.streaming import streamed
from megachameleon.checkpoint.verifying.tokens import some_tokens
from megachameleon.checkpoint.verifying.torch_file import StoredTensors
from megachameleon.tokens.vocabulary import Vocabulary


def test_tokens_are_text_around_a_picture_with_all_control_ids():
    vocabulary = Vocabulary()
    tokens = some_tokens(vocabulary.size, vocabulary)
    assert tokens.shape == (2, 64) and len(tokens.unique()) == 128 - 3  # what surrounds a picture, and unk, come twice
    for row in tokens:
        begin, end = (row.tolist().index(i) for i in (vocabulary.begin_image, vocabulary.end_image))
        inside = torch.arange(64).gt(begin) & torch.arange(64).lt(end)
        assert torch.equal(vocabulary.is_image_code(row), inside) and inside.sum() > 20
    assert set(vocabulary.control_ids.values()) <= set(tokens.flatten().tolist())
    ends = {vocabulary.image_code_start, vocabulary.image_code_end - 1, vocabulary.text_start, vocabulary.size - 1}
    assert ends <= set(tokens.flatten().tolist())
    text = tokens[tokens >= vocabulary.text_start].sort().values
    assert text.diff().max() < 1.5 * vocabulary.num_text_ids / len(text)  # all over the text


@pytest.mark.parametrize(("vocabulary", "length", "columns"), [(None, 4096, 64), (Vocabulary(), 16, 16)])
def test_tokens_of_a_short_context_or_an_unknown_vocabulary(vocabulary, length, columns):
    tokens = some_tokens(65_536, vocabulary, length)
    assert tokens.shape == (2, columns) and tokens.min() == 0 and tokens.max() == 65_535
    assert torch.equal(tokens, some_tokens(65_536, vocabulary, length))


def test_only_the_part_that_runs_has_memory():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    had_memory = []

    def fill(name, part):
        had_memory.append([not layer.weight.is_meta for layer in model])
        for parameter in part.parameters():
            parameter.fill_(float(name) + 1 + 1e-4)

    x = torch.ones(1, 8)
    parts = {str(i): layer for i, layer in enumerate(model)}
    advanced = []
    with streamed(parts, fill, torch.device("cpu"), torch.bfloat16, lambda: advanced.append(1)) as outputs:
        result = model(x)
    assert had_memory == torch.eye(4).bool().tolist() and len(advanced) == 4
    assert all(parameter.is_meta for parameter in model.parameters())
    for i, output in enumerate(outputs):  # 1e-4 is rounded away
        x = (x.sum(-1, keepdim=True) + 1) * (i + 1) * torch.ones(8)
        torch.testing.assert_close(output, x, rtol=1e-6, atol=0)
    assert torch.equal(outputs[-1], result)
    model.to_empty(device="cpu")
    model(x)  # nothing is left of it
    assert len(outputs) == 4


def test_tensors_of_a_torch_file_are_read_from_their_places(tmp_path):
    whole = torch.randn(6, 8)
    state = {"bf16": torch.randn(3, 5).bfloat16(), "view": whole[1:4, ::2].T, "vector": whole[5], "no tensor": None}
    torch.save(state, tmp_path / "x.pth")
    file = StoredTensors(tmp_path / "x.pth")
    for name in ("bf16", "view", "vector"):
        assert torch.equal(file.read(name), state[name]) and file.read(name).dtype == state[name].dtype
    for name in ("no tensor", "other"):
        with pytest.raises(ValueError, match=rf"x\.pth: has no tensor {name}; "):
            file.read(name)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_hostile_and_damaged_torch_files_are_refused(tmp_path):
    path, touched = tmp_path / "x.pth", tmp_path / "touched"
    refused = rf"{re.escape(str(path))}: not a torch file of named tensors"
    torch.save({"a": Hostile(touched)}, path)
    with pytest.raises(ValueError, match=refused):
        StoredTensors(path)
    assert not touched.exists()
    path.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(ValueError, match=refused):
        StoredTensors(path)
    torch.save({"a": torch.ones(10_000)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="a is empty, or in torch's form before"):
        StoredTensors(path).read("a")
    torch.save({"a": torch.ones(10_000)}, path)
    file = StoredTensors(path)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(ValueError, match="a ends behind the end of the file"):
        file.read("a")
    with pytest.raises(ValueError, match=refused):
        StoredTensors(path)
