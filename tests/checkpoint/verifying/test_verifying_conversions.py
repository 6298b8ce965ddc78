"""What a user is told: verified, other than asked for, or another model, and from which part on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from converting import CASES, VOCABULARY, convert_checkpoint, save_filled
from plain_weights import draw
from safetensors.torch import load_file, save_file

from megachameleon.checkpoint.formats.conversion import convert
from megachameleon.checkpoint.formats.registry import Options, make_sink, open_source, target_dtype
from megachameleon.checkpoint.verifying.conversion import verify_conversion
from megachameleon.checkpoint.verifying.verification import Side, some_tokens, trace_of
from megachameleon.config import load_config
from megachameleon.console import FailureError

pytest.importorskip("transformers", reason="one side of the comparison")
ROOT = Path(__file__).parents[3]
ONE, FOUR = CASES.values()


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Ours and Hugging Face's, of a model with four groups of QK-norm."""
    folder = tmp_path_factory.mktemp("exports")
    ours = save_filled(FOUR, draw(load_config("debug", FOUR).model, seed=3), folder / "ours")
    return ours, convert_checkpoint(("megatron", "hf"), ours, folder / "hf")


def told(kinds, source, destination, **options):
    """Convert, unless it has been done, and verify: the lines, and what the failure says."""
    chosen = Options(**options)
    opened = open_source(kinds[0], source, chosen)
    if not destination.exists():
        convert(opened, make_sink(kinds[1], opened.description, chosen, opened), destination)
    before, after = Side(kind=kinds[0], path=source), Side(kind=kinds[1], path=destination)
    rounding = target_dtype(opened.description, chosen)
    lines = []
    try:
        for line in verify_conversion(opened, before, after, rounding, averages=chosen.average_qk_norm):
            lines.append(line)
    except FailureError as failure:
        return lines, str(failure)
    return lines, ""


def change(folder, damage):
    """Rewrite the tensors of a Hugging Face folder."""
    state = load_file(folder / "model.safetensors")
    damage(state)
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / "model.safetensors")
    extra = json.loads((folder / "megachameleon.json").read_text())
    (folder / "megachameleon.json").write_text(json.dumps({**extra, "sha256": {}}))  # those of what was there
    return folder


def test_a_failure_says_where_it_begins(exports, tmp_path):
    ours, _ = exports
    hf = convert_checkpoint(("megatron", "hf"), ours, tmp_path / "hf")

    def damage(state):
        state["model.layers.1.mlp.up_proj.weight"][:8] += 0.1  # another scale of all would be normalised away

    lines, failure = told(("megatron", "hf"), ours, change(hf, damage))
    assert lines[0].startswith("compared: largest logit difference ")
    assert "our decoder on SRC, transformers (hidden states times lm_head) on DST" in lines[0]
    differences = {line.split(":")[0]: float(line.split()[-4]) for line in lines[1:]}
    assert list(differences) == [f"  after {part}" for part in ("embedding", "block 0", "block 1", "final norm")]
    assert differences["  after block 0"] < 1e-5 < 1e-3 < differences["  after block 1"]
    assert failure.startswith(f"{hf}: is another model than {ours}") and "more than 0.0001; do not use it" in failure


def test_averages_that_were_asked_for_are_told(exports, tmp_path):
    drifted = convert_checkpoint(("megatron", "hf"), exports[0], tmp_path / "hf")

    def drift(state):
        for name in state:
            if "q_norm" in name or "k_norm" in name:
                state[name] += 0.3 * torch.randn(state[name].shape, generator=torch.Generator().manual_seed(0))

    change(drifted, drift)
    lines, failure = told(("hf", "megatron"), drifted, tmp_path / "ours", average_qk_norm=True)
    assert not failure and lines[0].startswith("compared: ")
    assert lines[-1].startswith("note: more than rounding, as --average-qk-norm says")
    _, failure = told(("hf", "megatron"), drifted, tmp_path / "other", qk_norm_groups=8, average_qk_norm=True)
    assert not failure
    assert told(("hf", "megatron"), exports[1], tmp_path / "equal", average_qk_norm=True)[0][0].startswith("verified")


