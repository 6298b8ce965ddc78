"""Generation shared by the data-parallel copies of a model."""

from collections.abc import Callable, Sequence
from typing import Any

from megachameleon.generation.engine import generate
from megachameleon.generation.settings import GenerationSettings
from megachameleon.generation.stepper import Stepper
from megachameleon.tokens.vocabulary import Vocabulary


def generate_shared(
    stepper: Stepper,
    vocabulary: Vocabulary,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    replicas: Any | None,
    on_finished: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """`generate`, with the prompts divided over the copies of a model; every process gets all results.

    Args:
        replicas: the data-parallel process group; None does all prompts here. The results do not depend on it, up to
            the rounding of another batch shape.
        on_finished: called with the estimated number of rows that have ended on all copies together.
    """
    copies = 1 if replicas is None else replicas.size()
    if copies == 1:
        return generate(stepper, vocabulary, prompts, settings, on_finished=on_finished)
    import torch.distributed as dist

    mine = list(range(replicas.rank(), len(prompts), copies))  # type: ignore[union-attr]
    # copies do not tell each other while they work, so progress is an estimate
    report = None if on_finished is None else lambda rows: on_finished(rows * copies)
    results = generate(stepper, vocabulary, [prompts[row] for row in mine], settings, rows=mine, on_finished=report)
    gathered: list[list[list[int]]] = [[] for _ in range(copies)]
    dist.all_gather_object(gathered, results, group=replicas)
    return [gathered[row % copies][row // copies] for row in range(len(prompts))]
