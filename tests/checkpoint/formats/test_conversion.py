"""Complete or invisible: kills, resumption, refusals; and the command itself."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from converting import CASES, convert_checkpoint, save_filled, tensors_of
from plain_weights import draw
from safetensors.torch import load_file, save_file

from megachameleon.checkpoint.folder import parse_manifest, write_manifest
from megachameleon.config import load_config
from megachameleon.files import NoRoomError, sha256_of

ROOT = Path(__file__).parents[3]
SMALL = {"shard_bytes": 250_000}


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    overrides = CASES["swin, 4 groups"]
    weights = draw(load_config("debug", overrides).model)
    return save_filled(overrides, weights, tmp_path_factory.mktemp("ours") / "run")


@pytest.fixture(scope="module")
def exported(ours, tmp_path_factory):
    return convert_checkpoint(("megatron", "hf"), ours, tmp_path_factory.mktemp("hf") / "hf", **SMALL)


def contents(folder):
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in (name for name in found if name.endswith("manifest.json")):
        values = json.loads(found[name])
        del values["versions"], values["sha256"]  # a commit beside the test changes the first, and so the second
        found[name] = json.dumps(values).encode()
    return found


@pytest.mark.parametrize("kinds", [("megatron", "hf"), ("hf", "megatron")], ids="-".join)
def test_the_same_command_goes_on_after_a_kill(kinds, ours, exported, tmp_path):
    """Killed in a child at operations on files all over the conversion; each time what is left is resumed."""
    source = ours if kinds[0] == "megatron" else exported
    options = SMALL if kinds[1] == "hf" else {"tensor_parallel": 4, "pipeline_parallel": 2}
    whole = contents(convert_checkpoint(kinds, source, tmp_path / "whole", **options))
    number, kills = 1, 0
    while True:
        target = tmp_path / f"target{number}"
        child = os.fork()
        if child == 0:
            left = [number]

            def hook(event, arguments, left=left):
                if event in ("open", "os.rename", "os.remove", "shutil.rmtree") and "tmp" in str(arguments[0]):
                    left[0] -= 1
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            torch.set_num_threads(1)  # a child cannot use the parent's threads
            sys.addaudithook(hook)
            convert_checkpoint(kinds, source, target, **options)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        kills += 1
        if not target.exists():  # it has no name before it is whole
            convert_checkpoint(kinds, source, target, **options)
        assert contents(target) == whole
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
        number += 17
    assert kills > 5


def test_what_a_kill_has_begun_does_not_end_up_in_the_destination(ours, exported, tmp_path, monkeypatch):
    from megachameleon.checkpoint.formats import conversion

    monkeypatch.setattr(conversion, "_complete", lambda *_: (_ for _ in ()).throw(OSError(5, "broken")))
    with pytest.raises(OSError, match="broken"):
        convert_checkpoint(("megatron", "hf"), ours, tmp_path / "hf", **SMALL)
    monkeypatch.undo()
    for name in (".config.json.host.7.tmp", "model-00009-of-00009.safetensors.partial"):
        (conversion.temporary_folder(tmp_path / "hf") / name).write_text("{")
    assert contents(convert_checkpoint(("megatron", "hf"), ours, tmp_path / "hf", **SMALL)) == contents(exported)


def test_finished_files_are_not_written_again(ours, tmp_path, monkeypatch):
    from megachameleon.checkpoint.formats.huggingface import sink as huggingface_sink

    written = []
    write = huggingface_sink.write_safetensors

    def fail_at_third(path, pieces, tensors):
        written.append(path.name)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return write(path, pieces, tensors)

    monkeypatch.setattr(huggingface_sink, "write_safetensors", fail_at_third)
    with pytest.raises(NoRoomError, match="No space left"):
        convert_checkpoint(("megatron", "hf"), ours, tmp_path / "hf", **SMALL)
    assert not (tmp_path / "hf").exists()
    convert_checkpoint(("megatron", "hf"), ours, tmp_path / "hf", **SMALL)
    assert len(set(written)) == len(written) - 1  # the one that failed


def test_a_file_that_is_lost_is_written_again(ours, exported, tmp_path, monkeypatch):
    """As after a loss of power, when the record has come to the disk and the file has not."""
    from megachameleon.checkpoint.formats import conversion

    monkeypatch.setattr(conversion, "_complete", lambda *_: (_ for _ in ()).throw(OSError(5, "broken")))
    with pytest.raises(OSError, match="broken"):
        convert_checkpoint(("megatron", "hf"), ours, tmp_path / "hf", **SMALL)
    monkeypatch.undo()
    next(conversion.temporary_folder(tmp_path / "hf").glob("*.safetensors")).unlink()
    assert contents(convert_checkpoint(("megatron", "hf"), ours, tmp_path / "hf", **SMALL)) == contents(exported)


def test_what_another_conversion_left_is_not_taken(ours, exported, tmp_path, monkeypatch):
    from megachameleon.checkpoint.formats import conversion

    monkeypatch.setattr(conversion, "_complete", lambda *_: (_ for _ in ()).throw(OSError(5, "broken")))
    with pytest.raises(OSError, match="broken"):
        convert_checkpoint(("megatron", "hf"), ours, tmp_path / "dst", **SMALL)
    monkeypatch.undo()
    for kinds, source, options in ((("hf", "hf"), exported, SMALL), (("megatron", "hf"), ours, {})):
        with pytest.raises(ValueError, match="was left by another conversion to dst"):
            convert_checkpoint(kinds, source, tmp_path / "dst", **options)
    convert_checkpoint(("megatron", "hf"), ours, tmp_path / "dst", **SMALL)


def test_an_existing_destination_is_refused(ours, tmp_path):
    (tmp_path / "dst").mkdir()
    with pytest.raises(ValueError, match="dst: exists already"):
        convert_checkpoint(("megatron", "hf"), ours, tmp_path / "dst")
    assert list((tmp_path / "dst").iterdir()) == []


def test_two_at_once_are_refused(ours, tmp_path):
    from megachameleon.checkpoint.formats.conversion import _owned, temporary_folder

    with _owned(temporary_folder(tmp_path / "dst")), pytest.raises(ValueError, match="another conversion is writing"):
        convert_checkpoint(("megatron", "hf"), ours, tmp_path / "dst")


def test_values_that_are_not_finite_are_refused(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "hf")
    name = "model.layers.1.mlp.down_proj.weight"
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name][3, 4] = float("nan")
    save_file(tensors, file)
    extra = json.loads((folder / "megachameleon.json").read_text())
    (folder / "megachameleon.json").write_text(json.dumps({**extra, "sha256": {}}))  # those of what was there
    with pytest.raises(ValueError, match=r"1 values of decoder.layers.mlp.linear_fc2.weight@1,0,0 are not finite"):
        convert_checkpoint(("hf", "megatron"), folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_weights_of_two_types_lose_nothing(ours, tmp_path):
    """The first by name is of bf16; all others would be rounded to it."""
    run = shutil.copytree(ours, tmp_path / "run")
    (checkpoint,) = run.glob("step_*")
    index = json.loads((checkpoint / "index.json").read_text())
    name, file = "decoder.final_layernorm.weight", checkpoint / "tensors_00000.safetensors"
    tensors = load_file(file)
    exact = next(values for key, values in tensors.items() if key.startswith("embedding."))
    tensors |= {key: values.bfloat16() for key, values in tensors.items() if key.startswith(name)}
    save_file(tensors, file)
    index[name]["dtype"] = "bfloat16"
    assert min(index) == name
    (checkpoint / "index.json").write_text(json.dumps(index))
    manifest = parse_manifest(checkpoint)
    for path in (file, checkpoint / "index.json"):
        manifest.files[path.name].update(size=path.stat().st_size, sha256=sha256_of(path))
    write_manifest(checkpoint, manifest)
    found = tensors_of(convert_checkpoint(("megatron", "hf"), run, tmp_path / "hf"))
    assert torch.equal(found["model.embed_tokens.weight"], exact)


def test_large_values_are_finite():
    from megachameleon.checkpoint.formats.conversion import _not_finite

    values = torch.full((1000,), 3e38)  # whose sum is not
    assert _not_finite(values) == 0
    values[[3, 7, 9]] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    assert _not_finite(values) == _not_finite(values.bfloat16()) == 3


def test_a_damaged_checkpoint_is_refused(ours, tmp_path):
    copy = shutil.copytree(ours, tmp_path / "copy")
    (file,) = copy.rglob("tensors_00000.safetensors")
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    with pytest.raises(ValueError, match="its SHA-256 differs"):
        convert_checkpoint(("megatron", "hf"), copy, tmp_path / "hf")


def wait_for_a_finished_file(folder):
    deadline = time.monotonic() + 60
    while not any((folder / "records").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_damage_that_is_found_when_files_are_finished_leaves_nothing(ours, tmp_path, monkeypatch):
    from megachameleon.checkpoint.formats import conversion

    copy = shutil.copytree(ours, tmp_path / "copy")
    (file,) = copy.rglob("tensors_00000.safetensors")
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    check = conversion._check

    def check_late(known, folder, meter):
        wait_for_a_finished_file(folder)
        check(known, folder, meter)

    monkeypatch.setattr(conversion, "_check", check_late)
    with pytest.raises(ValueError, match=r"tensors_00000.safetensors: its SHA-256 differs from that in manifest.json"):
        convert_checkpoint(("megatron", "hf"), copy, tmp_path / "hf", workers=2, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_files_made_of_bytes_that_nobody_checked_are_written_again(ours, exported, tmp_path, monkeypatch):
    from megachameleon.checkpoint.formats import conversion
    from megachameleon.checkpoint.formats.huggingface import sink as huggingface_sink

    def fail_late(known, folder, meter):
        wait_for_a_finished_file(folder)
        raise OSError(5, "broken")

    monkeypatch.setattr(conversion, "_check", fail_late)
    with pytest.raises(OSError, match="broken"):
        convert_checkpoint(("megatron", "hf"), ours, tmp_path / "hf", workers=2, **SMALL)
    monkeypatch.undo()
    assert any((conversion.temporary_folder(tmp_path / "hf") / "records").iterdir())
    written, write = [], huggingface_sink.write_safetensors
    monkeypatch.setattr(
        huggingface_sink, "write_safetensors", lambda path, *rest: (written.append(path.name), write(path, *rest))[1]
    )
    convert_checkpoint(("megatron", "hf"), ours, tmp_path / "hf", **SMALL)
    assert len(written) == len(list((tmp_path / "hf").glob("*.safetensors")))
    assert contents(tmp_path / "hf") == contents(exported)


@pytest.mark.parametrize("workers", [1, 2])
def test_each_worker_holds_the_tensors_of_one_piece(workers, ours, tmp_path, monkeypatch):
    from megachameleon.checkpoint.formats.megatron.source import MegatronSource

    alive, most, lock, read = [0], [0], threading.Lock(), MegatronSource.read

    def count(change):
        with lock:
            alive[0] += change
            most[0] = max(most[0], alive[0])

    def counted(self, name, box):
        tensor = read(self, name, box)
        count(1)
        weakref.finalize(tensor.untyped_storage(), count, -1)
        return tensor

    monkeypatch.setattr(MegatronSource, "read", counted)
    convert_checkpoint(("megatron", "hf"), ours, tmp_path / "hf", workers=workers, **SMALL)  # pieces of one cut each
    assert most[0] <= workers and alive[0] == 0


@pytest.mark.parametrize(
    "kinds", ["megatron-hf", "megatron-meta", "hf-megatron", "hf-meta", "meta-hf", "meta-megatron"]
)
def test_matrices_in_blocks_of_rows_are_the_same(kinds, ours, exported, tmp_path, monkeypatch):
    from megachameleon.checkpoint.formats import conversion

    one, other = kinds.split("-")
    sources = {"megatron": ours, "hf": exported}
    source = sources.get(one) or convert_checkpoint(("megatron", "meta"), ours, tmp_path / "meta", meta_shards=8)
    options = {"hf": SMALL, "meta": {"meta_shards": 2}, "megatron": {"tensor_parallel": 4, "pipeline_parallel": 2}}
    options = {**options[other], "average_qk_norm": True} if other == "meta" else options[other]
    whole = contents(convert_checkpoint((one, other), source, tmp_path / "whole", **options))
    made, make = [], conversion._made
    monkeypatch.setattr(conversion, "_made", lambda *given: (made.append(given[2].name), make(*given))[1])
    monkeypatch.setattr(conversion, "BLOCK", 1)
    assert contents(convert_checkpoint((one, other), source, tmp_path / "blocks", **options)) == whole
    assert len(made) > 2 * len(set(made))


def test_a_full_disk_is_seen_beforehand(ours, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(ValueError, match="the converted checkpoint needs about 1 MB and 0 MB are free"):
        convert_checkpoint(("megatron", "hf"), ours, tmp_path / "hf")


@pytest.mark.parametrize(
    ("change", "said"),
    [("model.qk_norm=rmsnorm", "model.qk_norm=rmsnorm, and transformers"), ("model.norm_eps=1e-6", "norm_eps=1e-06")],
)
def test_models_that_transformers_does_not_have_are_refused(change, said, tmp_path):
    from converting import save_chunks

    from megachameleon.model.decoder import build_decoder
    from megachameleon.model.kernels.table import choose_kernels
    from megachameleon.parallel.context import parallel_context

    config = load_config("debug", [change])
    with parallel_context(config.parallel) as context:
        kernels = choose_kernels(config.kernels)
        decoder = build_decoder(config.model, config.parallel, kernels, context.groups, dtype=torch.float32, seed=0)
        save_chunks(config, [decoder], context, tmp_path / "ours")
    with pytest.raises(ValueError, match=said):
        convert_checkpoint(("megatron", "hf"), tmp_path / "ours", tmp_path / "hf")
    convert_checkpoint(("megatron", "megatron"), tmp_path / "ours", tmp_path / "again", tensor_parallel=2)


def test_the_command_converts_and_verifies(ours, tmp_path):
    pytest.importorskip("transformers", reason="one side of --verify")

    def run(*arguments):
        command = [sys.executable, "tools/convert_checkpoint.py", *map(str, arguments)]
        return subprocess.run(
            command, check=False, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )

    done = run("--from", "megatron", "--to", "hf", ours, tmp_path / "hf", "--dtype", "bf16", "--workers", 1, "--verify")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("note: no text tokenizer") and "in 1 file, " in lines[-3]
    assert lines[-2] == f"load it: ChameleonForConditionalGeneration.from_pretrained('{tmp_path / 'hf'}')"
    assert lines[-1].startswith("verified: largest logit difference ")
    assert float(lines[-1].split()[4]) < 1e-5 and " at 128 of 128 positions; our decoder on SRC, " in lines[-1]
    again = run("--from", "megatron", "--to", "hf", ours, tmp_path / "hf")
    assert again.returncode == 2
    assert again.stderr == f"error: {tmp_path / 'hf'}: exists already; remove it or choose another destination\n"
    useless = run("--from", "megatron", "--to", "hf", ours, tmp_path / "other", "--tensor-parallel", 2)
    assert useless.returncode == 2 and "--tensor-parallel: says nothing about --from megatron --to hf" in useless.stderr
