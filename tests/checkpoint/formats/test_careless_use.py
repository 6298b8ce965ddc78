"""What careless users do: the wrong format, other options after a refusal, files changed behind our own export."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
from converting import convert_checkpoint
from safetensors.torch import load_file, save_file
from three_formats import Case, heads, write

from megachameleon.checkpoint.formats import conversion
from megachameleon.files import NoRoomError
from megachameleon.tokens.vocabulary import Vocabulary

TINY = Case(
    ["model.vocab_size=128", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_layers=2",
     *heads(8, 4, 4, "swin")]
)  # fmt: skip
SMALL = {"shard_bytes": 20_000}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A checkpoint of each format."""
    folder = tmp_path_factory.mktemp("sound")
    return {kind: write(kind, folder / kind, TINY) for kind in ("meta", "hf", "megatron")}


@pytest.fixture
def settings(sound, tmp_path):
    """Changes config.json of a copy and returns it."""

    def change(**changes):
        folder = shutil.copytree(sound["hf"], tmp_path / "hf", dirs_exist_ok=True)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    return change


@pytest.mark.parametrize("kind", ["meta", "hf", "megatron"])
@pytest.mark.parametrize("said", ["meta", "hf", "megatron"])
def test_another_format_is_named(kind, said, sound, tmp_path):
    if kind == said:
        convert_checkpoint((said, "megatron"), sound[kind], tmp_path / "dst")
        return
    with pytest.raises(ValueError, match=f"looks like {kind}: give --from {kind}"):
        convert_checkpoint((said, "megatron"), sound[kind], tmp_path / "dst")
    assert not list(tmp_path.iterdir())


def test_a_bit_that_fell_over_in_our_own_export_is_seen(sound, tmp_path):
    ours = convert_checkpoint(("megatron", "hf"), sound["megatron"], tmp_path / "hf")
    convert_checkpoint(("hf", "megatron"), ours, tmp_path / "whole")
    path = ours / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model.safetensors: its SHA-256 differs from that in megachameleon.json"):
        convert_checkpoint(("hf", "megatron"), ours, tmp_path / "again")
    assert not (tmp_path / "again").exists() and not conversion.temporary_folder(tmp_path / "again").exists()


