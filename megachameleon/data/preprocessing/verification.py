"""Reading finished shards again, several at a time, and comparing them with their manifests and themselves."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from megachameleon.console import describe_error, progress_bar
from megachameleon.data.plan import Plan, load_plan
from megachameleon.data.preprocessing.unit_state import unit_state
from megachameleon.data.preprocessing.worker_pool import WorkerPool
from megachameleon.data.shards.reader import ShardReader, shard_file


def verify_units(folder: Path, *, workers: int = 1, discard: bool = False) -> list[str]:
    """Read every shard of a plan again and compare it with its manifest, its plan and itself.

    Args:
        workers: processes that read.
        discard: remove the manifests of shards that were changed, so that `run` makes them again.

    Returns:
        All problems, one a unit at most; none if every unit is finished and unchanged.

    Raises:
        ValueError: there is no plan, or a damaged one.
    """
    plan = load_plan(folder)
    problems = []
    with (
        progress_bar("verifying (units)", plan.num_units) as bar,
        WorkerPool(_make_check, (plan, discard), min(workers, plan.num_units)) as pool,
        closing(pool.ordered(range(plan.num_units))) as results,
    ):
        for problem in results:
            problems += [problem] if problem else []
            bar.advance()
    return problems


def _make_check(plan: Plan, discard: bool) -> Callable[[int], str | None]:
    def check(number: int) -> str | None:
        state = unit_state(plan, plan.unit(number))
        if state.problem:
            return f"{plan.folder / state.unit.name}: {state.problem}; run preprocess_data.py run again"
        prefix = plan.folder / state.unit.name
        try:
            ShardReader(prefix).verify()
        # not the shard's fault, perhaps: a manifest is not discarded for a stale handle
        except OSError as error:
            return f"{prefix}: cannot be read ({describe_error(error)})"
        except ValueError as error:
            if discard:
                shard_file(prefix, ".json").unlink(missing_ok=True)
                return f"{error} (its manifest is removed now)"
            return str(error)
        return None

    return check
