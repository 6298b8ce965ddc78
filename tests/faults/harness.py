"""Kills runs at random moments, many times, and demands that each ends bit-equal to one that was never disturbed.

    python tests/faults/harness.py --trials 200 --seed 0 --output runs/faults

Each trial disturbs one run up to three times (a killed, stopped or signalled rank, a full disk, a damaged
checkpoint), starts it again by the same command until it is finished, and compares: the tensors of the last
checkpoint byte for byte, its progress, and the loss, gradient norm and learning rate of every step. Folders of failed
trials are kept.
"""

import argparse
import itertools
import json
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parents[1] / "distributed"),
    str(Path(__file__).parents[2]),
]

from faults import Fault  # noqa: E402
from trial import LAYOUTS, NUM_STEPS, PATIENCE, Outcome, Trial, damage, outcome_of, run_trial, write_config  # noqa: E402

KINDS = {"kill": 0.6, "signal": 0.15, "no_room": 0.08, "damage": 0.12, "hang": 0.05}
"""Shares of the trials."""
DELAYS = {
    "step": 0.08,
    "update": 0.02,
    "save": 0.15,
    "load": 0.1,
    "build": 0.1,
    "start": 0.2,
    "index": 0.1,
    "validate": 0.1,
}
"""Longest delay after a place, in seconds; a place that is not named strikes at once."""


def draw_fault(generator: random.Random, kind: str, world_size: int, seconds: float, *, resumes: bool = False) -> Fault:
    """A fault at a random moment.

    Args:
        seconds: that an undisturbed life takes.
        resumes: whether the life it strikes may find a checkpoint.
    """
    places = ["anywhere", "anywhere", "start", "index", "build", "step", "step", "update", "save", "save", "validate"]
    places += ["fsync", "fsync", "replace", "rename", "unlink", *(["load", "load"] if resumes else [])]
    place = "save" if kind == "no_room" else generator.choice(places)
    most_calls = {
        "step": NUM_STEPS,
        "update": NUM_STEPS,
        "save": NUM_STEPS // 2,
        "fsync": 30,
        "replace": 12,
        "rename": 5,
    }
    longest = seconds if place == "anywhere" else DELAYS.get(place, 0.0)
    return Fault(
        kind=kind,
        rank=generator.randrange(world_size),
        place=place,
        call=generator.randint(1, most_calls.get(place, 2)),
        delay=generator.uniform(0, longest) if generator.random() < 0.8 else 0.0,
    )


def draw_disturbances(generator: random.Random, world_size: int, seconds: float) -> tuple[str, list[Any]]:
    """What happens to a run, life by life."""
    what = generator.choices(list(KINDS), weights=list(KINDS.values()))[0]

    def kill(*, resumes: bool = False) -> Fault:
        return draw_fault(generator, "SIGKILL", world_size, seconds, resumes=resumes)

    if what == "kill":
        return what, [kill(resumes=life > 0) for life in range(generator.choices((1, 2, 3), (0.6, 0.25, 0.15))[0])]
    if what == "signal":
        asked = draw_fault(generator, generator.choice(("SIGTERM", "SIGUSR1")), world_size, seconds)
        return what, [asked, *([kill(resumes=True)] if generator.random() < 0.3 else [])]
    if what == "no_room":
        return what, [draw_fault(generator, "no_room", world_size, seconds)]
    if what == "hang" and world_size > 1:  # a stopped process that is alone stays so: nobody is there to notice
        return what, [draw_fault(generator, "SIGSTOP", world_size, seconds)]
    if what == "hang":
        return "kill", [kill()]
    late = Fault(
        kind="SIGKILL", rank=generator.randrange(world_size), place="step", call=generator.randint(6, NUM_STEPS)
    )
    return what, [late, damage(generator.choice(("missing", "truncated", "flipped")), generator.randrange(1 << 30))]


