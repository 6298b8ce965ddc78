"""Training an image tokenizer from pictures to its folder: resume, metrics, report, reconstructions."""

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megachameleon.console import progress_bar
from megachameleon.files import require_free_space, require_usable_folder, write_json, write_text
from megachameleon.tokens.vq.evaluation import Scores, evaluate
from megachameleon.tokens.vq.job import Job, make_trainer, open_feed
from megachameleon.tokens.vq.perceptual import FrechetDistance
from megachameleon.tokens.vq.processes import of_all_processes, rank_and_world
from megachameleon.tokens.vq.quality import psnr_of_error
from megachameleon.tokens.vq.report import (
    METRICS_FILE,
    PICTURES_FOLDER,
    RECONSTRUCTIONS_FILE,
    draw_pairs,
    sheet_columns,
    write_page,
)
from megachameleon.tokens.vq.resume import (
    CHECKPOINT_FILE,
    Progress,
    cut_metrics,
    is_complete,
    read_checkpoint,
    write_checkpoint,
)
from megachameleon.tokens.vq.tokenizer import save_image_tokenizer
from megachameleon.tokens.vq.trainer import Trainer

QUARANTINE_FILE = "quarantine.jsonl"
"""`origin` and `reason` of each picture that could not be used."""
REPORT_FILE = "report.json"
"""Figures of the finished tokenizer."""
SHEET_ROWS = 6
"""Of held-out pictures in the report."""
OTHER_BYTES = 100_000_000
"""Room for everything beside checkpoints and weights."""


def run_job(job: Job, device: torch.device, say: Callable[[str], None] = print) -> None:
    """Train, or go on training, the image tokenizer of `job`; do nothing if it is complete.

    Every process of a group calls this; process 0 writes.

    Args:
        say: receives the lines for the person at the terminal, on process 0 only.

    Raises:
        ValueError: unusable input, too little disk, or an output folder of another job.
    """
    _Run(job, device, say).run()
    if dist.is_initialized():
        # no process may end, and its launcher stop the others, while process 0 writes
        dist.barrier()


