import json

import pytest
import torch

from megachameleon.tokens.vq import ImageTokenizer
from megachameleon.tokens.vq.network import PatchAutoencoder, PatchConfig
from megachameleon.tokens.vq.quantizer import Codebook
from megachameleon.tokens.vq.tokenizer import PATCH_BATCH, flatten, save_image_tokenizer, to_float, to_uint8, unflatten

CONFIG = PatchConfig(
    image_size=16, grid=4, code_dim=8, fine_channels=8, coarse_channels=8, encoder_blocks=1, decoder_blocks=1
)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    codebook = Codebook(12, CONFIG.code_dim)
    codebook.codes.normal_()
    save_image_tokenizer(tmp_path, CONFIG, PatchAutoencoder(CONFIG), codebook, {"seed": 0})
    return tmp_path


def test_codes_and_pictures_have_the_promised_form(folder):
    tokenizer = ImageTokenizer.load(folder)
    assert (tokenizer.image_size, tokenizer.grid, tokenizer.num_codes) == (16, (4, 4), 12)
    pictures = torch.randint(0, 256, (PATCH_BATCH + 3, 3, 16, 16), dtype=torch.uint8)
    codes = tokenizer.encode(pictures)
    assert codes.dtype == torch.int64 and codes.shape == (PATCH_BATCH + 3, 16)
    assert len(codes.unique()) > 1
    decoded = tokenizer.decode(codes)
    assert decoded.dtype == torch.uint8 and decoded.shape == pictures.shape
    assert (tokenizer.encode(pictures) == codes).all() and (tokenizer.decode(codes) == decoded).all()
    assert (tokenizer.encode(pictures[:1]) == codes[:1]).all()
    assert tokenizer.encode(pictures[:0]).shape == (0, 16) and tokenizer.decode(codes[:0]).shape == (0, 3, 16, 16)


def test_codes_are_in_raster_order(folder):
    tokenizer = ImageTokenizer.load(folder)
    codes = torch.zeros(1, 16, dtype=torch.int64)
    base = tokenizer.decode(codes).float()
    codes[0, 1 * 4 + 3] = 5  # row 1, column 3
    change = (tokenizer.decode(codes).float() - base).abs().sum(1)[0]
    patches = change.view(4, 4, 4, 4).sum((1, 3))
    assert divmod(int(patches.argmax()), 4) == (1, 3)


def test_nearest_is_the_smallest_euclidean_distance():
    torch.manual_seed(0)
    codebook, vectors = Codebook(20, 6), torch.randn(50, 6)
    codebook.codes.normal_()
    assert (codebook.nearest(vectors) == torch.cdist(vectors, codebook.codes).argmin(1)).all()


def test_flatten_and_unflatten_are_inverse():
    vectors = torch.randn(2, 5, 3, 4)
    assert torch.equal(unflatten(flatten(vectors), (3, 4)), vectors)
    assert torch.equal(flatten(vectors)[1 * 12 + 2 * 4 + 1], vectors[1, :, 2, 1])


def test_pixels_round_trip():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_wrong_pictures_and_codes_are_refused(folder):
    tokenizer = ImageTokenizer.load(folder)
    with pytest.raises(ValueError, match=r"uint8 \[B, 3, 16, 16\]"):
        tokenizer.encode(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="shape"):
        tokenizer.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expected"):
        tokenizer.decode(torch.zeros(1, 15, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"outside 0\.\.11"):
        tokenizer.decode(torch.full((1, 16), 12))


def test_fingerprint_follows_the_weights_and_not_the_provenance(folder):
    first = ImageTokenizer.load(folder).fingerprint
    header = json.loads((folder / "image_tokenizer.json").read_text())
    header["provenance"] = {"seed": 1}
    (folder / "image_tokenizer.json").write_text(json.dumps(header))
    assert ImageTokenizer.load(folder).fingerprint == first
    codebook = Codebook(12, CONFIG.code_dim)
    save_image_tokenizer(folder, CONFIG, PatchAutoencoder(CONFIG), codebook, {})
    assert ImageTokenizer.load(folder).fingerprint != first


def test_damaged_folders_are_refused(folder, tmp_path_factory):
    with pytest.raises(ValueError, match="no such file"):
        ImageTokenizer.load(tmp_path_factory.mktemp("empty"))
    weights = folder / "image_tokenizer.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="does not match"):
        ImageTokenizer.load(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"safetensors: no such file"):
        ImageTokenizer.load(folder)
    weights.write_bytes(whole)
    (folder / "image_tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match="does not describe"):
        ImageTokenizer.load(folder)


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="image_size=60 is not a multiple of twice grid=8; take 48 or 64"):
        PatchConfig(image_size=60, grid=8)
    with pytest.raises(ValueError, match="code_dim=0"):
        PatchConfig(code_dim=0)
