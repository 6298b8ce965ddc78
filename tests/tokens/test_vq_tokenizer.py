import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from megachameleon.files import sha256_of
from megachameleon.tokens.vq import ImageTokenizer
from megachameleon.tokens.vq.network import PatchAutoencoder, PatchConfig
from megachameleon.tokens.vq.quantizer import Codebook
from megachameleon.tokens.vq.tokenizer import PATCH_BATCH, flatten, save_image_tokenizer, to_float, to_uint8, unflatten
from megachameleon.tokens.vq.vqgan import VQGAN, VQGANConfig

CONFIG = PatchConfig(
    image_size=16, grid=4, code_dim=8, fine_channels=8, coarse_channels=8, encoder_blocks=1, decoder_blocks=1
)

VQGAN_CONFIG = VQGANConfig(
    image_size=16,
    base_channels=32,
    channel_multipliers=(1, 1),
    num_res_blocks=1,
    latent_channels=8,
    code_dim=8,
    num_codes=12,
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


@pytest.fixture(params=["patch", "vqgan"])
def any_folder(request, tmp_path):
    torch.manual_seed(0)
    config, network = (
        (CONFIG, PatchAutoencoder(CONFIG)) if request.param == "patch" else (VQGAN_CONFIG, VQGAN(VQGAN_CONFIG))
    )
    codebook = Codebook(12, config.code_dim)
    codebook.codes.normal_(std=0.1)
    save_image_tokenizer(tmp_path, config, network, codebook, {})
    return tmp_path


def test_codes_do_not_depend_on_the_company(any_folder):
    tokenizer = ImageTokenizer.load(any_folder)
    pictures = torch.randint(0, 256, (PATCH_BATCH + 2, 3, 16, 16), dtype=torch.uint8)
    together = tokenizer.encode(pictures)
    assert len(together.unique()) > 3
    assert torch.equal(together, torch.cat([tokenizer.encode(picture[None]) for picture in pictures]))
    assert torch.equal(together.flip(0), tokenizer.encode(pictures.flip(0)))


def test_a_vqgan_takes_few_pictures_at_once_on_a_cpu(any_folder):
    network = json.loads((any_folder / "image_tokenizer.json").read_text())["network"]
    assert ImageTokenizer.load(any_folder).encode_batch == {"patch": PATCH_BATCH, "vqgan": 1}[network]


def test_both_networks_draw_what_they_are_told(any_folder):
    tokenizer = ImageTokenizer.load(any_folder)
    codes = torch.randint(0, 12, (3, tokenizer.codes_per_image))
    pictures = tokenizer.decode(codes)
    assert tokenizer.can_decode and pictures.shape == (3, 3, 16, 16) and pictures.dtype == torch.uint8
    assert torch.equal(pictures[1:2], tokenizer.decode(codes[1:2])) and not torch.equal(pictures[0], pictures[1])


def test_folders_from_before_precisions_are_read_alike(folder):
    path = folder / "image_tokenizer.json"
    pictures = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    codes = ImageTokenizer.load(folder).encode(pictures)
    header = json.loads(path.read_text())
    assert header.pop("precision") == "fp32" and header.pop("can_decode") is True
    path.write_text(json.dumps(header))
    old = ImageTokenizer.load(folder)
    assert (old.precision, old.can_decode) == ("fp32", True) and torch.equal(old.encode(pictures), codes)


def test_bf16_is_near_fp32_and_another_tokenizer(any_folder):
    exact = ImageTokenizer.load(any_folder)
    path = any_folder / "image_tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"precision": "bf16"}))
    low = ImageTokenizer.load(any_folder)
    assert (exact.precision, low.precision) == ("fp32", "bf16") and low.fingerprint != exact.fingerprint
    pictures = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    codes = exact.encode(pictures)
    assert 0.8 < (low.encode(pictures) == codes).float().mean() < 1
    assert (low.decode(codes).float() - exact.decode(codes).float()).abs().mean() < 2


def test_tf32_is_off_while_it_computes_and_as_it_was_afterwards(folder, monkeypatch):
    seen = []

    def watch(self, pixels):
        seen.append((torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
        return encode(self, pixels)

    encode = PatchAutoencoder.encode
    monkeypatch.setattr(PatchAutoencoder, "encode", watch)
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    ImageTokenizer.load(folder).encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    assert seen == [("ieee", "ieee")] and before[0] == "tf32"
    assert (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "fp8"}, "precision 'fp8' is unknown"),
        ({"network": "other"}, "network 'other' is unknown"),
        ({"network": "vqgan"}, "does not describe"),
        ({"num_codes": 13}, "not the weights"),
        ({"num_codes": 10**15}, "not the weights"),
        ({"config": asdict(CONFIG) | {"code_dim": 9}}, "not the weights"),
    ],
)
def test_headers_that_do_not_fit_are_refused(folder, change, message):
    path = folder / "image_tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        ImageTokenizer.load(folder)


def test_weights_of_another_dtype_are_refused(folder):
    weights, path = folder / "image_tokenizer.safetensors", folder / "image_tokenizer.json"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights)
    header = json.loads(path.read_text()) | {"weights_sha256": sha256_of(weights)}
    path.write_text(json.dumps(header))
    with pytest.raises(ValueError, match="not all of them are fp32"):
        ImageTokenizer.load(folder)