class Harness:
    """Trials over one corpus, with a calm run of each layout to compare with."""

    def __init__(self, folder: Path, layouts: list[str]) -> None:
        from life import warm_context
        from tiny_corpus import write_corpus

        self.folder, self.layouts, self.context = folder, layouts, warm_context()
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "corpus").mkdir(parents=True)
        self.corpus = write_corpus(folder / "corpus")
        self._calm: dict[str, tuple[Outcome, float]] = {}

    def calm(self, layout: str) -> tuple[Outcome, float]:
        """The undisturbed run of a layout, and the seconds of its life."""
        from life import live

        if layout not in self._calm:
            run = self.folder / f"calm-{layout}" / "run"
            life = live(self.context, write_config(self.corpus, run, layout), LAYOUTS[layout][0], None, run, PATIENCE)
            if any(life.statuses):
                raise ValueError(f"the calm run of {layout} ended with {life.statuses}:\n{life.log}")
            self._calm[layout] = outcome_of(run), life.seconds
        return self._calm[layout]

    def run(self, number: int, seed: int) -> tuple[str, Trial]:
        """Trial `number`, a function of the seed."""
        generator = random.Random(f"{seed}/{number}")
        layout = generator.choice(self.layouts)
        expected, seconds = self.calm(layout)
        what, disturbances = draw_disturbances(generator, LAYOUTS[layout][0], seconds)
        return what, self.disturb(number, layout, disturbances, expected)

    def disturb(self, number: int, layout: str, disturbances: list[Any], expected: Outcome) -> Trial:
        """One trial with given disturbances."""
        folder = self.folder / f"trial-{number:04d}"
        return run_trial(self.context, self.corpus, folder, layout, disturbances, expected, number)


def main(arguments: argparse.Namespace) -> int:
    """Run the trials, print what failed and a summary; 1 if any did."""
    from megachameleon.console import progress_bar

    harness = Harness(arguments.output, arguments.layouts)
    counts: Counter[str] = Counter()
    failed: list[Trial] = []
    lives = struck = 0
    slowest_end = 0.0
    start = time.monotonic()
    missed = 0
    with (arguments.output / "trials.jsonl").open("w") as log, progress_bar("trials", arguments.trials) as bar:
        for number in itertools.count(arguments.first):
            if counts.total() == arguments.trials:
                break
            what, trial = harness.run(number, arguments.seed)
            if trial.problem is None and not any(any(life.statuses) for life in trial.lives):
                missed += 1  # the run was over before the moment came: not a trial
                continue
            counts[what] += 1
            lives += len(trial.lives)
            struck += sum(any(life.statuses) for life in trial.lives)
            slowest_end = max([slowest_end, *(life.seconds_after_first_death for life in trial.lives if not life.hung)])
            record = {
                "number": number,
                "kind": what,
                "layout": trial.layout,
                "done": trial.done,
                "problem": trial.problem,
            }
            log.write(json.dumps(record) + "\n")
            log.flush()
            bar.advance()
            bar.note(f"{len(failed)} failed")
            if trial.problem:
                failed.append(trial)
                print(
                    f"trial {number} ({trial.layout}): {trial.problem}\n  " + "\n  ".join(trial.done), file=sys.stderr
                )
                (arguments.output / f"trial-{number:04d}" / "lives.log").write_text(
                    "\n".join(life.log for life in trial.lives)
                )
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    print(
        f"{arguments.trials} trials ({kinds}), {lives} lives of which {struck} were cut short, {len(failed)} failed "
        f"({missed} more runs were over before their fault, and do not count); "
        f"all ranks were down at most {slowest_end:.1f} s after the first; {time.monotonic() - start:.0f} s"
    )
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--trials", type=int, default=200)
    made.add_argument(
        "--first", type=int, default=0, help="number of the first trial; each is a function of seed and number"
    )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--output", type=Path, default=Path("runs/faults"))
    made.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    return made


if __name__ == "__main__":
    sys.exit(main(parser().parse_args()))
