#!/usr/bin/env python3
"""Submit training to SLURM: checked before it queues, one run or a chain of stages."""

import argparse
from pathlib import Path
from typing import Any

from megachameleon.console import run_tool, tool_parser

PROJECT = Path(__file__).resolve().parents[1]
"""Root of the checkout."""


def main(arguments: argparse.Namespace) -> None:
    """Check every stage against the size of the job; print or submit."""
    from megachameleon.launching.inspection import read_excluded
    from megachameleon.launching.submission import SCRIPT_NAME, SCRIPTS, Request, require_sbatch

    if Path.cwd() != PROJECT:
        raise ValueError(f"{Path.cwd()}: call it from {PROJECT}, where the job will run and relative paths will begin")
    configs = [word for word in arguments.words if "=" not in word]
    # they hold for all stages of a chain
    overrides = [word for word in arguments.words if "=" in word]
    if not configs:
        raise ValueError("CONFIG: none was given, such as run.yaml")
    request = Request(
        exclude=read_excluded(arguments.exclude_file),
        options=tuple(arguments.sbatch or ()),
        **{name: getattr(arguments, name) for name in OPTIONS},
    )
    request.validate()
    template = (PROJECT / SCRIPTS / SCRIPT_NAME).read_text(encoding="utf-8")
    scripts = [prepare(config, overrides, request, template) for config in configs]
    if arguments.print:
        print("\n".join(text for _, text in scripts), end="")
        return
    require_sbatch()
    if arguments.test_only:
        test(scripts)
    else:
        send(scripts, configs, request, arguments)


def prepare(config: str, overrides: list[str], request: Any, template: str) -> tuple[Path, str]:
    """The run's folder and its batch script."""
    from dataclasses import replace

    from megachameleon.config import load_config
    from megachameleon.launching.submission import SCRIPT_FILE, render, require_fitting, variables

    loaded = load_config(config, overrides)
    require_fitting(loaded, request, config)
    run = Path(loaded.output_dir)
    named = replace(request, name=request.name or Path(config).stem)
    path = run / SCRIPT_FILE.format(name=Path(config).stem)
    exports = variables(named, run, PROJECT, path)
    return path, render(template, named, exports, [config, *overrides])


def test(scripts: list[tuple[Path, str]]) -> None:
    """Have SLURM say whether it could ever run each, without queueing it."""
    from megachameleon.launching.submission import test_only

    for path, text in scripts:
        print(f"{path}: {test_only(text)}")


def send(scripts: list[tuple[Path, str]], configs: list[str], request: Any, arguments: argparse.Namespace) -> None:
    """Write the scripts into the runs' folders and submit them."""
    from megachameleon.files import write_text
    from megachameleon.launching.chain import Stage, after, conversion, submit_chain
    from megachameleon.launching.submission import submit

    for path, text in scripts:
        write_text(path, text)
    if len(configs) == 1 and not arguments.convert_to:
        job = submit(scripts[0][0], *after(arguments.after))
        print(job if arguments.parsable else f"job {job}: {scripts[0][0]}")
        return
    stages = [Stage(name=Path(config).stem, script=path) for config, (path, _) in zip(configs, scripts, strict=True)]
    place = [f"--{name}={value}" for name in ("partition", "account", "qos") if (value := getattr(request, name))]
    place += [option for option in request.options if option.startswith("--output=")]
    if arguments.convert_to:
        stages.append(conversion(scripts[-1][0].parent, arguments.convert_to, place))
    jobs = submit_chain(stages, first_after=arguments.after, options=place)
    print("\n".join(job if arguments.parsable else f"job {job}: {name}" for name, job in jobs))


OPTIONS: dict[str, dict[str, Any]] = {
    "nodes": {"type": int, "default": 1, "help": "nodes of the job (default 1)"},
    "gpus_per_node": {"type": int, "default": 8, "metavar": "N", "help": "default 8; 0 on nodes without"},
    "ranks_per_node": {"type": int, "default": 0, "metavar": "N", "help": "default: one for each GPU"},
    "partition": {"default": "", "help": "of SLURM"},
    "account": {"default": "", "help": "of SLURM"},
    "qos": {"default": "", "help": "of SLURM"},
    "time": {"default": "", "help": "limit of one life of the job, such as 24:00:00; it comes back until it is done"},
    "name": {"default": "", "help": "of the job (default: the configuration's)"},
    "container": {"default": "", "metavar": "IMAGE", "help": "path of an image, for the ranks only"},
    "container_runtime": {"default": "", "choices": ["pyxis", "apptainer"], "help": "default pyxis"},
    "mounts": {"default": "", "metavar": "A:A,B:B", "help": "folders that the container sees"},
    "site": {"default": "", "metavar": "FILE", "help": "in place of examples/slurm/site.env"},
    "exclude_file": {"default": "", "metavar": "FILE", "help": "nodes to avoid, one a line; --preflight adds to it"},
    "preflight": {"action": "store_true", "help": "check the nodes before training, and leave bad ones"},
    "save_seconds": {
        "type": int, "default": 300, "metavar": "S", "help": "asked to save so long before the limit (default 300)",
    },
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser(
        "Submit training to SLURM. The layout is checked against the job's size first; several configurations make a "
        "chain.",
        """\
  python tools/launch.py run.yaml --nodes 4 --print                    # the script, which sbatch would take as it is
  python tools/launch.py run.yaml --nodes 4 --time 24:00:00 --partition gpu --account me
  python tools/launch.py run.yaml optimizer.lr=3e-4 --nodes 16 --preflight --exclude-file bad_nodes.txt
  python tools/launch.py run.yaml --container /images/mc.sqsh --mounts /data:/data --sbatch=--constraint=h100
  python tools/launch.py run.yaml --nodes 4 --test-only                # would SLURM take it? queues nothing
  python tools/launch.py stage1.yaml stage2.yaml fine_tuning.yaml --convert-to /data/models/mine      # a chain""",
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG|key.sub=value", help="configurations, and overrides of all")
    for name, options in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    parser.add_argument("--sbatch", action="append", metavar="=OPTION", help="another option of sbatch; repeatable")
    parser.add_argument("--after", default="", metavar="JOB", help="start only when that job has succeeded")
    parser.add_argument("--convert-to", default="", metavar="FOLDER", help="convert the last run's newest checkpoint")
    parser.add_argument("--print", action="store_true", help="show the script that would be submitted, and stop")
    parser.add_argument("--test-only", action="store_true", help="ask SLURM whether and when it would run, and stop")
    parser.add_argument("--parsable", action="store_true", help="print job ids only, one a line")
    return parser


if __name__ == "__main__":
    run_tool(main, build_parser(), intermixed=True)
