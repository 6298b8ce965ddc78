"""Builds a run from its configuration and drives it to its last step."""

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from megachameleon.checkpoint.folder import CONFIG_FILE, read_manifest, step_of
from megachameleon.checkpoint.loading import require_same_model, saved_config, saved_vocabulary
from megachameleon.checkpoint.saving import SaveError
from megachameleon.config import RunConfig, save_config
from megachameleon.config.durations import parse_duration
from megachameleon.console import FailureError
from megachameleon.data.blending.blending import what_changed
from megachameleon.model.decoder import build_chunks
from megachameleon.model.kernels.table import choose_kernels, start_kernels
from megachameleon.parallel.context import ParallelContext
from megachameleon.parallel.device import multiplies_bfloat16, peak_memory
from megachameleon.parallel.optimizer import build_optimizer, build_schedule
from megachameleon.parallel.replicas import gather_parameters, wrap_replicas
from megachameleon.training.agreement import OwnSigns, any_asks
from megachameleon.training.batches import TrainingData, require_enough_samples
from megachameleon.training.callbacks.base import Callback, StepEvent
from megachameleon.training.checkpointing import CHECKPOINT_FOLDER, Checkpointer
from megachameleon.training.health.build import build_guards
from megachameleon.training.health.guards import gravest, tightest
from megachameleon.training.monitors.build import build_monitors
from megachameleon.training.progress import Progress
from megachameleon.training.pulse import Peer, Pulse
from megachameleon.training.rollback import roll_back
from megachameleon.training.step import StepReport, TrainingState, train_step, validate
from megachameleon.training.stopping import Listener, StoppedError, StopRequests, describe_stop
from megachameleon.training.stragglers import ForwardClock, StragglerWatch


class _CutShortError(Exception):
    """A request to stop, in the midst of what is long and may be left out."""

    def __init__(self, stop: int) -> None:
        self.stop = stop