class _Run:
    """One process's part in a job."""

    def __init__(self, job: Job, device: torch.device, say: Callable[[str], None]) -> None:
        self.job, self.device = job, device
        self.main = rank_and_world()[0] == 0
        self.say = say if self.main else lambda line: None
        self.quarantine: dict[str, str] = {}
        self.shared = 0

    def run(self) -> None:
        job = self.job
        if is_complete(job.output, job.flags):
            self.say(f"{job.output}: complete already; nothing to do")
            return
        require_usable_folder(job.output)
        checkpoint = read_checkpoint(job.output, job.flags)
        self.frechet = FrechetDistance(job.fid_weights, self.device) if job.fid_weights else None
        self.trainer = make_trainer(job, self.device)
        # before pictures are read, which may take long
        require_free_space(job.output, _disk_bytes(self.trainer), "training an image tokenizer")
        self.feed = open_feed(job, self.trainer, progress=self.main)
        try:
            progress = self._restore(checkpoint)
            self._require_same_start(progress)
            if self.main:
                self._prepare_folder(progress)
            self._finish(self._train(progress))
        finally:
            self.feed.close()

    def _restore(self, checkpoint: tuple[Progress, str, dict[str, Tensor]] | None) -> Progress:
        if checkpoint is None:
            return Progress()
        progress, pictures, tensors = checkpoint
        if pictures != self.feed.fingerprint:
            raise ValueError(
                f"{self.job.output / CHECKPOINT_FILE}: was trained on other pictures than --input holds now; "
                "bring them back, or give another --output"
            )
        self.trainer.load_state(tensors)
        return progress

    def _require_same_start(self, progress: Progress) -> None:
        for process, start in enumerate(starts := of_all_processes((self.feed.fingerprint, progress.step))):
            if start != starts[0]:
                raise ValueError(
                    f"--input, --output: process {process} finds other pictures or another checkpoint there than "
                    "process 0; give folders that all machines share"
                )

    def _prepare_folder(self, progress: Progress) -> None:
        self.job.output.mkdir(parents=True, exist_ok=True)
        path = self.job.output / QUARANTINE_FILE
        if progress.step and path.exists():
            entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            self.quarantine = {entry["origin"]: entry["reason"] for entry in entries}
        self._write_quarantine(self.feed.quarantine)
        cut_metrics(self.job.output / METRICS_FILE, progress.step)
        for note in self.job.missing:
            self.say(note)
        if progress.step:
            self.say(f"going on from step {progress.step} of {self.job.training.steps}")

    def _train(self, progress: Progress) -> Progress:
        """Run the remaining steps."""
        job, steps = self.job, self.job.training.steps
        begun = time.monotonic() - progress.seconds
        with progress_bar("image tokenizer", steps, enabled=self.main, done=progress.step) as bar:
            for step in range(progress.step, steps):
                self.trainer.prepare(step, self.feed.sample)
                terms = self.trainer.step(step, self.feed.batch(step))
                progress = Progress(step + 1, time.monotonic() - begun)
                bar.advance()
                self._look(progress, terms, bar.note)
                if progress.step < steps and progress.step % job.checkpoint_every == 0:
                    self._save(progress, terms)
        return progress

    def _look(self, progress: Progress, terms: dict[str, Tensor], note: Callable[[str], None]) -> None:
        """Log, evaluate and draw when it is time to."""
        job, done, last = self.job, progress.step, progress.step == self.job.training.steps
        coded = done > job.training.first_quantized_step and not last  # the end has its own evaluation
        scores = None
        if coded and job.evaluate_every and done % job.evaluate_every == 0:
            scores = self._evaluate(self.feed.held_out)
        if done % job.log_every == 0 or last or scores is not None:
            entry = self._entry(progress, terms, scores)
            if self.main:
                with (job.output / METRICS_FILE).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
            note(f"loss {entry['loss']:.3f}  PSNR {entry['psnr']:.1f} dB")
            self._share_quarantine()
        if self.main and coded and job.pictures_every and done % job.pictures_every == 0:
            self._draw(job.output / PICTURES_FOLDER / f"step-{done:08d}.png", rows=1)

    def _entry(self, progress: Progress, terms: dict[str, Tensor], scores: Scores | None) -> dict[str, Any]:
        values = {name: float(term) for name, term in terms.items()}
        _require_finite(values, progress.step)
        entry: dict[str, Any] = {
            "step": progress.step,
            **values,
            "psnr": psnr_of_error(values["l2"] / 4),  # pixels span -1..1 there, 0..1 here
            "learning_rate": self.trainer.learning_rate(progress.step - 1),
            "seconds": round(progress.seconds, 2),
        }
        if scores is not None:
            entry |= _held_out(scores) | {"perplexity": scores.perplexity, "codes_in_use": scores.codes_in_use}
        return entry

    def _save(self, progress: Progress, terms: dict[str, Tensor]) -> None:
        _require_finite({name: float(term) for name, term in terms.items()}, progress.step)
        self._share_quarantine()
        if self.main:
            state = self.trainer.state()
            # a sum is finite only if all values are, and needs one read of the device
            sums = {name: float(tensor.sum(dtype=torch.float64)) for name, tensor in state.items()}
            # never in the place of a good checkpoint: one NaN in the state would end every resumed run
            _require_finite(sums, progress.step)
            write_checkpoint(self.job.output, self.job.flags, self.feed.fingerprint, progress, state)

    def _finish(self, progress: Progress) -> None:
        """Write the report and the reconstructions, then the tokenizer's files, which mark the job complete."""
        job = self.job
        held_out, trained_on = self._evaluate(self.feed.held_out), self._evaluate(self.feed.trained_on, psnr_only=True)
        self._share_quarantine()
        if not self.main:
            return
        report = self._report(progress, held_out, trained_on)
        self._draw(job.output / RECONSTRUCTIONS_FILE, rows=SHEET_ROWS)
        write_json(job.output / REPORT_FILE, report)
        write_page(job.output, report, job.missing)
        provenance = {"flags": job.flags, "pictures": self.feed.fingerprint, "report": report}
        # last, because its configuration marks the job complete
        save_image_tokenizer(job.output, job.shape, self.trainer.evaluated, self.trainer.codebook, provenance)
        (job.output / CHECKPOINT_FILE).unlink(missing_ok=True)
        self.say(
            f"held-out PSNR {report['psnr_held_out']:.2f} dB, {report['codes_in_use']} of {report['num_codes']} codes "
            f"in use, {report['num_train']} pictures, {report['num_quarantined']} set aside: {job.output}"
        )

    def _report(self, progress: Progress, held_out: Scores, trained_on: Scores) -> dict[str, Any]:
        both = Scores(pictures=0, psnr=0, ssim=None, rfid=None, counts=held_out.counts + trained_on.counts)
        return {
            **_held_out(held_out),
            "psnr_train": trained_on.psnr,
            "codes_in_use": both.codes_in_use,
            "num_codes": self.trainer.codebook.num_codes,
            "perplexity": both.perplexity,
            "codes_per_image": self.job.shape.grid**2,
            "image_size": self.job.shape.image_size,
            "steps": progress.step,
            "seconds": round(progress.seconds, 1),
            "processes": self.trainer.world_size,
            "device": str(self.device),
            "num_train": self.feed.num_train,
            "num_held_out": held_out.pictures,
            "num_files": self.feed.num_files,
            "num_duplicates": self.feed.num_duplicates,
            "num_quarantined": len(self.quarantine),
        }

    def _evaluate(self, chunks: Callable[[], Iterable[Tensor]], psnr_only: bool = False) -> Scores:
        return evaluate(
            self.trainer.reconstruct,
            chunks(),
            self.trainer.codebook.num_codes,
            self.device,
            with_ssim=not psnr_only,
            frechet=None if psnr_only else self.frechet,
        )

    def _draw(self, path: Path, rows: int) -> None:
        pictures = self.feed.shown(rows * sheet_columns(self.job.shape.image_size))
        chunks = pictures.split(self.trainer.evaluation_batch)
        draw_pairs(path, pictures, torch.cat([self.trainer.reconstruct(chunk)[0] for chunk in chunks]))

    def _share_quarantine(self) -> None:
        """Let process 0 write what every process has set aside."""
        mine = self.feed.quarantine[self.shared :]
        self.shared += len(mine)
        entries = [entry for theirs in of_all_processes(mine) for entry in theirs]
        if self.main:
            self._write_quarantine(entries)

    def _write_quarantine(self, entries: list[dict[str, str]]) -> None:
        path, before = self.job.output / QUARANTINE_FILE, len(self.quarantine)
        for entry in entries:
            self.quarantine.setdefault(entry["origin"], entry["reason"])
        if len(self.quarantine) > before or not path.exists():
            lines = [json.dumps({"origin": origin, "reason": why}) for origin, why in sorted(self.quarantine.items())]
            write_text(path, "".join(f"{line}\n" for line in lines))


def _held_out(scores: Scores) -> dict[str, Any]:
    return {"psnr_held_out": scores.psnr, "ssim_held_out": scores.ssim, "rfid_held_out": scores.rfid}


def _require_finite(values: dict[str, float], step: int) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(
                f"step {step}: {name} is {value}; the last checkpoint is from before, give a smaller --learning-rate "
                "and another --output"
            )


def _disk_bytes(trainer: Trainer) -> int:
    """Two checkpoints, for the new one is written before the old one goes, and the tokenizer."""
    state = sum(tensor.nbytes for tensor in trainer.state().values())
    return 2 * state + sum(tensor.nbytes for tensor in trainer.evaluated.state_dict().values()) + OTHER_BYTES
