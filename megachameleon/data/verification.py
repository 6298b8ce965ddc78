"""Reading finished shards again, several at a time, and comparing them with their manifests and themselves."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from megachameleon.console import progress_bar
from megachameleon.data.plan import Plan, load_plan
from megachameleon.data.shards import ShardReader
from megachameleon.data.unit_state import unit_state
from megachameleon.data.worker_pool import WorkerPool


def verify_units(folder: Path, *, workers: int = 1) -> list[str]:
    """Read every shard of a plan again and compare it with its manifest, its plan and itself.

    Args:
        workers: processes that read.

    Returns:
        All problems, one a unit at most; none if every unit is finished and unchanged.

    Raises:
        ValueError: there is no plan, or a damaged one.
    """
    plan = load_plan(folder)
    problems = []
    with (
        progress_bar("verifying (units)", plan.num_units) as bar,
        WorkerPool(_make_check, (plan,), min(workers, plan.num_units)) as pool,
        closing(pool.ordered(range(plan.num_units))) as results,
    ):
        for problem in results:
            problems += [problem] if problem else []
            bar.advance()
    return problems


def _make_check(plan: Plan) -> Callable[[int], str | None]:
    def check(number: int) -> str | None:
        state = unit_state(plan, plan.unit(number))
        if state.problem:
            return f"{plan.folder / state.unit.name}: {state.problem}; run preprocess_data.py run again"
        try:
            ShardReader(plan.folder / state.unit.name).verify()
        except (ValueError, OSError) as error:
            return str(error)
        return None

    return check
