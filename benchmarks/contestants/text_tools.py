"""Ways from JSON lines to ids, which `benchmarks.text_preprocessing` compares."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from benchmarks.machine import PROJECT
from megachameleon.data.shards.format import DTYPE_CODES, IDX_HEADER, parse_idx
from megachameleon.tokens.text import TextTokenizer
from megachameleon.tokens.vocabulary import Vocabulary

Encode = Callable[[str], Sequence[int] | np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """One pass over the text."""

    cpu_seconds: float
    """Of all processes."""
    wall_seconds: float
    ids: np.ndarray
    """Of all documents in order, int64, as the mixed-modal vocabulary counts them, without bos and eos."""


class TextTool(Protocol):
    """What can be measured."""

    title: str
    starts: bool
    """Whether a pass starts processes, which takes time of its own."""

    def __call__(self, path: Path) -> Pass:
        """Tokenize a file of JSON lines."""
        ...


class Alone:
    """A tokenizer in memory, one document a call, loaded anew for each pass: it may remember words."""

    starts = False

    def __init__(self, load: Callable[[], Encode], shift: int, title: str) -> None:
        self.load, self.shift, self.title = load, shift, title

    def __call__(self, path: Path) -> Pass:
        """Only encoding is timed."""
        from benchmarks.corpora import read_texts

        encode, texts = self.load(), read_texts(path)
        wall, cpu = time.perf_counter(), time.process_time()
        encoded = [encode(text) for text in texts]
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        ids = np.concatenate([np.asarray(one, np.int64) for one in encoded])
        return Pass(cpu_seconds=cpu, wall_seconds=wall, ids=ids + self.shift)


class Ours:
    """`tools/preprocess_data.py run` with one worker."""

    title = "tools/preprocess_data.py run --workers 1"
    starts = True

    def __init__(self, tokenizer: Path) -> None:
        self.tokenizer = tokenizer

    def __call__(self, path: Path) -> Pass:
        """`run` is timed; `plan` is not."""
        tool = [sys.executable, str(PROJECT / "tools/preprocess_data.py")]
        with tempfile.TemporaryDirectory() as folder:
            plan = ["plan", "--input", str(path), "--output", folder, "--tokenizer", str(self.tokenizer)]
            timed_command([*tool, *plan])
            cpu, wall = timed_command([*tool, "run", "--output", folder, "--workers", "1"])
            prefixes = sorted(file.with_suffix("") for file in Path(folder).glob("*.idx"))
            documents = [document[1:-1] for prefix in prefixes for document in read_documents(prefix)]
        return Pass(cpu_seconds=cpu, wall_seconds=wall, ids=np.concatenate(documents))


class MegatronLM:
    """Megatron-LM's `tools/preprocess_data.py` with one worker."""

    starts = True

    def __init__(self, checkout: Path, tokenizer: Path, shift: int) -> None:
        self.checkout, self.model, self.shift = checkout, tokenizer / "text.model", shift
        self.title = f"{checkout / 'tools/preprocess_data.py'} --workers 1"

    def __call__(self, path: Path) -> Pass:
        """All of it is timed."""
        with tempfile.TemporaryDirectory() as folder:
            options = {
                "--input": path,
                "--output-prefix": f"{folder}/one",
                "--tokenizer-type": "SentencePieceTokenizer",
                "--tokenizer-model": self.model,
                "--workers": 1,
                "--log-interval": 10**9,
            }
            command = [sys.executable, self.checkout / "tools/preprocess_data.py"]
            command += [part for option in options.items() for part in option]
            cpu, wall = timed_command(list(map(str, command)), first_on_path=self.checkout)
            documents = read_documents(Path(folder) / "one_text_document")
        return Pass(cpu_seconds=cpu, wall_seconds=wall, ids=np.concatenate(documents) + self.shift)


def timed_command(command: Sequence[str], first_on_path: Path | None = None) -> tuple[float, float]:
    """Run a program; seconds of CPU in all its processes, and of the clock.

    Raises:
        ValueError: it failed.
    """
    python_path = [str(first_on_path or PROJECT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, python_path)), "OMP_NUM_THREADS": "1"}
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise ValueError(f"{' '.join(command[1:3])}: exit status {done.returncode}: {done.stderr[-800:]}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, wall


def read_documents(prefix: Path) -> list[np.ndarray]:
    """Documents of a pair of `.bin` and `.idx`, each int64 [n]."""
    index = prefix.with_suffix(".idx")
    content = index.read_bytes()
    code = content[IDX_HEADER.size - 2 * 8 - 1]
    dtype = next(np.dtype(name) for name, known in DTYPE_CODES.items() if known == code)
    ends = np.cumsum(parse_idx(content, index, dtype), dtype=np.int64)
    return np.split(np.fromfile(prefix.with_suffix(".bin"), dtype).astype(np.int64), ends[:-1])


def build_tools(names: Sequence[str], tokenizer_folder: Path, megatron_lm: Path | None) -> dict[str, TextTool]:
    """Contestants by name."""
    shift = Vocabulary.load(tokenizer_folder).text_start - 1

    def sentencepiece() -> TextTool:
        from sentencepiece import SentencePieceProcessor

        file = str(tokenizer_folder / "text.model")
        return Alone(
            lambda: SentencePieceProcessor(model_file=file).encode, shift, "sentencepiece's encode, one document a call"
        )

    def megatron() -> TextTool:
        if megatron_lm is None or not (megatron_lm / "tools/preprocess_data.py").is_file():
            raise ValueError(
                f"--megatron-lm {megatron_lm}: give a checkout, from git clone --branch core_v0.16.1 "
                "https://github.com/NVIDIA/Megatron-LM; it also needs pip install einops six triton"
            )
        return MegatronLM(megatron_lm.absolute(), tokenizer_folder, shift)

    builders: dict[str, Callable[[], TextTool]] = {
        "ours": lambda: Ours(tokenizer_folder.absolute()),
        "tokenizer": lambda: Alone(
            lambda: TextTokenizer.load(tokenizer_folder).encode_array,
            0,
            "our TextTokenizer.encode_array, one document a call",
        ),
        "sentencepiece": sentencepiece,
        "megatron-lm": megatron,
    }
    return {name: builders[name]() for name in names}
