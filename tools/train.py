#!/usr/bin/env python3
"""Pre-train or fine-tune; the same command again resumes."""

import argparse

from megachameleon.console import run_tool, tool_parser

EXIT = """\
exit status:
  0   finished
  75  asked to stop, with everything saved: the same command goes on. SIGTERM, SIGUSR1, faults.max_duration, or a file
      named `stop` in output_dir; the same signal again ends it at once, with 128 + its number
  1   failed; the last checkpoint is untouched
  2   bad usage or bad input"""


def main(arguments: argparse.Namespace) -> int:
    """Resolve the configuration and do what was asked; returns the exit status."""
    from megachameleon.config import load_config, to_yaml

    if not arguments.dry_run and (arguments.world_size is not None or arguments.rank is not None):
        option = "--rank" if arguments.world_size is None else "--world-size"
        raise ValueError(f"{option}: is for --dry-run; to train on several processes, start them with torchrun")
    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(to_yaml(config), end="")
        return 0
    if arguments.dry_run:
        from megachameleon.planning.dry_run import dry_run

        print(dry_run(config, arguments.world_size, arguments.rank))
        return 0
    # after what needs no torch: --print-config answers at once
    from megachameleon.training.run import train
    from megachameleon.training.stopping import ignore_requests

    status = train(config)
    # a second SIGTERM while the interpreter ends would replace the exit status
    ignore_requests()
    return status


if __name__ == "__main__":
    parser = tool_parser(
        "Train a mixed-modal decoder. Run it under torchrun for several processes; run it again to resume.\n\n" + EXIT,
        """\
  python tools/train.py debug model.vocab_size=3072 data.tokenizer=runs/demo/tokenizer \\
      data.train.text='[runs/demo/shards/text]' data.stages='[{weights: {text: 1}}]'
  torchrun --standalone --nproc-per-node 2 tools/train.py examples/demo/train.yaml
  torchrun --standalone --nproc-per-node 8 tools/train.py run.yaml parallel.tensor_parallel=2 optimizer.lr=3e-4
  python tools/train.py chameleon_34b --print-config
  python tools/train.py chameleon_34b --dry-run --world-size 3072
  python tools/train.py chameleon_34b parallel.pipeline_parallel=4 --dry-run --world-size 3072 --rank 1600""",
    )
    parser.add_argument("config", help="a YAML file, or a preset: debug, 1b, chameleon_7b, chameleon_34b")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key of the configuration")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what it needs, train nothing")
    parser.add_argument("--world-size", type=int, default=None, help="processes to assume in a dry run")
    parser.add_argument("--rank", type=int, default=None, help="process to count in a dry run; else two are chosen")
    run_tool(main, parser, intermixed=True, quick_exit=True)
