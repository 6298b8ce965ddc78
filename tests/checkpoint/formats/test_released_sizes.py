"""The published models at their full size: what files would hold, without writing any."""

import math
from dataclasses import asdict

import pytest
import torch

from megachameleon.checkpoint.formats.plain import Description, plain_shapes
from megachameleon.checkpoint.formats.registry import Options, make_sink
from megachameleon.config import load_config
from megachameleon.tokens.vocabulary import Vocabulary

PARAMETERS = {"7b": 7_013_158_912, "34b": 34_293_522_432}
SHARD_OF_34B = {
    "tok_embeddings.weight": (65536, 2048),
    "layers.47.attention.wq.weight": (2048, 8192),
    "layers.47.attention.wk.weight": (256, 8192),
    "layers.47.attention.wv.weight": (256, 8192),
    "layers.47.attention.wo.weight": (8192, 2048),
    "layers.47.attention.q_normalization.weight": (128,),
    "layers.47.attention.q_normalization.bias": (128,),
    "layers.47.attention.k_normalization.weight": (128,),
    "layers.47.attention.k_normalization.bias": (128,),
    "layers.47.feed_forward.w1.weight": (5504, 8192),
    "layers.47.feed_forward.w3.weight": (5504, 8192),
    "layers.47.feed_forward.w2.weight": (8192, 5504),
    "layers.47.attention_norm.weight": (8192,),
    "layers.47.ffn_norm.weight": (8192,),
    "norm.weight": (8192,),
    "output.weight": (16384, 8192),
}


@pytest.fixture(params=PARAMETERS)
def size(request):
    return request.param


@pytest.fixture
def described(size, tmp_path):
    return Description(
        model=load_config(f"chameleon_{size}", []).model,
        dtype=torch.bfloat16,
        origin=tmp_path,
        identity="x",
        vocabulary=asdict(Vocabulary()),
        tokenizers={"text": None, "image": None},
        lineage={"datasets": {}, "parent": None, "starts": []},
    )


def count(shapes):
    return sum(math.prod(shape) for shape in shapes)


def test_parameters(size, described):
    shapes = plain_shapes(described.model)
    assert count(shapes.values()) == described.model.num_parameters == PARAMETERS[size]
    assert len(shapes) == {"7b": 419, "34b": 627}[size]


def test_metas_files(size, described):
    files = make_sink("meta", described, Options()).files()
    shards = {"7b": 1, "34b": 4}[size]
    ranks = [f"consolidated.{rank:02}.pth" for rank in range(shards)]
    assert [file.name for file in files] == (ranks if shards > 1 else ["consolidated.pth"])
    for file in files:
        shapes = {piece.name: tuple(piece.shape) for piece in file.pieces}
        assert shapes.pop("rope.freqs") == (64,)
        assert len(shapes) == {"7b": 419, "34b": 627}[size]
        if size == "34b":
            assert SHARD_OF_34B.items() <= shapes.items()
            names = {name.replace("layers.47.", "") for name in SHARD_OF_34B}
            assert {name.split(".", 2)[2] if name.startswith("layers.") else name for name in shapes} == names
        once = [shape for name, shape in shapes.items() if "norm.weight" in name]  # norms of blocks are in every file
        assert PARAMETERS[size] == shards * (count(shapes.values()) - count(once)) + count(once)


def test_hugging_faces_files(size, described):
    files = make_sink("hf", described, Options()).files()
    pieces = {piece.name: piece.shape for file in files for piece in file.pieces}
    assert len(pieces) == {"7b": 419, "34b": 627}[size]
    heads, keys = {"7b": (32, 32), "34b": (64, 8)}[size]
    attention = "model.layers.31.self_attn"
    assert (pieces[f"{attention}.q_norm.bias"], pieces[f"{attention}.k_norm.bias"]) == ((heads, 128), (keys, 128))
    assert len(files) == {"7b": 3, "34b": 15}[size]  # the released 34B has 15, of 5 GB each
    assert max(file.num_bytes for file in files) <= 5e9
