"""Training an image tokenizer from pictures to its folder: resume, metrics, report, reconstructions."""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megachameleon.console import progress_bar
from megachameleon.files import atomic_path, read_json, require_free_space, write_json, write_text
from megachameleon.tokens.vq.network import PatchConfig
from megachameleon.tokens.vq.source import PictureSet, find_pictures, load_pictures
from megachameleon.tokens.vq.tokenizer import CONFIG_FILE, save_image_tokenizer
from megachameleon.tokens.vq.training import Trainer, TrainingConfig, psnr

CHECKPOINT_FILE = "checkpoint.safetensors"
METRICS_FILE = "metrics.jsonl"
QUARANTINE_FILE = "quarantine.jsonl"
REPORT_FILE = "report.json"
RECONSTRUCTIONS_FILE = "reconstructions.png"
DISK_BYTES = 200_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Everything that decides the result, and how often to save on the way."""

    inputs: tuple[Path, ...]
    output: Path
    shape: PatchConfig = field(default_factory=PatchConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    held_out: int = 200
    """Pictures that are not trained on, at most a tenth of all."""
    max_pictures: int = 50_000
    """Pictures in memory; more are sampled down to these."""
    checkpoint_every: int = 100
    log_every: int = 20

    @property
    def flags(self) -> dict[str, Any]:
        """The plain values that a resumed run must share."""
        return {
            "inputs": [str(path) for path in self.inputs],
            "shape": asdict(self.shape),
            "training": asdict(self.training),
            "held_out": self.held_out,
            "max_pictures": self.max_pictures,
        }


def run_job(job: Job, device: torch.device, say: Any = print) -> None:
    """Train, or go on training, the image tokenizer of `job`; do nothing if it is complete.

    Every process of a group calls this; process 0 writes.

    Args:
        say: receives the lines for the person at the terminal, on process 0 only.

    Raises:
        ValueError: unusable input, too little disk, or an output folder of another job.
    """
    main = not dist.is_initialized() or dist.get_rank() == 0
    if _is_complete(job):
        if main:
            say(f"{job.output}: complete already; nothing to do")
        return
    state = _read_checkpoint(job)
    require_free_space(job.output, DISK_BYTES, "training an image tokenizer")
    pictures = _load(job, main)
    trainer = Trainer(job.shape, job.training, device)
    start, seconds = _restore(job, trainer, pictures, state)
    if main:
        job.output.mkdir(parents=True, exist_ok=True)
        write_text(job.output / QUARANTINE_FILE, "".join(json.dumps(entry) + "\n" for entry in pictures.quarantine))
        _cut_metrics(job.output / METRICS_FILE, start)
        if start:
            say(f"going on from step {start} of {job.training.steps}")
    seconds = _train(job, trainer, pictures, start, seconds, main)
    if main:
        report = _finish(job, trainer, pictures, seconds)
        say(
            f"held-out PSNR {report['psnr_held_out']:.2f} dB, {report['codes_in_use']} of {report['num_codes']} codes "
            f"in use, {report['num_train']} pictures, {report['num_quarantined']} set aside: {job.output}"
        )
    if dist.is_initialized():
        dist.barrier()


def _train(job: Job, trainer: Trainer, pictures: PictureSet, start: int, seconds: float, main: bool) -> float:
    """Run the remaining steps; returns the seconds of all steps, those of interrupted runs included."""
    train = torch.from_numpy(pictures.train)
    steps, begun = job.training.steps, time.monotonic() - seconds
    with progress_bar("image tokenizer", steps, enabled=main, done=start) as bar:
        for step in range(start, steps):
            terms = trainer.step(step, train)
            done = step + 1
            bar.advance()
            if main and (done % job.log_every == 0 or done == steps):
                entry = _metrics_entry(done, terms, trainer.learning_rate(step), time.monotonic() - begun)
                with (job.output / METRICS_FILE).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
                bar.note(f"loss {entry['loss']:.3f}  PSNR {entry['psnr']:.1f} dB")
            if main and done % job.checkpoint_every == 0 and done < steps:
                _write_checkpoint(job, trainer, pictures, done, time.monotonic() - begun)
    return time.monotonic() - begun


def _metrics_entry(step: int, terms: dict[str, Tensor], learning_rate: float, seconds: float) -> dict[str, float]:
    values = {name: float(term) for name, term in terms.items()}
    error = values["l2"] / 4  # pixels span -1..1 there, 0..1 here
    return {
        "step": step,
        **values,
        "psnr": -10 * float(np.log10(max(error, 1e-10))),
        "learning_rate": learning_rate,
        "seconds": round(seconds, 2),
    }


def _finish(job: Job, trainer: Trainer, pictures: PictureSet, seconds: float) -> dict[str, Any]:
    """Write the report and the reconstructions, then the tokenizer's files, which mark the job complete."""
    held_out, train = torch.from_numpy(pictures.held_out), torch.from_numpy(pictures.train)
    held_out_again, held_out_counts = trainer.reconstruct(held_out)
    train_again, counts = trainer.reconstruct(train)
    shares = (counts + held_out_counts).double() / (counts + held_out_counts).sum()
    report = {
        "psnr_held_out": psnr(held_out, held_out_again),
        "psnr_train": psnr(train, train_again),
        "codes_in_use": int((shares > 0).sum()),
        "num_codes": job.training.num_codes,
        "perplexity": float(torch.exp(-(shares * shares.clamp(min=1e-12).log()).sum())),
        "codes_per_image": job.shape.grid**2,
        "image_size": job.shape.image_size,
        "steps": job.training.steps,
        "seconds": round(seconds, 1),
        "processes": trainer.world_size,
        "device": str(trainer.device),
        "num_train": len(train),
        "num_held_out": len(held_out),
        "num_files": pictures.num_files,
        "num_duplicates": pictures.num_duplicates,
        "num_quarantined": len(pictures.quarantine),
    }
    _draw_pairs(job.output / RECONSTRUCTIONS_FILE, held_out, held_out_again)
    write_json(job.output / REPORT_FILE, report)
    provenance = {"flags": job.flags, "pictures": pictures.fingerprint, "report": report}
    save_image_tokenizer(job.output, job.shape, trainer.network, trainer.codebook, provenance)
    (job.output / CHECKPOINT_FILE).unlink(missing_ok=True)
    return report


