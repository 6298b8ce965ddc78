"""What may be wrong with a checkpoint of each format: how to make it so in a sound one, and words of the refusal."""

import json
import pickle
import zipfile
from pathlib import Path

import torch
from hostile_files import Runs, cut_off, edit_json, edit_safetensors_header, write_torch_file
from safetensors.torch import load_file, save_file

from megachameleon.checkpoint.folder import CheckpointManifest, write_manifest
from megachameleon.files import sha256_of

ATTENTION = "layers.1.attention"


def state_of(folder, rank=1):
    return {name: t for name, t in torch.load(folder / f"consolidated.{rank:02}.pth").items() if name != "rope.freqs"}


def rewritten(folder, change=lambda state: None, **lies):
    """The second file again, changed, with whatever it claims."""
    path = folder / "consolidated.01.pth"
    state = state_of(folder)
    change(state)
    write_torch_file(path, state, **lies)
    (folder / "checklist.chk").unlink()


def replaced(folder, write_it):
    path = folder / "consolidated.01.pth"
    path.unlink()
    write_it(path)
    (folder / "checklist.chk").unlink()


def marker(folder):
    return folder.parent / "was_run"


def zip_bomb(folder):
    """Compressed: what is small here would be large when it is read."""
    rewritten(folder, compression=zipfile.ZIP_DEFLATED)


def short_entry(folder):
    """The zip's directory says more bytes than there are before the next entry."""
    rewritten(folder)
    path = folder / "consolidated.01.pth"
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\x01\x02")  # the first entry of the directory: sizes stand 20 and 24 bytes behind
    for at in (20, 24):
        size = int.from_bytes(data[place + at : place + at + 4], "little")
        data[place + at : place + at + 4] = (size + 1_000_000).to_bytes(4, "little")
    path.write_bytes(data)


def with_vocabulary(folder, **changes):
    edit_json(folder / "megachameleon.json", lambda values: values["vocabulary"].update(changes))


def with_value(name, value):
    """A value of a tensor of a `.pth` file."""

    def change(state):
        state[name].view(-1)[5] = value

    return lambda folder: rewritten(folder, change)


def two_wrong(state):
    del state[f"{ATTENTION}.wq.weight"], state["norm.weight"]
    state["layers.0.attention.wq.bias"] = torch.zeros(8)
    state["lora.weight"] = torch.zeros(8)


META = {
    "a pickle in a zip": (
        lambda f: replaced(f, lambda path: torch.save({"a": Runs(marker(f)), "b": torch.zeros(2)}, path)),
        ["consolidated.01.pth", "nothing of it was executed"],
    ),
    "a bare pickle": (
        lambda f: replaced(f, lambda path: path.write_bytes(pickle.dumps(Runs(marker(f))))),
        ["consolidated.01.pth", "not a zip file"],
    ),
    "a pickle of old torch": (
        lambda f: replaced(
            f, lambda path: torch.save({"a": Runs(marker(f))}, path, _use_new_zipfile_serialization=False)
        ),
        ["consolidated.01.pth", "not a zip file"],
    ),
    "a zip that escapes": (
        lambda f: rewritten(f, entries={"archive/../../../escaped": b"x"}),
        ["consolidated.01.pth", "archive/../../../escaped"],
    ),
    "a zip with an absolute path": (
        lambda f: rewritten(f, entries={f"{f.parent}/escaped": b"x"}), ["consolidated.01.pth", "outside the folder"]
    ),
    "a compressed zip": (zip_bomb, ["consolidated.01.pth", "compressed"]),
    "a zip that says more than there is": (short_entry, ["consolidated.01.pth"]),
    "a storage that is too large": (
        lambda f: rewritten(f, claim={"storage": 10**12, "shape": (10**6, 10**6)}), ["1000000000000 values"]
    ),
    "a shape that is too large": (lambda f: rewritten(f, claim={"shape": (129, 8)}), ["does not fit"]),
    "strides of a thousand": (lambda f: rewritten(f, claim={"stride": (1000, 1)}), ["does not fit"]),
    "strides of zero": (lambda f: rewritten(f, claim={"shape": (10**6, 10**6), "stride": (0, 0)}), ["does not fit"]),
    "a negative stride": (lambda f: rewritten(f, claim={"stride": (-8, 1)}), ["cannot be"]),
    "an offset behind the end": (lambda f: rewritten(f, claim={"offset": 2}), ["does not fit"]),
    "a negative offset": (lambda f: rewritten(f, claim={"offset": -1}), ["cannot be"]),
    "a file cut off": (lambda f: cut_off(f / "consolidated.01.pth"), ["consolidated.01.pth", "cut off"]),
    "an empty file": (lambda f: replaced(f, Path.touch), ["consolidated.01.pth"]),
    "a changed byte": (
        lambda f: (f / "checklist.chk").write_text("0" * 32 + "  consolidated.02.pth\n"), ["consolidated.02.pth", "MD5"]
    ),
    "a list that names another folder": (
        lambda f: (f / "checklist.chk").write_text("0" * 32 + "  ../consolidated.02.pth\n"), ["checklist.chk"]
    ),
    "a missing file": (lambda f: (f / "consolidated.02.pth").unlink(), ["consolidated.02.pth", "copy all files"]),
    "tensors missing and unknown": (
        lambda f: rewritten(f, two_wrong),
        [f"2 missing: {ATTENTION}.wq.weight, norm.weight", "2 unknown: layers.0.attention.wq.bias, lora.weight"],
    ),
    "another shape": (
        lambda f: rewritten(f, lambda s: s.update({"layers.0.ffn_norm.weight": torch.ones(33)})),
        ["layers.0.ffn_norm.weight [33] instead of [32]"],
    ),
    "norms that differ between files": (
        with_value("layers.1.attention_norm.weight", 9.0), ["layers.1.attention_norm.weight"]
    ),
    "not a number": (with_value(f"{ATTENTION}.wo.weight", float("nan")), ["not finite"]),
    "no settings": (lambda f: (f / "params.json").unlink(), ["params.json is not there"]),
    "settings that are no JSON": (lambda f: (f / "params.json").write_text("{"), ["params.json", "not valid JSON"]),
    "settings without end": (
        lambda f: (f / "params.json").write_text("[" * 200_000), ["params.json"]
    ),
    "no heads": (
        lambda f: edit_json(f / "params.json", lambda v: v["model"].update(n_heads=0)), ["n_heads"]
    ),
    "other layers": (lambda f: edit_json(f / "params.json", lambda v: v["model"].update(n_layers=3)), ["13 missing"]),
    "a vocabulary of another size": (lambda f: with_vocabulary(f, size=192), ["192", "128"]),
    "no vocabulary": (lambda f: (f / "megachameleon.json").unlink(), ["--tokenizer"]),
}  # fmt: skip


