"""tools/train.py as a user calls it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def train(*arguments):
    command = [sys.executable, str(ROOT / "tools/train.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


def test_help_has_examples():
    result = train("--help")
    assert result.returncode == 0 and "examples:" in result.stdout and "torchrun" in result.stdout


def test_print_config_is_yaml_with_overrides():
    result = train("chameleon_7b", "--print-config", "optimizer.lr=2e-4")
    assert result.returncode == 0
    assert yaml.safe_load(result.stdout)["optimizer"]["lr"] == 2e-4


def test_dry_run_counts_34b_without_its_gpus():
    result = train("chameleon_34b", "--dry-run", "--world-size", "3072")
    assert result.returncode == 0, result.stderr
    assert "34,293,522,432" in result.stdout and "tensor 4 x pipeline 2 x data 384" in result.stdout
    lines = [line for line in result.stdout.splitlines() if line.startswith("rank")]
    counts = [int(line.split(" layers, ")[1].split(" parameters")[0].replace(",", "")) for line in lines]
    # Norms are whole on each of the four tensor ranks: 96 of hidden size, a final one, and QK-norm in 48 layers.
    replicated = (96 + 1) * 8192 + 48 * 4 * 4 * 128
    assert len(counts) == 2 and 4 * sum(counts) == 34_293_522_432 + 3 * replicated
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["debug", "optimizer.lrr=1"], "error: optimizer.lrr: unknown key; did you mean 'lr'?"),
        (["debug"], "error: data.tokenizer: missing"),
        (["debug", "--dry-run", "--world-size", "0"], "error: --world-size: 0 must be at least 1"),
        (["debug", "--world-size", "2"], "error: --world-size: is for --dry-run; to train on several processes"),
        (["debug", "--rank", "0"], "error: --rank: is for --dry-run"),
        (["nothing.yaml"], "error: nothing.yaml: neither a file nor a preset"),
        (["debug", "data.tokenizer=nowhere", "data.train.a=[x]", "data.stages=[{weights: {a: 1}}]"], "nowhere"),
    ],
)
def test_mistakes_are_one_line_and_status_two(arguments, message):
    result = train(*arguments)
    assert result.returncode == 2
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_model_and_vocabulary_must_agree(corpus, tmp_path):
    result = train(
        *("debug", "model.vocab_size=256", f"data.tokenizer={corpus / 'tokenizer'}", f"output_dir={tmp_path}"),
        *(f"data.train.pairs=[{corpus / 'pairs'}]", "data.stages=[{weights: {pairs: 1}}]"),
    )
    assert result.returncode == 2
    assert "model.vocab_size: 256, but the vocabulary" in result.stderr
    assert "set model.vocab_size=128" in result.stderr