def _draw_pairs(path: Path, originals: Tensor, reconstructions: Tensor, columns: int = 12, rows: int = 6) -> None:
    """A PNG of originals, each row with its reconstructions below it."""
    n = min(len(originals), columns * rows)
    columns = min(columns, n)
    strips = []
    for start in range(0, n - n % columns, columns):
        for pictures in (originals, reconstructions):
            strip = pictures[start : start + columns].numpy()
            strips.append(np.concatenate(list(np.pad(strip, ((0, 0), (0, 0), (2, 2), (2, 2)), constant_values=255)), 2))
    with atomic_path(path) as temporary:
        Image.fromarray(np.concatenate(strips, 1).transpose(1, 2, 0)).save(temporary, "PNG")


def _load(job: Job, main: bool) -> PictureSet:
    files = find_pictures(job.inputs)
    with progress_bar("reading pictures", len(files), enabled=main) as bar:
        return load_pictures(
            files,
            job.shape.image_size,
            held_out=job.held_out,
            max_pictures=job.max_pictures,
            seed=job.training.seed,
            advance=bar.advance,
        )


def _is_complete(job: Job) -> bool:
    path = job.output / CONFIG_FILE
    if not path.exists():
        return False
    header = read_json(path)
    provenance = header.get("provenance") if isinstance(header, dict) else None
    _require_same_flags(job, provenance.get("flags") if isinstance(provenance, dict) else None, path)
    return True


def _require_same_flags(job: Job, saved: Any, path: Path) -> None:
    mine = json.loads(json.dumps(job.flags))
    if saved == mine:
        return
    saved = saved if isinstance(saved, dict) else {}
    different = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for before, now in _pairs_of_levels(saved, mine)
        for name in now
        if before.get(name) != now.get(name) and not isinstance(now.get(name), dict)
    ]
    raise ValueError(
        f"{path}: made with other flags ({'; '.join(different)}); give the same flags, or another --output"
    )


def _pairs_of_levels(saved: dict[str, Any], mine: dict[str, Any]) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    yield saved, mine
    for name in ("shape", "training"):
        yield saved.get(name) or {}, mine[name]


def _write_checkpoint(job: Job, trainer: Trainer, pictures: PictureSet, step: int, seconds: float) -> None:
    metadata = {
        "flags": json.dumps(job.flags),
        "pictures": pictures.fingerprint,
        "step": str(step),
        "seconds": str(seconds),
    }
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in trainer.state().items()}
    with atomic_path(job.output / CHECKPOINT_FILE) as temporary:
        save_file(tensors, temporary, metadata)


def _read_checkpoint(job: Job) -> tuple[dict[str, str], dict[str, Tensor]] | None:
    path = job.output / CHECKPOINT_FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        flags = json.loads(metadata["flags"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: damaged checkpoint ({error}); remove it to start from the first step") from None
    _require_same_flags(job, flags, path)
    return metadata, tensors


def _restore(
    job: Job, trainer: Trainer, pictures: PictureSet, state: tuple[dict[str, str], dict[str, Tensor]] | None
) -> tuple[int, float]:
    """Load the checkpoint, if any, into the trainer; returns its step and seconds."""
    if state is None:
        return 0, 0.0
    metadata, tensors = state
    if metadata["pictures"] != pictures.fingerprint:
        raise ValueError(
            f"{job.output / CHECKPOINT_FILE}: was trained on other pictures than --input holds now; "
            "bring them back, or give another --output"
        )
    trainer.load_state(tensors)
    return int(metadata["step"]), float(metadata["seconds"])


def _cut_metrics(path: Path, step: int) -> None:
    """Drop what an interrupted run logged after its last checkpoint."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() and step else []
    entries = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_text(path, "".join(f"{line}\n" for line in entries))
