"""What the person at the terminal sees: a header, a progress bar with an ETA, a line now and then."""

import contextlib
import math
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from megachameleon.console import ProgressTask, progress_bar
from megachameleon.model.kernels.table import describe_kernels
from megachameleon.training.callbacks.base import Callback, StepEvent
from megachameleon.training.losses import LossReport

if TYPE_CHECKING:
    from megachameleon.training.trainer import Trainer


class Terminal(Callback):
    """Rank 0 only. Without a terminal it prints a line every `log_every` steps instead of a bar."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: ProgressTask | None = None
        self._stack = contextlib.ExitStack()

    def on_start(self, trainer: "Trainer") -> None:
        """Print what will run and start the bar."""
        if not trainer.context.is_main:
            return
        config, context = trainer.config, trainer.context
        axes = config.parallel.describe(context.world_size)
        self._console.print(
            f"[bold]{config.output_dir}[/]: {config.model.num_parameters:,} parameters, {trainer.precision}, "
            f"{context.world_size} processes on {context.device.type} ({axes}), "
            f"steps {trainer.step} to {config.training.num_steps}"
        )
        table = Table("operation", "backend", "what", title="kernels", title_justify="left")
        for row in describe_kernels(config.kernels, trainer.kernels):
            table.add_row(*row)
        self._console.print(table)
        self._bar = self._stack.enter_context(progress_bar("training", config.training.num_steps, done=trainer.step))

    def on_step(self, trainer: "Trainer", event: StepEvent) -> None:
        """Advance the bar."""
        if self._bar is None:
            return
        losses = event.report.losses
        parts = {"text": losses.loss_text, "image": losses.loss_image}
        by_modality = ", ".join(f"{name} {value:.3f}" for name, value in parts.items() if math.isfinite(value))
        note = f"loss {losses.loss:.3f} ({by_modality}) {event.tokens_per_second:,.0f} tok/s"
        self._bar.advance()
        self._bar.note(note)
        if not self._console.is_terminal and event.step % trainer.config.training.log_every == 0:
            print(f"step {event.step}/{trainer.config.training.num_steps} {note}", file=sys.stderr, flush=True)

    def on_validation(self, trainer: "Trainer", step: int, reports: dict[str, LossReport]) -> None:
        """Print the validation losses."""
        if self._bar is not None and reports:
            shown = ", ".join(f"{name} {report.loss:.3f}" for name, report in reports.items())
            self._console.print(f"step {step} validation: {shown}", highlight=False)

    def on_checkpoint(self, trainer: "Trainer", step: int, path: str) -> None:
        """Say where the checkpoint is."""
        if self._bar is not None:
            self._console.print(f"step {step} checkpoint: {path}", highlight=False)

    def on_end(self, trainer: "Trainer") -> None:
        """Close the bar."""
        self._stack.close()
