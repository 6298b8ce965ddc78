"""One line for an error, and its traceback where it is asked for."""

import argparse
import sys

import pytest

from megachameleon.console import run_tool


def run(monkeypatch, *words):
    """A tool with a subcommand, which fails."""

    def main(arguments: argparse.Namespace) -> None:
        raise ValueError("x.yaml: wrong")

    parser = argparse.ArgumentParser()
    parser.add_subparsers(dest="command").add_parser("plan").add_argument("--seed", type=int)
    monkeypatch.setattr(sys, "argv", ["tool", *words])
    with pytest.raises(SystemExit) as stopped:
        run_tool(main, parser)
    return stopped.value.code


@pytest.mark.parametrize("words", [("--debug", "plan"), ("plan", "--debug"), ("plan", "--seed", "1", "--debug")])
def test_debug_is_accepted_on_either_side_of_a_subcommand(monkeypatch, capsys, words):
    assert run(monkeypatch, *words) == 2
    assert "Traceback" in capsys.readouterr().err


def test_without_debug_an_error_is_one_line(monkeypatch, capsys):
    assert run(monkeypatch, "plan") == 2
    assert capsys.readouterr().err == "error: x.yaml: wrong\n"