def test_anoles_variant_is_computed_by_metas_formula(tmp_path):
    """It has Hugging Face's names and Meta's order of rows; transformers does not load it."""
    model = load_config("debug", ONE).model
    hf = convert_checkpoint(
        ("megatron", "hf"), save_filled(ONE, draw(model, seed=3), tmp_path / "ours"), tmp_path / "hf"
    )
    tokens = some_tokens(model.vocab_size, VOCABULARY)
    theirs = trace_of(Side(kind="hf", path=hf), tokens, torch.float32)

    def neighbours(rows):
        return rows.unflatten(0, (-1, 2, model.head_dim // 2)).transpose(1, 2).flatten(0, 2)

    def to_anole(state):
        for name in state:
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                state[name] = neighbours(state[name])
            elif "q_norm" in name or "k_norm" in name:
                state[name] = neighbours(state[name][0])

    side = Side(kind="hf", path=change(hf, to_anole))
    assert side.computed_by == "Meta's formula"
    torch.testing.assert_close(trace_of(side, tokens, torch.float32).logits, theirs.logits, rtol=0, atol=1e-5)
    lines, failure = told(("hf", "megatron"), hf, tmp_path / "imported")
    assert not failure and lines == [lines[0]] and "; Meta's formula on SRC, our decoder on DST" in lines[0]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    from tiny_llama import import_tokenizer, save_llama

    folder = tmp_path_factory.mktemp("llama")
    saved = save_llama(folder / "llama")
    import_tokenizer(saved, folder / "text")
    return saved, folder / "text"


@pytest.mark.parametrize("kind", ["megatron", "hf", "meta"])
def test_a_llama_is_compared_without_the_norms_it_was_given(llama, kind, tmp_path):
    lines, failure = told(("hf", kind), llama[0], tmp_path / "new", tokenizer=llama[1], dtype="fp32")
    assert not failure and len(lines) == 2
    assert lines[0].startswith("verified: ") and lines[0].endswith("over the ids of SRC, with DST's QK-norms left out")
    assert lines[1].startswith("note: with the QK-norms that DST was given: largest logit difference ")
    assert float(lines[1].split()[11]) > 0.01


def test_a_llama_without_norms_is_the_same_model(llama, tmp_path):
    from megachameleon.checkpoint.formats.llama.source import LlamaSource

    destination = tmp_path / "new"
    lines, failure = told(("hf", "megatron"), llama[0], destination, tokenizer=llama[1], qk_norm="none")
    assert not failure and lines == [lines[0]] and lines[0].endswith("in fp32, over the ids of SRC")
    assert float(lines[0].split()[5].removeprefix("(")) < 1e-5  # of the largest logit
    source = LlamaSource(llama[0], tokenizer=llama[1], qk_norm="none")
    source.ids[source.ids >= 0] = source.ids[source.ids >= 0].copy()[::-1]  # as if rows had gone to other ids
    before, after = Side(kind="hf", path=llama[0]), Side(kind="megatron", path=destination)
    with pytest.raises(FailureError, match="is another model"):
        list(verify_conversion(source, before, after, torch.float32))


def test_the_command_verifies_what_is_there(exports, tmp_path):
    ours, hf = exports

    def run(*arguments):
        command = [sys.executable, "tools/convert_checkpoint.py", "--from", "megatron", "--to", "hf", ours, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            list(map(str, command)), check=False, cwd=ROOT, capture_output=True, text=True, env=environment
        )

    done = run(hf, "--verify-only")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("verified: largest logit difference ") and done.stdout.count("\n") == 1
    again = run(hf, "--verify")
    assert again.returncode == 2 and "exists already; --verify-only compares it without converting" in again.stderr
    absent = run(tmp_path / "absent", "--verify-only")
    assert absent.returncode == 2 and absent.stderr.count("\n") == 1 and "use --verify" in absent.stderr
