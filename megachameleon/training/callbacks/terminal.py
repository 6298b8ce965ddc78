"""What the person at the terminal sees: a header, then a live panel; lines where there is no terminal."""

import contextlib
import math
import sys
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table

from megachameleon.model.kernels.table import describe_kernels
from megachameleon.training.callbacks.base import Callback, StepEvent
from megachameleon.training.callbacks.panel import PanelState, panel
from megachameleon.training.callbacks.throughput import Throughput
from megachameleon.training.callbacks.values import step_values
from megachameleon.training.health.guards import Verdict
from megachameleon.training.losses import LossReport

if TYPE_CHECKING:
    from megachameleon.training.trainer import Trainer


class Terminal(Callback):
    """Rank 0 only. Without a terminal it prints a line every `log_every` steps instead of a panel."""

    def __init__(self, throughput: Throughput, console: Console | None = None) -> None:
        self.throughput = throughput
        self._console = console or Console(stderr=True)
        self._stack = contextlib.ExitStack()
        self.state: PanelState | None = None
        """None on other ranks, and before the start."""

    def on_start(self, trainer: "Trainer") -> None:
        """Print what will run and show the panel."""
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
        self.state = PanelState(title=config.output_dir, step=trainer.step, num_steps=config.training.num_steps)
        if self._console.is_terminal:
            live = Live(get_renderable=self._frame, console=self._console, refresh_per_second=2)
            self._stack.enter_context(live)

    def on_step(self, trainer: "Trainer", event: StepEvent) -> None:
        """Renew the numbers; between the steps that measure more, those stay."""
        if self.state is None:
            return
        self.state.step = event.step
        self.state.values |= step_values(event, self.throughput)
        if event.step % trainer.config.training.log_every == 0:
            self._line(f"step {event.step}/{self.state.num_steps} {_summary(self.state.values)}")

    def on_validation(self, trainer: "Trainer", step: int, reports: dict[str, LossReport]) -> None:
        """Show the validation losses."""
        if self.state is not None and reports:
            shown = ", ".join(f"{name} {report.loss:.3f}" for name, report in reports.items())
            self.state.validation = f"at step {step}: {shown}"
            self._line(f"step {step} validation: {shown}")

    def on_checkpoint(self, trainer: "Trainer", step: int, path: str) -> None:
        """Say where the checkpoint is."""
        if self.state is not None:
            self.state.checkpoint = f"at step {step}: {path}"
            self._line(f"step {step} checkpoint: {path}")

    def on_trouble(self, trainer: "Trainer", event: StepEvent, verdict: Verdict) -> None:
        """Say what is wrong, and what is done about it."""
        if self.state is not None:
            first, end = event.samples
            unjudged = f"step {event.step}: {event.report.skipped}; not updated; samples {first} to {end - 1}"
            done = "" if verdict.action == "continue" else f" ({verdict.action})"
            text = (verdict.reason or unjudged) + done
            self.state.warnings.append(text)
            self._line(f"warning: {text}")

    def on_end(self, trainer: "Trainer") -> None:
        """Leave the last frame where it is."""
        self._stack.close()

    def _frame(self) -> RenderableType:
        assert self.state is not None
        return panel(self.state)

    def _line(self, text: str) -> None:
        # On a terminal the panel shows it already, and lines would push it up.
        if not self._console.is_terminal:
            print(text, file=sys.stderr, flush=True)


def _summary(values: dict[str, float]) -> str:
    parts = {"text": values["loss_text"], "image": values["loss_image"]}
    by_modality = ", ".join(f"{name} {value:.3f}" for name, value in parts.items() if math.isfinite(value))
    return f"loss {values['loss']:.3f} ({by_modality}) {values['tokens_per_second']:,.0f} tok/s"
