#!/usr/bin/env python3
"""Say before a run what it needs and takes: memory, step time, throughput, days; and find its layout."""

import argparse
import json
import math
import re
from dataclasses import replace
from pathlib import Path

from megachameleon.console import progress_bar, run_tool, tool_parser

SUFFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def main(arguments: argparse.Namespace) -> None:
    """Do what was asked."""
    if arguments.validate or arguments.fit:
        _print_validation(arguments)
        return
    if arguments.paper:
        from megachameleon.planning.paper import paper_tables

        print("\n".join(paper_tables()))
        return
    if arguments.config is None:
        raise ValueError("config: give a preset or a YAML file, or --validate, --fit or --paper")
    _plan(arguments)


def _plan(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from megachameleon.config import load_config
    from megachameleon.planning.estimate import estimate_run
    from megachameleon.planning.hardware import find_cluster
    from megachameleon.planning.picture import write_picture
    from megachameleon.planning.report import print_estimate, print_search
    from megachameleon.planning.search import search

    _require_sensible(arguments)
    config = load_config(arguments.config, arguments.overrides)
    cluster = find_cluster(arguments.cluster)
    if arguments.price is not None:
        cluster = replace(cluster, price_per_gpu_hour=arguments.price)
    tokens = parse_tokens(arguments.tokens) if arguments.tokens else None
    world = config.parallel.model_parallel if arguments.gpus is None else arguments.gpus
    terminal = Console()
    # rich takes files and pipes for 80 columns wide, and would break the tables
    console = terminal if terminal.is_terminal else Console(width=140)
    title = f"{arguments.config} on {world:,} x {cluster.name}"
    if arguments.search:
        with progress_bar("trying layouts", None) as bar:
            found = search(config, world, cluster, bar.advance)
        if arguments.json:
            print(json.dumps([one.as_plain(tokens) for one in found.fitting[: arguments.top]], indent=2))
        else:
            print_search(found, arguments.top, tokens, console)
        shown = found.fitting[: arguments.top]
    else:
        one = estimate_run(config, world, cluster)
        if arguments.json:
            print(json.dumps(one.as_plain(tokens), indent=2))
        else:
            print_estimate(one, tokens, console)
        shown = [one]
    if arguments.html:
        write_picture(Path(arguments.html), title, shown)
    # last: what is printed above shows by how much
    if not arguments.search and not one.fits:
        raise ValueError(one.why_not())


def _require_sensible(arguments: argparse.Namespace) -> None:
    for name in ("gpus", "top"):
        number = getattr(arguments, name)
        if number is not None and number < 1:
            raise ValueError(f"--{name}: {number} must be at least 1")
    if arguments.price is not None and not 0 <= arguments.price < math.inf:
        raise ValueError(f"--price: {arguments.price} must be a number, 0 or more")


def _print_validation(arguments: argparse.Namespace) -> None:
    from megachameleon.planning.published import points
    from megachameleon.planning.validation import constants_table, error_table

    print("\n".join(constants_table(points()) if arguments.fit else error_table(points())))


def parse_tokens(text: str) -> float:
    """A number with k, M, B or T behind it.

    Raises:
        ValueError: it is something else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([kMBT]?)", text.replace(",", "").replace("_", ""))
    if not match or not float(match[1]):
        raise ValueError(f"--tokens {text}: expected a number such as 9.2T, 300B or 1e12")
    return float(match[1]) * SUFFIXES[match[2]]


if __name__ == "__main__":
    parser = tool_parser(
        "Predict memory, step time and duration of a run, without a GPU, and search for the fastest layout that fits.",
        """\
  python tools/plan.py chameleon_7b --cluster h100 --gpus 256 --tokens 9.2T
  python tools/plan.py chameleon_34b --cluster h100 --gpus 1024 parallel.tensor_parallel=8 parallel.pipeline_parallel=1
  python tools/plan.py chameleon_34b --cluster h100 --gpus 1024 --search --tokens 9.2T --price 2.5 --html plan.html
  python tools/plan.py run.yaml --cluster mine.yaml --gpus 64 --search --json
  python tools/plan.py --paper       # Chameleon's own runs, and what to take for them today
  python tools/plan.py --validate    # predictions beside published measurements
  python tools/plan.py --fit         # the constants that they give""",
    )
    parser.add_argument("config", nargs="?", help="a YAML file, or a preset: debug, 1b, chameleon_7b, chameleon_34b")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key of the configuration")
    parser.add_argument("--cluster", default="h100", help="a100, h100, h200, b200, or a YAML file of your own")
    parser.add_argument("--gpus", type=int, help="GPUs in all; without it as few as the layout allows")
    parser.add_argument("--tokens", help="length of the run, such as 9.2T")
    parser.add_argument("--price", type=float, help="of a GPU and hour")
    parser.add_argument("--search", action="store_true", help="rank the layouts that fit")
    parser.add_argument("--top", type=int, default=10, help="how many layouts to show")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--html", help="draw step time and memory by part into this file")
    parser.add_argument("--validate", action="store_true", help="compare with published measurements")
    parser.add_argument("--fit", action="store_true", help="fit the constants to published measurements")
    parser.add_argument("--paper", action="store_true", help="plan the runs of Chameleon's paper")
    run_tool(main, parser, intermixed=True)
