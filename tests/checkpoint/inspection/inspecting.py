"""The tool in this process, and what is read by it."""

import importlib.util
import json
import shutil
from pathlib import Path

from megachameleon.checkpoint.inspection.opening import inspect
from megachameleon.checkpoint.inspection.statistics import chosen, measure

TOOL = Path(__file__).parents[3] / "tools/inspect_checkpoint.py"


def measured(path, pattern=None):
    """Report, numbers and hash of a checkpoint."""
    report = inspect(Path(path))
    return report, measure(report, chosen(report, pattern), lambda count: None, numbers=True, content=True)


def content_hash(path):
    return measured(path)[1].content_hash


def run_tool_here(*arguments):
    """Exit status of the tool's main."""
    spec = importlib.util.spec_from_file_location("inspect_checkpoint_tool", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool.main(tool.parser().parse_args([str(argument) for argument in arguments]))


def as_json(capsys, *arguments):
    """Exit status and what the tool prints with --json."""
    capsys.readouterr()
    status = run_tool_here(*arguments, "--json")
    return status, json.loads(capsys.readouterr().out)


def copy_of(folder, destination):
    shutil.copytree(folder, destination)
    return destination


def checkpoint_in(run):
    """Its only checkpoint."""
    (found,) = Path(run).glob("step_*")
    return found
