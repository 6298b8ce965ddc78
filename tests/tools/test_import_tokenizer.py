"""tools/import_tokenizer.py as a user calls it."""

import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/tokens"))

from release_files import write_release  # noqa: E402

from megachameleon.tokens.text import TextTokenizer  # noqa: E402


@pytest.fixture
def call(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["import_tokenizer.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "tools/import_tokenizer.py"), run_name="__main__")

    return run


def test_a_release_goes_in_and_comes_out_with_the_same_ids(call, tmp_path, capsys):
    from tokenizers import Tokenizer

    source = write_release(tmp_path / "text_tokenizer.json")
    call("text", source, "--output", tmp_path / "ours")
    assert "65,536 ids, 49,152 of them text" in capsys.readouterr().out
    call("export", tmp_path / "ours", "--output", tmp_path / "hf")
    text = "<s> the self 2024\n"
    library = Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
    assert library.encode(text).ids == [0, *TextTokenizer.load(tmp_path / "ours").encode(text)]


def test_a_tokenizer_is_replaced_only_on_request(call, tmp_path, capsys):
    source = write_release(tmp_path / "text_tokenizer.json")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/text.model").write_bytes(b"another one")
    with pytest.raises(SystemExit) as ended:
        call("text", source, "--output", tmp_path / "ours")
    assert ended.value.code == 2 and "a text tokenizer is there; choose another --output" in capsys.readouterr().err
    assert (tmp_path / "ours/text.model").read_bytes() == b"another one"
    call("text", source, "--output", tmp_path / "ours", "--replace")
    assert TextTokenizer.load(tmp_path / "ours").vocabulary.size == 65_536


@pytest.mark.parametrize("command", ["text", "image", "export"])
def test_a_missing_source_is_one_line(call, command, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        call(command, tmp_path / "nowhere", "--output", tmp_path / "out")
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "nowhere" in error
    assert not (tmp_path / "out").exists()


def test_the_examples_of_help_are_understood():
    tool = runpy.run_path(str(ROOT / "tools/import_tokenizer.py"))
    examples = [line for line in tool["EXAMPLES"].splitlines() if "python" in line]
    assert len(examples) == 4
    for line in examples:
        tool["parser"]().parse_args(shlex.split(line)[2:])


def test_llamas_text_gets_ids_for_pictures(call, tmp_path, capsys):
    from llama_tokenizers import train_like_llama

    llama = tmp_path / "llama"
    llama.mkdir()
    (llama / "tokenizer.model").write_bytes(train_like_llama(400))
    call("text", llama, "--output", tmp_path / "ours", "--image-codes", 16, "--image-grid", "2x4")
    assert "512 ids, 397 of them text" in capsys.readouterr().out
    vocabulary = TextTokenizer.load(tmp_path / "ours").vocabulary
    assert (vocabulary.num_image_codes, vocabulary.image_grid) == (16, (2, 4))
    with pytest.raises(SystemExit):
        call("text", llama, "--output", tmp_path / "other", "--image-grid", "32")
    assert "'32' is not ROWSxCOLUMNS" in capsys.readouterr().err


def test_pictures_of_a_release_are_not_described_anew(call, tmp_path, capsys):
    source = write_release(tmp_path / "text_tokenizer.json")
    with pytest.raises(SystemExit) as ended:
        call("text", source, "--output", tmp_path / "ours", "--image-codes", 16)
    assert ended.value.code == 2 and "leave out --image-codes" in capsys.readouterr().err
