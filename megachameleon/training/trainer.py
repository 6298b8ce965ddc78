"""Builds a run from its configuration and drives it to its last step."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from megachameleon.checkpoint.folder import CONFIG_FILE, MANIFEST_FILE, complete_checkpoints
from megachameleon.checkpoint.loading import (
    load_checkpoint,
    require_same_model,
    require_same_optimizer,
    saved_config,
    saved_vocabulary,
)
from megachameleon.checkpoint.saving import save_checkpoint
from megachameleon.config import RunConfig, save_config
from megachameleon.data.blending.blending import what_changed
from megachameleon.files import require_free_space
from megachameleon.model.decoder import build_chunks
from megachameleon.model.kernels.table import choose_kernels, start_kernels
from megachameleon.parallel.context import ParallelContext
from megachameleon.parallel.device import multiplies_bfloat16, peak_memory
from megachameleon.parallel.optimizer import apply_settings, build_optimizer, build_schedule
from megachameleon.parallel.replicas import gather_parameters, wrap_replicas
from megachameleon.training.batches import TrainingData, require_enough_samples
from megachameleon.training.callbacks.base import Callback, StepEvent
from megachameleon.training.step import StepReport, TrainingState, train_step, validate

CHECKPOINT_FOLDER = "checkpoints"


class Trainer:
    """A run: model, optimizer and position. Callbacks read its public attributes."""

    def __init__(
        self, config: RunConfig, context: ParallelContext, data: TrainingData, callbacks: Sequence[Callback]
    ) -> None:
        """Build the model and resume from the newest checkpoint of the output folder, if there is one.

        Raises:
            ValueError: vocabulary and model disagree, the disk is too small, or the checkpoint is of another model,
                vocabulary or data.
        """
        self.config = resolve_precision(config, context.device)
        self.context = context
        self.data = data
        self.callbacks = callbacks
        self.step = 0
        self.consumed_samples = 0
        self.folder = Path(config.output_dir)
        self.checkpoint_folder = self.folder / CHECKPOINT_FOLDER
        require_vocabulary_size(config, data.vocabulary.size)
        self.kernels = choose_kernels(config.kernels)
        self.state = self._build()
        self._resume()
        require_enough_samples(data, config.training, done=self.step, consumed=self.consumed_samples)
        self._require_disk()

    @property
    def precision(self) -> str:
        """bf16 or fp32."""
        return self.config.training.precision

    def run(self) -> None:
        """Train to the last step, validating and saving on the way."""
        if self.context.is_main:
            save_config(self.config, self.folder / CONFIG_FILE)
        self.context.barrier()
        try:
            for callback in self.callbacks:
                callback.on_start(self)
            while self.step < self.config.training.num_steps:
                self._advance()
                if self._due(self.config.training.validate_every):
                    self._validate()
                if self._due(self.config.checkpoint.every):
                    self._save()
        finally:
            for callback in self.callbacks:
                callback.on_end(self)

    def _advance(self) -> None:
        start = time.perf_counter()
        report = train_step(
            self.state, self.data.train, self.config, self.context, step=self.step, consumed=self.consumed_samples
        )
        self.step += 1
        self.consumed_samples += self.config.training.global_batch_size
        event = self._event(report, time.perf_counter() - start)
        for callback in self.callbacks:
            callback.on_step(self, event)

    def _event(self, report: StepReport, seconds: float) -> StepEvent:
        positions = self.config.training.global_batch_size * self.config.data.sequence_length
        return StepEvent(
            step=self.step,
            report=report,
            seconds=seconds,
            tokens=self.consumed_samples * self.config.data.sequence_length,
            tokens_per_second=positions / seconds,
            memory_bytes=peak_memory(self.context.device),
        )

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.training.num_steps)

    def _validate(self) -> None:
        gather_parameters(self.state.model, self.config.parallel)
        reports = {
            name: validate(self.state.model, samples, self.config, self.context)
            for name, samples in self.data.validation.items()
        }
        for callback in self.callbacks:
            callback.on_validation(self, self.step, reports)

    def _save(self) -> None:
        gather_parameters(self.state.model, self.config.parallel)
        path = save_checkpoint(
            self.checkpoint_folder,
            self.state.model,
            self.state.optimizer,
            self.config,
            self.data.vocabulary,
            self.context,
            step=self.step,
            consumed_samples=self.consumed_samples,
            data_fingerprint=self._data_fingerprint(self.consumed_samples),
            tokenizers=self.data.tokenizers,
        )
        for callback in self.callbacks:
            callback.on_checkpoint(self, self.step, str(path))

    def _build(self) -> TrainingState:
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        config = self.config
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
        checkpoint = self._newest_checkpoint()
        if checkpoint is None:
            return
        require_resumable(checkpoint, self.config)
        manifest = load_checkpoint(checkpoint, self.state.model, self.state.optimizer, self.context)
        apply_settings(self.state.optimizer, self.config.optimizer)
        saved = saved_vocabulary(checkpoint, manifest)
        saved.require_same(self.data.vocabulary, f"checkpoint {checkpoint}", "data.tokenizer")
        history = self._data_fingerprint(manifest.consumed_samples)
        if manifest.data_fingerprint != history:
            raise ValueError(
                f"{checkpoint}: its first {manifest.consumed_samples} samples came from other data, seed, "
                f"sequence_length or weights than the configuration gives now "
                f"({what_changed(manifest.data_fingerprint, history)}); restore them (a later stage may be appended) "
                "or choose another output_dir"
            )
        self.step, self.consumed_samples = manifest.step, manifest.consumed_samples

    def _newest_checkpoint(self) -> Path | None:
        """The main process chooses, so that a slow file system cannot let ranks resume from different steps."""
        found = complete_checkpoints(self.checkpoint_folder) if self.context.is_main else []
        choice = [found[-1].name if found else None]
        dist.broadcast_object_list(choice, src=0)
        if choice[0] is None:
            return None
        checkpoint = self.checkpoint_folder / choice[0]
        if not (checkpoint / MANIFEST_FILE).is_file():
            raise ValueError(
                f"output_dir: process {self.context.rank} does not see {checkpoint}; "
                "output_dir must be on a file system that all nodes share"
            )
        return checkpoint

    def _data_fingerprint(self, position: int) -> str:
        return self.data.train.history(position)

    def _require_disk(self) -> None:
        per_parameter = 12 if self.precision == "fp32" else 14  # weight, its fp32 master in bf16 runs, two moments
        size = self.config.model.num_parameters * per_parameter
        kept = self.config.checkpoint.keep_last + 1
        require_free_space(self.folder, size * kept, f"keeping {kept} checkpoints")


def require_resumable(checkpoint: Path, config: RunConfig) -> None:
    """Refuse to go on from a checkpoint with another model, optimizer or sight between documents.

    Raises:
        ValueError: names what to set back.
    """
    before = saved_config(checkpoint)
    require_same_model(checkpoint, before.model, config.model)
    require_same_optimizer(checkpoint, before, config)
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