class Trainer:
    """A run: model, optimizer and progress. Callbacks read its public attributes."""

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        data: TrainingData,
        callbacks: Sequence[Callback],
        listener: Listener | None = None,
        pulse: Pulse | None = None,
        peers: Sequence[Peer] = (),
    ) -> None:
        """Build the model and resume from the newest checkpoint of the output folder, if there is one.

        Args:
            listener: what hears of signals; None: nobody does.
            pulse: is told what goes on.
            peers: all processes, by rank; needed to name slow ones.

        Raises:
            StoppedError: a rank was asked to stop meanwhile.
            ValueError: vocabulary and model disagree, the disk is too small, or the checkpoint is of another model,
                vocabulary or data.
        """
        duration = config.faults.max_duration
        self.config = resolve_precision(config, context.device)
        self.context = context
        self.data = data
        self.callbacks = callbacks
        self.progress = Progress()
        self.folder = Path(config.output_dir)
        self.pulse = pulse or Pulse(rank=context.rank)
        self.stragglers = StragglerWatch(
            peers, factor=config.faults.straggler_factor, window=config.faults.straggler_window
        )
        self.requests = StopRequests(
            self.folder,
            is_main=context.is_main,
            max_duration=parse_duration(duration, "faults.max_duration") if duration else None,
            listener=listener or Listener(),
        )
        self.checkpointer = Checkpointer(self.folder / CHECKPOINT_FOLDER, self.config, context, data)
        self.guards = build_guards(self.config)
        require_vocabulary_size(config, data.vocabulary.size)
        self.kernels = choose_kernels(config.kernels)
        self.state = self._build()
        self.monitors = build_monitors(self)
        self._leave_if_asked()
        self._resume()
        # What was just loaded need not be saved again.
        self._saved_step = self.step
        self._clock = ForwardClock(context.device)
        self._busy_seconds = 0.0
        self._leave_if_asked()
        require_enough_samples(data, config.training, done=self.step, consumed=self.progress.consumed_samples)
        self.checkpointer.require_room(max(sum(peer.host == self.pulse.me.host for peer in peers), 1))

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.progress.step

    @property
    def precision(self) -> str:
        """bf16 or fp32."""
        return self.config.training.precision

    def run(self) -> None:
        """Train to the last step, saving and validating on the way.

        Raises:
            StoppedError: it was asked to stop before; all that was trained is saved.
        """
        if self.context.is_main:
            save_config(self.config, self.folder / CONFIG_FILE)
        self.context.barrier()
        try:
            for callback in self.callbacks:
                callback.on_start(self)
            self._end(self._loop())
        except BaseException as error:
            if isinstance(error, FailureError):  # on which all ranks agree
                self._finish_save()
            for callback in self.callbacks:
                with contextlib.suppress(Exception):  # what ended the run is to be told, not what follows from it
                    callback.on_end(self)
            raise
        for callback in self.callbacks:
            callback.on_end(self)

    def _loop(self) -> int:
        """Steps, with all that comes between them; returns the request to stop that ended it, or 0."""
        self.pulse.enter("training")
        self.pulse.beat(self.step, first_step=self.step, num_steps=self.config.training.num_steps)
        stop = 0
        while self.step < self.config.training.num_steps and not stop:
            event = self._advance()
            stop = event.report.agreement.stop
            if self._judge(event):
                continue
            # Before a validation: where the time is short, the checkpoint matters.
            if stop or self._due(self.config.checkpoint.every):
                self._save()
            if self._due(self.config.training.validate_every) and not stop:
                stop = self._validate()
            self._announce_checkpoints()
            self.pulse.enter("training")
        return stop

    def _end(self, stop: int) -> None:
        """Wait until all is on disk, and say whether the run was asked to stop before its last step."""
        if stop:
            self._save()
        self.pulse.enter("stopping")
        self.checkpointer.wait()
        self._announce_checkpoints()
        self.context.barrier()  # no rank leaves as if all were well before the main process has seen it whole
        reason = self.requests.obeyed(stop) if stop else ""
        if self.step < self.config.training.num_steps:
            raise StoppedError(f"{reason}; step {self.step} is saved")

    def _finish_save(self) -> None:
        """Before a failure on which all ranks agree: the checkpoint that is being written must not die with them."""
        self.pulse.enter("stopping")
        try:
            self.checkpointer.wait()
        except SaveError as error:  # said beside the failure, not in its place
            print(error, file=sys.stderr, flush=True)
        self.context.barrier()  # the launcher ends all when the first one leaves

    def _leave_if_asked(self) -> None:
        """End the start-up on all ranks if one was asked to stop. Nothing is saved, since nothing was trained."""
        if code := any_asks(self.requests.listener.received, self.context):
            raise StoppedError(f"{describe_stop(code)}; nothing was trained yet")

    def _advance(self) -> StepEvent:
        """One step, and what callbacks make of it."""
        start = time.perf_counter()
        before = self.progress
        report = train_step(
            self.state,
            self.data.train,
            self.config,
            self.context,
            step=before.step,
            consumed=before.consumed_samples,
            own=lambda: OwnSigns(stop=self.requests.own(), busy_seconds=self._busy_seconds),
            limits=tightest([guard.limits() for guard in self.guards]),
            lr_factor=before.lr_factor,
            monitors=self.monitors,
            clock=self._clock,
        )
        # The report has been read, so the device has finished and its events can be.
        self._busy_seconds = self._clock.take()
        consumed = before.consumed_samples + self.config.training.global_batch_size
        self.progress = replace(before, step=before.step + 1, consumed_samples=consumed)
        self.requests.limit.stepped()
        event = self._event(report, before.consumed_samples, time.perf_counter() - start)
        self.pulse.beat(self.step, samples=consumed, loss=report.losses.loss)
        if self.context.is_main:
            for line in self.stragglers.observe(self.step, report.agreement.busy_seconds, event.seconds):
                print(line, file=sys.stderr, flush=True)
        for callback in self.callbacks:
            callback.on_step(self, event)
        return event

    def _event(self, report: StepReport, first_sample: int, seconds: float) -> StepEvent:
        positions = self.config.training.global_batch_size * self.config.data.sequence_length
        return StepEvent(
            step=self.step,
            report=report,
            seconds=seconds,
            samples=(first_sample, self.progress.consumed_samples),
            tokens=self.progress.consumed_samples * self.config.data.sequence_length,
            tokens_per_second=positions / seconds,
            memory_bytes=peak_memory(self.context.device),
        )

    def _judge(self, event: StepEvent) -> bool:
        """Ask the guards, tell the callbacks, and do what they say; whether the run was rolled back.

        Raises:
            FailureError: a guard wants the run to stop, on all ranks alike. Nothing is saved.
        """
        verdict = gravest([guard.judge(event) for guard in self.guards])
        if verdict.reason or event.report.skipped:
            for callback in self.callbacks:
                callback.on_trouble(self, event, verdict)
        if event.report.skipped and not self.guards:
            raise FailureError(f"step {event.step}: {event.report.skipped}; the last checkpoint is untouched")
        if verdict.action == "stop":
            raise FailureError(f"{verdict.reason}; stopped, the last checkpoint is untouched")
        if verdict.action == "lower_lr":
            self.progress = replace(self.progress, lr_factor=self.progress.lr_factor * verdict.lr_scale)
        if verdict.action != "rollback":
            return False
        self.pulse.enter("loading")
        roll_back(self, event, verdict)
        self._saved_step = self.step
        for callback in self.callbacks:  # for them it is a new start: what was written of undone steps goes
            callback.on_end(self)
        for callback in self.callbacks:
            callback.on_start(self)
        self.pulse.enter("training")
        return True

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.training.num_steps)

    def _validate(self) -> int:
        """Losses of all validation sets, for the callbacks; or the request to stop that cut them short."""
        self.pulse.enter("validating")
        gather_parameters(self.state.model, self.config.parallel)
        try:
            reports = {
                name: validate(self.state.model, samples, self.config, self.context, self._go_on)
                for name, samples in self.data.validation.items()
            }
            self._go_on()
        except _CutShortError as cut:
            return cut.stop
        for callback in self.callbacks:
            callback.on_validation(self, self.step, reports)
        self.requests.limit.rested()
        return 0

    def _go_on(self) -> None:
        """Raise on all ranks if one was asked to stop."""
        self.pulse.beat()
        if stop := any_asks(self.requests.own(), self.context):
            raise _CutShortError(stop)

    def _save(self) -> None:
        """Save, unless this very step is saved already."""
        if self._saved_step == self.step:
            return
        self.pulse.enter("saving")
        gather_parameters(self.state.model, self.config.parallel)
        self.progress = replace(
            self.progress,
            guards={guard.name: guard.state_dict() for guard in self.guards},
            callbacks={callback.name: callback.state_dict() for callback in self.callbacks if callback.name},
        )
        self.checkpointer.save(self.state, self.progress)
        self._saved_step = self.step

    def _announce_checkpoints(self) -> None:
        for path in self.checkpointer.finished():
            assert self.checkpointer.last is not None
            self.requests.limit.saved(self.checkpointer.last.seconds)
            for callback in self.callbacks:
                callback.on_checkpoint(self, step_of(path), str(path))

    def _build(self) -> TrainingState:
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        config = self.config
        # Weights are drawn on the CPU and then moved: the same numbers on every device.
        decoders = build_chunks(
            config.model, config.parallel, self.kernels, self.context.groups, dtype=dtype, seed=config.training.seed
        )
        start_kernels(
            self.kernels,
            num_tokens=config.data.sequence_length
            * config.training.micro_batch_size
            // config.parallel.context_parallel,
            hidden_size=config.model.hidden_size,
            tensor_parallel=config.parallel.tensor_parallel,
        )
        model = wrap_replicas([decoder.to(self.context.device) for decoder in decoders], config.parallel)
        optimizer = build_optimizer(model, config.optimizer, config.parallel, self.kernels.resolved)
        schedule = build_schedule(optimizer, config.optimizer, config.training.num_steps)
        return TrainingState(model=model, optimizer=optimizer, schedule=schedule)

    def _resume(self) -> None:
        checkpoint = self.checkpointer.newest()
        if checkpoint is None:
            self.checkpointer.initialize(self.state)
            return
        require_resumable(checkpoint, self.config)
        manifest = read_manifest(checkpoint)
        saved = saved_vocabulary(checkpoint, manifest)
        saved.require_same(self.data.vocabulary, f"checkpoint {checkpoint}", "data.tokenizer")
        # Of what was consumed only: what a later stage will draw may be changed.
        history = self.data.train.history(manifest.consumed_samples)
        if manifest.data_fingerprint != history:
            raise ValueError(
                f"{checkpoint}: its first {manifest.consumed_samples} samples came from other data, seed, "
                f"sequence_length or weights than the configuration gives now "
                f"({what_changed(manifest.data_fingerprint, history)}); restore them (a later stage may be appended) "
                "or choose another output_dir"
            )
        self.load(checkpoint)

    def load(self, checkpoint: Path) -> None:
        """Take weights, optimizer, progress and what guards and callbacks remember from a checkpoint of this run."""
        self.progress = self.checkpointer.load(checkpoint, self.state)
        self.pulse.beat(self.step, samples=self.progress.consumed_samples, num_steps=self.config.training.num_steps)
        for guard in self.guards:
            guard.load_state_dict(self.progress.guards.get(guard.name, {}))
        for callback in self.callbacks:
            if callback.name in self.progress.callbacks:
                callback.load_state_dict(self.progress.callbacks[callback.name])