def test_our_own_file_must_be_one(sound, tmp_path):
    folder = shutil.copytree(sound["hf"], tmp_path / "hf")
    (folder / "megachameleon.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"megachameleon.json: is not a JSON object"):
        convert_checkpoint(("hf", "megatron"), folder, tmp_path / "dst")


def test_settings_that_the_checklist_knows_must_be_there(sound, tmp_path):
    """They stand over params.json, so without them it may be another model."""
    ours = convert_checkpoint(("megatron", "meta"), sound["megatron"], tmp_path / "meta")
    (ours / "consolidate_params.json").unlink()
    with pytest.raises(ValueError, match=r"checklist.chk: names 'consolidate_params.json', which is not beside it"):
        convert_checkpoint(("meta", "megatron"), ours, tmp_path / "dst")


@pytest.mark.parametrize("value", ["no", "false", 0, 1])
def test_an_order_of_norms_is_true_or_false(value, settings, tmp_path):
    with pytest.raises(ValueError, match=rf"config.json: swin_norm is {value!r}, not true or false"):
        convert_checkpoint(("hf", "megatron"), settings(swin_norm=value), tmp_path / "dst")


def test_rope_that_is_scaled_in_the_older_place_only(settings, tmp_path):
    """Of both places transformers takes this one."""
    scaled = settings(rope_parameters={"rope_type": "default"}, rope_scaling={"type": "linear", "factor": 2.0})
    with pytest.raises(ValueError, match="RoPE of type 'linear'"):
        convert_checkpoint(("hf", "megatron"), scaled, tmp_path / "dst")


def test_other_options_after_a_refusal(sound, tmp_path, monkeypatch):
    """Nothing was finished, so nothing is kept; what was compared for the other source is compared anew."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
        with pytest.raises(ValueError, match="are free"):
            convert_checkpoint(("megatron", "hf"), sound["megatron"], tmp_path / "dst")
    checked = conversion.temporary_folder(tmp_path / "dst") / "checked"
    (checked / "another's").touch()
    seen, complete = [], conversion._complete
    monkeypatch.setattr(
        conversion, "_complete", lambda *given: (seen.extend(p.name for p in checked.iterdir()), complete(*given))
    )
    convert_checkpoint(("megatron", "hf"), sound["megatron"], tmp_path / "dst", dtype="bf16")
    assert seen and "another's" not in seen


def test_other_options_after_files_were_finished(sound, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_complete", lambda *_: (_ for _ in ()).throw(OSError(5, "broken")))
        with pytest.raises(OSError, match="broken"):
            convert_checkpoint(("megatron", "hf"), sound["megatron"], tmp_path / "dst")
    with pytest.raises(ValueError, match=r"was left by another conversion to dst, of .* as it was then or with other"):
        convert_checkpoint(("megatron", "hf"), sound["megatron"], tmp_path / "dst", dtype="bf16")


def test_a_disk_that_fills_up_is_named_and_the_same_command_goes_on(sound, tmp_path, monkeypatch):
    from megachameleon.checkpoint.formats.huggingface import sink as huggingface_sink

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_sink, "write_safetensors", full)
        with pytest.raises(NoRoomError, match=r"\.dst\.converting: cannot write .*the disk is full.* goes on"):
            convert_checkpoint(("megatron", "hf"), sound["megatron"], tmp_path / "dst", **SMALL)
    convert_checkpoint(("megatron", "hf"), sound["megatron"], tmp_path / "dst", **SMALL)


def test_another_conversion_that_ends_first_is_noticed_before_any_work(sound, tmp_path, monkeypatch):
    owned = conversion._owned

    @contextmanager
    def late(folder):
        (tmp_path / "dst").mkdir()
        with owned(folder):
            yield

    monkeypatch.setattr(conversion, "_owned", late)
    monkeypatch.setattr(conversion, "_do", lambda *_: pytest.fail("has converted"))
    with pytest.raises(ValueError, match="exists already"):
        convert_checkpoint(("megatron", "hf"), sound["megatron"], tmp_path / "dst")


def test_a_file_whose_hash_nobody_stored_is_converted(sound, tmp_path):
    """As others leave them: only our own exports have hashes."""
    ours = convert_checkpoint(("megatron", "hf"), sound["megatron"], tmp_path / "hf")
    tensors = load_file(ours / "model.safetensors")
    tensors["lm_head.weight"] *= 2
    save_file(tensors, ours / "model.safetensors")
    extra = json.loads((ours / "megachameleon.json").read_text())
    del extra["sha256"]
    (ours / "megachameleon.json").write_text(json.dumps(extra))
    convert_checkpoint(("hf", "megatron"), ours, tmp_path / "dst")


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens_map.json"])
def test_files_of_a_tokenizer_that_go_along_are_looked_at_first(name, settings, tmp_path):
    folder = settings()
    (folder / "tokenizer.json").write_text("{}")
    convert_checkpoint(("hf", "hf"), folder, tmp_path / "sound")
    (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name}: not valid JSON"):
        convert_checkpoint(("hf", "hf"), folder, tmp_path / "dst")
    assert not conversion.temporary_folder(tmp_path / "dst").exists()


def test_far_too_many_layers_are_said_with_the_folder(settings, tmp_path):
    with pytest.raises(ValueError, match=r"/hf: num_layers: 1,000,000,000 layers are no model's"):
        convert_checkpoint(("hf", "megatron"), settings(num_hidden_layers=10**9), tmp_path / "dst")


@pytest.mark.parametrize("kind", ["hf", "meta"])
def test_a_tokenizer_of_another_model_is_refused(kind, sound, tmp_path):
    """Even of as many ids: our own file beside the export says which are pictures."""
    folder = shutil.copytree(sound[kind], tmp_path / "src")
    known = Vocabulary.from_dict(json.loads((folder / "megachameleon.json").read_text())["vocabulary"], origin="")
    (tmp_path / "same").mkdir()
    known.save(tmp_path / "same")
    convert_checkpoint((kind, "megatron"), folder, tmp_path / "dst", tokenizer=tmp_path / "same")
    (tmp_path / "other").mkdir()
    replace(known, image_grid=tuple(reversed(known.image_grid))).save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"vocabulary of .*src has image_grid=.* but that of .*other has"):
        convert_checkpoint((kind, "megatron"), folder, tmp_path / "again", tokenizer=tmp_path / "other")
