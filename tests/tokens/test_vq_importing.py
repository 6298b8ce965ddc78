"""Image tokenizers from Meta's and Hugging Face's files, damaged and malicious ones included."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from megachameleon.tokens.vq import ImageTokenizer
from megachameleon.tokens.vq.importing import import_image_tokenizer
from megachameleon.tokens.vq.vqgan import CODEBOOK_TENSOR, VQGAN, VQGANConfig

CONFIG = VQGANConfig(
    image_size=16,
    base_channels=32,
    channel_multipliers=(1, 1),
    num_res_blocks=1,
    latent_channels=8,
    code_dim=8,
    num_codes=24,
)


@pytest.fixture(scope="module")
def tensors():
    torch.manual_seed(0)
    return VQGAN(CONFIG).state_dict() | {CODEBOOK_TENSOR: torch.randn(24, 8) * 0.2}


@pytest.fixture
def meta(tmp_path, tensors):
    """A writer of a file as Meta's, changed as it is told."""

    def write(change=lambda state: None):
        state = dict(tensors) | {"loss.discriminator.main.0.weight": torch.zeros(3)}
        change(state)
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / "vqgan.ckpt")
        return tmp_path / "vqgan.ckpt"

    return write


def without_decoder(tensors, prefix="model.vqmodel."):
    return {prefix + name: tensor.clone() for name, tensor in tensors.items() if not name.startswith("decoder.")}


def convert(source, folder, **options):
    return import_image_tokenizer(source, folder, config=CONFIG, **options)


def pictures(count=3):
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_metas_file_makes_a_tokenizer_that_can_draw(meta, tmp_path, tensors):
    tokenizer = convert(meta(), tmp_path / "out")
    assert (tokenizer.image_size, tokenizer.grid, tokenizer.num_codes, tokenizer.can_decode) == (16, (8, 8), 24, True)
    network = VQGAN(CONFIG)
    network.load_state_dict({name: tensor for name, tensor in tensors.items() if name != CODEBOOK_TENSOR})
    with torch.no_grad():
        vectors = network.encode(pictures() / 127.5 - 1).permute(0, 2, 3, 1).reshape(3, -1, 8)
        codes = torch.cdist(vectors, tensors[CODEBOOK_TENSOR][None]).argmin(2)
        drawn = network.decode(tensors[CODEBOOK_TENSOR][codes].view(3, 8, 8, 8).permute(0, 3, 1, 2))
    assert (tokenizer.encode(pictures()) == codes).all() and len(codes.unique()) > 5
    assert (tokenizer.decode(codes).float() - ((drawn + 1) * 127.5).clamp(0, 255)).abs().max() < 0.51
    again = ImageTokenizer.load(tmp_path / "out")
    assert again.fingerprint == tokenizer.fingerprint
    provenance = json.loads((tmp_path / "out" / "image_tokenizer.json").read_text())["provenance"]
    assert provenance["files"][0]["name"] == "vqgan.ckpt" and len(provenance["files"][0]["sha256"]) == 64
    assert "noncommercial research" in provenance["notice"]