def require_resumable(checkpoint: Path, config: RunConfig) -> None:
    """Refuse to go on from a checkpoint with another model, optimizer or sight between documents.

    Raises:
        ValueError: names what to set back.
    """
    before = saved_config(checkpoint)
    require_same_model(checkpoint, before.model, config.model)
    if before.data.isolate_documents != config.data.isolate_documents:
        raise ValueError(
            f"data.isolate_documents: {config.data.isolate_documents}, but {checkpoint} was trained with "
            f"{before.data.isolate_documents}; set it back or choose another output_dir"
        )


def resolve_precision(config: RunConfig, device: torch.device) -> RunConfig:
    """Replace `auto` by what the hardware multiplies natively.

    Raises:
        ValueError: that is fp32, and something else needs bf16.
    """
    if config.training.precision != "auto":
        return config
    precision: Literal["bf16", "fp32"] = "bf16" if multiplies_bfloat16(device) else "fp32"
    resolved = replace(config, training=replace(config.training, precision=precision))
    resolved.validate()
    return resolved


def require_vocabulary_size(config: RunConfig, vocabulary_size: int) -> None:
    """Refuse a model whose embedding does not have the tokenizer's size.

    Raises:
        ValueError: they differ.
    """
    if config.model.vocab_size != vocabulary_size:
        raise ValueError(
            f"model.vocab_size: {config.model.vocab_size}, but the vocabulary in data.tokenizer="
            f"{config.data.tokenizer} has {vocabulary_size} ids; set model.vocab_size={vocabulary_size}"
        )
