import sys

import pytest

from megachameleon.console import run_tool, tool_parser


def outcome(monkeypatch, capsys, error, *arguments):
    def main(_):
        if error is not None:
            raise error

    monkeypatch.setattr(sys, "argv", ["tool", *arguments])
    try:
        run_tool(main, tool_parser("does", "  tool"))
    except SystemExit as stop:
        return stop.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (None, 0, ""),
        (ValueError("a.b: 3 is wrong;\n take 4"), 2, "error: a.b: 3 is wrong; take 4\n"),
        (ValueError("tensor \x1b[2Jé\x07 is unknown"), 2, "error: tensor \\x1b[2Jé\\x07 is unknown\n"),
        (FileExistsError(17, "File exists", "out/x"), 2, "error: out/x: file exists; choose another path\n"),
        (
            IsADirectoryError(21, "Is a directory", "tmp", None, "page"),
            2,
            "error: page: is a directory; choose another path\n",
        ),
        (RuntimeError("broke"), 1, "error: RuntimeError: broke (--debug shows the traceback)\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_one_line_and_the_right_status(monkeypatch, capsys, error, status, line):
    assert outcome(monkeypatch, capsys, error) == (status, line)


def test_debug_shows_the_traceback(monkeypatch, capsys):
    _, text = outcome(monkeypatch, capsys, ValueError("wrong"), "--debug")
    assert "Traceback" in text and text.endswith("error: wrong\n")