def test_a_folder_with_metas_file_will_do(meta, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    meta().rename(tmp_path / "tokenizer" / "vqgan.ckpt")
    assert convert(tmp_path, tmp_path / "out").can_decode


def test_hugging_faces_file_encodes_alike_and_cannot_draw(meta, tmp_path, tensors):
    others = {"lm_head.weight": torch.zeros(2), "model.embed_tokens.weight": torch.zeros(2)}
    save_file(without_decoder(tensors) | others, tmp_path / "model.safetensors")
    theirs = convert(tmp_path / "model.safetensors", tmp_path / "hf")
    codes = theirs.encode(pictures())
    assert (convert(meta(), tmp_path / "meta").encode(pictures()) == codes).all()
    assert not theirs.can_decode and not ImageTokenizer.load(tmp_path / "hf").can_decode
    with pytest.raises(ValueError, match=r"without a decoder .* import Meta's vqgan\.ckpt"):
        theirs.decode(codes)


@pytest.mark.parametrize("prefix", ["", "vqmodel."])
def test_other_prefixes_are_found(tmp_path, tensors, prefix):
    save_file(without_decoder(tensors, prefix), tmp_path / "model.safetensors")
    assert convert(tmp_path, tmp_path / "out").num_codes == 24


def sharded(folder, tensors):
    names = without_decoder(tensors)
    half = dict(list(names.items())[:20])
    parts = {"a.safetensors": half, "b.safetensors": {n: t for n, t in names.items() if n not in half}}
    for file_name, part in parts.items():
        save_file(part, folder / file_name)
    places = {name: file_name for file_name, part in parts.items() for name in part}
    places["model.layers.0.weight"] = "absent.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return places


def test_a_sharded_folder_opens_only_the_files_it_needs(tmp_path, tensors):
    sharded(tmp_path, tensors)
    tokenizer = convert(tmp_path, tmp_path / "out")
    save_file(without_decoder(tensors), tmp_path / "whole.safetensors")
    whole = convert(tmp_path / "whole.safetensors", tmp_path / "whole")
    assert tokenizer.fingerprint == whole.fingerprint


@pytest.mark.parametrize("name", ["../a.safetensors", "absent.safetensors", "/etc/passwd"])
def test_an_index_may_not_point_elsewhere(tmp_path, tensors, name):
    folder = tmp_path / "model"
    folder.mkdir()
    places = sharded(folder, tensors)
    save_file(without_decoder(tensors), tmp_path / "a.safetensors")
    places = {key: name if value == "a.safetensors" else value for key, value in places.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match=r"index\.json: names the file .*, which is not beside it"):
        convert(folder, tmp_path / "out")


class Malicious:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_objects_are_refused_and_not_executed(meta, tmp_path, zipped):
    mark = tmp_path / "executed"
    torch.save({"state_dict": {"a": Malicious(mark)}}, tmp_path / "evil.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"exec, and only tensors and plain values are read"):
        convert(tmp_path / "evil.ckpt", tmp_path / "out")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Malicious(mark)))
    with pytest.raises(ValueError, match=r"plain\.ckpt: "):
        convert(tmp_path / "plain.ckpt", tmp_path / "out")
    assert not mark.exists() and not (tmp_path / "out").exists()


def renamed(state):
    state["encoder.conv_inn.weight"] = state.pop("encoder.conv_in.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            renamed,
            r"1 tensors are missing and 1 unknown .*conv_in\.weight is missing \(near: encoder\.conv_inn\.weight",
        ),
        (lambda s: s.pop("decoder.conv_out.bias"), "decoder.conv_out.bias is missing"),
        (lambda s: s.update(surplus=torch.zeros(1)), "1 unknown .*surplus is unknown"),
        (
            lambda s: s.update({CODEBOOK_TENSOR: torch.zeros(24, 9)}),
            r"embedding\.weight is float32 of shape \[24, 9\]",
        ),
        (lambda s: s.update({"quant_conv.bias": torch.zeros(8, dtype=torch.int32)}), "quant_conv.bias is int32"),
        (lambda s: s.update({"quant_conv.bias": torch.full((8,), torch.nan)}), "quant_conv.bias holds values"),
        (lambda s: s.update({"quant_conv.bias": "text"}), "'quant_conv.bias' is of type str"),
        (lambda s: s.clear(), "no 'state_dict'"),
    ],
)
def test_other_tensors_are_named(meta, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        convert(meta(change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_refused(meta, tmp_path, tensors):
    whole = meta().read_bytes()
    for number, content in enumerate([b"", b"no torch file", whole[: len(whole) // 2], whole[:-30]]):
        path = tmp_path / f"{number}.ckpt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a torch file, or a damaged one"):
            convert(path, tmp_path / "out")
        path.rename(path.with_suffix(".safetensors"))
        with pytest.raises(ValueError, match="not a safetensors file, or a damaged one"):
            convert(path.with_suffix(".safetensors"), tmp_path / "out")
    save_file({"lm_head.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"no tensors named …quantize\.embedding\.weight"):
        convert(tmp_path / "other.safetensors", tmp_path / "out")


def test_unusable_arguments_are_refused(meta, tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        convert(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"none of model\.safetensors\.index\.json, .* in this folder"):
        convert(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match="precision='fp16' must be fp32 or bf16"):
        convert(meta(), tmp_path / "out", precision="fp16")
    convert(meta(), tmp_path / "out")
    with pytest.raises(ValueError, match="holds an image tokenizer already"):
        convert(meta(), tmp_path / "out")


def test_precision_is_kept_and_part_of_the_fingerprint(meta, tmp_path):
    plain, low = convert(meta(), tmp_path / "fp32"), convert(meta(), tmp_path / "bf16", precision="bf16")
    assert (plain.precision, low.precision) == ("fp32", "bf16")
    assert plain.fingerprint != low.fingerprint
    assert (plain.encode(pictures()) == low.encode(pictures())).float().mean() > 0.8
