"""The command line of conversion, without its work: options that say nothing, interrupts, the last lines."""

import os
import signal
from types import SimpleNamespace

import pytest

from megachameleon.checkpoint.formats import conversion, registry
from tools import convert_checkpoint


def parsed(way, *options):
    one, other = way.split("-")
    return convert_checkpoint.parser().parse_args(["--from", one, "--to", other, "SRC", "DST", *options])


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("megatron-hf", ["--tensor-parallel", "2"]),
        ("megatron-meta", ["--pipeline-parallel", "2"]),
        ("hf-megatron", ["--shard-size", "3"]),
        ("hf-meta", ["--image-tokenizer", "x"]),
        ("megatron-meta", ["--tokenizer", "x"]),
        ("meta-hf", ["--qk-norm-groups", "2"]),
        ("megatron-hf", ["--qk-norm", "none"]),
        ("megatron-hf", ["--average-qk-norm"]),
        ("meta-hf", ["--shards", "2"]),
    ],
)
def test_options_that_say_nothing_are_refused(way, options):
    with pytest.raises(ValueError, match=rf"{options[0]}: says nothing about --from \w+ --to \w+; leave it out"):
        convert_checkpoint._require_sensible(parsed(way, *options))


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("meta-megatron", ["--tensor-parallel", "2", "--pipeline-parallel", "2", "--tokenizer", "x"]),
        ("megatron-hf", ["--shard-size", "3", "--tokenizer", "x", "--image-tokenizer", "x", "--vocab-size", "8"]),
        ("hf-meta", ["--qk-norm-groups", "2", "--average-qk-norm", "--shards", "2", "--dtype", "bf16"]),
        ("megatron-megatron", ["--vocab-size", "8", "--tokenizer", "x"]),
        ("hf-megatron", ["--qk-norm", "none", "--workers", "3"]),
    ],
)
def test_options_that_say_something_are_not(way, options):
    convert_checkpoint._require_sensible(parsed(way, *options))


@pytest.mark.parametrize("option", ["--workers", "--shards", "--shard-size", "--tensor-parallel", "--vocab-size"])
def test_nothing_is_none_or_less(option):
    way = {"--shard-size": "hf-hf", "--shards": "hf-meta"}.get(option, "hf-megatron")
    with pytest.raises(ValueError, match=f"{option} .*: must be"):
        convert_checkpoint._require_sensible(parsed(way, option, "0"))


@pytest.mark.parametrize("size", ["inf", "1e300", "1e-300", "nan", "-1"])
def test_sizes_of_files_that_are_none(size):
    with pytest.raises(ValueError, match=r"--shard-size .*: must be a number of GB"):
        convert_checkpoint._require_sensible(parsed("hf-hf", "--shard-size", size))


def run_with(convert, monkeypatch):
    """The exit status, with this in place of the conversion."""
    description = SimpleNamespace(notes=("seen",), model=SimpleNamespace(num_parameters=1234567))
    source = SimpleNamespace(description=description)
    monkeypatch.setattr(registry, "open_source", lambda *_: source)
    monkeypatch.setattr(registry, "make_sink", lambda *_: SimpleNamespace(notes=()))
    monkeypatch.setattr(conversion, "convert", convert)
    return convert_checkpoint.main(parsed("meta-megatron"))


def interrupted(*_, **__):
    raise KeyboardInterrupt


def terminated(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)
    pytest.fail("went on after SIGTERM")


@pytest.mark.parametrize(("convert", "status"), [(interrupted, 130), (terminated, 143)])
def test_an_interrupt_tells_how_to_go_on(convert, status, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert run_with(convert, monkeypatch) == status
    told = "interrupted: DST is not there yet; the same command goes on, or remove .DST.converting\n"
    assert capsys.readouterr().err == told
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_last_lines_tell_what_there_is_and_what_to_do_with_it(monkeypatch, capsys):
    done = conversion.Conversion(num_files=8, num_bytes=2_469_134, files_found=3)
    assert run_with(lambda *_, **__: done, monkeypatch) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "note: seen"
    assert second.startswith(
        "DST: 1,234,567 parameters, 2.47 MB in 8 files, 3 of them from an interrupted conversion, "
    )
    assert third == "start a run from it: checkpoint.init_from=DST"


def test_a_qk_norm_is_for_llamas(tmp_path):
    arguments = parsed("hf-megatron", "--qk-norm", "none")
    arguments.source = tmp_path
    with pytest.raises(ValueError, match="is no Llama and has its own"):
        convert_checkpoint.main(arguments)