def index(folder, place):
    """An index over the one file, in which a tensor stands elsewhere."""
    names = list(load_file(folder / "model.safetensors"))
    places = dict.fromkeys(names, "model.safetensors") | {"lm_head.weight": place}
    (folder / "model.safetensors.index.json").write_text("{}")
    edit_json(folder / "model.safetensors.index.json", lambda values: values.update(weight_map=places))


def edited(change):
    """Change the tensors of a safetensors file."""

    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")

    return edit


def header(change):
    return lambda folder: edit_safetensors_header(folder / "model.safetensors", change)


def first_bytes(size):
    def change(folder):
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + data[8:])

    return change


def pickled_weights(folder):
    """Only the file that transformers wrote before safetensors."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(marker(folder))))


def drifted(tensors):
    tensors["model.layers.1.self_attn.q_norm.weight"][1] += 0.5


def two_others(tensors):
    del tensors["model.norm.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(48)


HF = {
    "a file cut off": (lambda f: cut_off(f / "model.safetensors"), ["model.safetensors", "not a safetensors file"]),
    "a header of 2^60 bytes": (first_bytes(1 << 60), ["model.safetensors"]),
    "a header of nothing": (first_bytes(0), ["model.safetensors"]),
    "a shape that is too large": (
        header(lambda h: h["lm_head.weight"].update(shape=[129, 32])), ["model.safetensors"]
    ),
    "a negative size": (header(lambda h: h["lm_head.weight"].update(shape=[-128, 32])), ["model.safetensors"]),
    "an offset behind the end": (
        header(lambda h: h["lm_head.weight"].update(data_offsets=[1 << 40, (1 << 40) + 16384])), ["model.safetensors"]
    ),
    "two tensors in one place": (
        header(lambda h: h["lm_head.weight"].update(data_offsets=h["model.embed_tokens.weight"]["data_offsets"])),
        ["model.safetensors"],
    ),
    "whole numbers for weights": (
        edited(lambda s: s.update({"lm_head.weight": s["lm_head.weight"].to(torch.int32)})), ["I32"]
    ),
    "an index that leads out": (lambda f: index(f, "../other.safetensors"), ["../other.safetensors"]),
    "an index to an absolute path": (lambda f: index(f, "/etc/passwd"), ["/etc/passwd"]),
    "an index to a missing file": (lambda f: index(f, "model-2.safetensors"), ["model-2.safetensors"]),
    "an index that is no JSON": (
        lambda f: (f / "model.safetensors.index.json").write_text("[" * 200_000), ["model.safetensors.index.json"]
    ),
    "an index that is a list": (
        lambda f: (f / "model.safetensors.index.json").write_text("[1]"), ["model.safetensors.index.json"]
    ),
    "a pickle instead": (pickled_weights, ["safetensors"]),
    "no settings": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "settings that are a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json"]),
    "not a number": (
        edited(lambda s: s["model.layers.0.mlp.down_proj.weight"].view(-1)[7:9].fill_(float("-inf"))),
        ["2 values", "not finite"],
    ),
    "tensors missing and unknown": (
        edited(two_others),
        ["2 missing: model.layers.0.mlp.up_proj.weight, model.norm.weight",
         "1 unknown: model.layers.0.mlp.up_proj.bias"],
    ),
    "a head_dim that repeats itself": (
        lambda f: edit_json(f / "config.json", lambda v: v.update(head_dim="x", num_attention_heads=10**13)),
        ["head_dim='x'"],
    ),
    "a RoPE that is a word": (
        lambda f: edit_json(f / "config.json", lambda v: v.update(rope_scaling="default")), ["RoPE of type 'default'"]
    ),
    "a RoPE beyond all floats": (
        lambda f: edit_json(f / "config.json", lambda v: v.update(rope_parameters={"rope_theta": 10**400})),
        ["rope_theta is 1000"],
    ),
    "tokenizers that are none": (
        lambda f: edit_json(f / "megachameleon.json", lambda v: v.update(tokenizers={"text": ["x"]})),
        ["megachameleon.json", "fingerprints"],
    ),
    "a lineage that is none": (
        lambda f: edit_json(f / "megachameleon.json", lambda v: v.update(lineage=[1])),
        ["megachameleon.json", "lineage"],
    ),
    "a hash that leads out": (
        lambda f: edit_json(f / "megachameleon.json", lambda v: v.update(sha256={"model.safetensors": "../../x"})),
        ["megachameleon.json", "sha256"],
    ),
    "heads of a group that differ": (edited(drifted), ["differ", "0.5", "--average-qk-norm"]),
    "a vocabulary of another size": (
        lambda f: with_vocabulary(f, size=192), ["128 rows", "192"]
    ),
    "a picture's code with another id": (
        lambda f: edit_json(f / "config.json", lambda v: v["vocabulary_map"].update({"IMGIMGAZ": 5})),
        ["vocabulary_map", "IMGIMGAZ"],
    ),
}  # fmt: skip


def checkpoint(folder):
    (found,) = folder.glob("step_*")
    return found


def weights_file(folder):
    return checkpoint(folder) / "tensors_00000.safetensors"


def resealed(change):
    """Change a checkpoint and give its manifest the hashes of what it is then, as a forger would."""

    def forge(folder):
        change(folder)
        found = checkpoint(folder)
        manifest = json.loads((found / "manifest.json").read_text())
        for name, file in manifest["files"].items():
            file.update(size=(found / name).stat().st_size, sha256=sha256_of(found / name))
        fields = {name: value for name, value in manifest.items() if name in CheckpointManifest.__dataclass_fields__}
        write_manifest(found, CheckpointManifest(**fields))

    return forge


def leads_out(folder):
    def change(index):
        index["output_layer.weight"]["parts"][0][0] = "../../../other.safetensors"

    edit_json(checkpoint(folder) / "index.json", change)


def boxes_of_text(index):
    index["output_layer.weight"]["parts"][0][2] = ["0", "0"]


def without_hash(folder):
    """The file is there, and the index names it."""
    path = checkpoint(folder) / "manifest.json"
    edit_json(path, lambda manifest: manifest["files"].pop("tensors_00000.safetensors"))


def infinite(folder):
    tensors = load_file(weights_file(folder))
    tensors["output_layer.weight@0,0"][3, 4] = float("inf")
    save_file(tensors, weights_file(folder))


MEGATRON = {
    "a file cut off": (lambda f: cut_off(weights_file(f)), ["tensors_00000"]),
    "a changed byte": (
        lambda f: weights_file(f).write_bytes(weights_file(f).read_bytes()[:-1] + b"\x7f"), ["SHA-256"]
    ),
    "a manifest that leads out": (
        lambda f: edit_json(
            checkpoint(f) / "manifest.json", lambda v: v["files"].update({"../../x": {"size": 1, "sha256": "0" * 64}})
        ),
        ["manifest.json"],
    ),
    "no weights": (lambda f: weights_file(f).unlink(), ["tensors_00000"]),
    "an index that leads out": (resealed(leads_out), ["../../../other.safetensors"]),
    "an index to a file that has no hash": (resealed(without_hash), ["tensors_00000.safetensors", "knows nothing"]),
    "an index of other than numbers": (
        resealed(lambda f: edit_json(checkpoint(f) / "index.json", boxes_of_text)),
        ["index.json", "output_layer.weight"],
    ),
    "a header that lies": (
        resealed(lambda f: edit_safetensors_header(
            weights_file(f), lambda h: h["output_layer.weight@0,0"].update(shape=[1 << 40, 32])
        )),
        ["tensors_00000"],
    ),
    "not a number": (resealed(infinite), ["1 values of", "not finite"]),
}  # fmt: skip
