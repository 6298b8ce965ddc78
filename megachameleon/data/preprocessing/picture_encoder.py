"""Prepared pictures to codes, on a GPU or on several threads of a CPU; the codes are the same for any number of them.

Rounding depends on how many threads share the work on a picture, and could turn a near tie between two codes. So each
batch is computed by one thread, and threads compute batches side by side. That is also faster where worker processes
keep the cores busy: threads that share a picture wait for each other at each step.
"""

from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from megachameleon.tokens.vq import ImageTokenizer

MAX_THREADS = 16
"""Threads unless a number is asked for; at 512 pixels, each takes 0.4 GB."""


class PictureEncoder:
    """An image tokenizer in several threads."""

    def __init__(self, tokenizer: "ImageTokenizer", num_threads: int | None = None) -> None:
        """
        Args:
            tokenizer: on the device that is to encode.
            num_threads: of a CPU; None for PyTorch's number, at most `MAX_THREADS`.
        """
        import torch

        self._threads_before = torch.get_num_threads()
        self._threads: ThreadPoolExecutor | None = None
        self._tokenizers: SimpleQueue[ImageTokenizer] = SimpleQueue()
        count = 1
        if tokenizer.device.type == "cpu":
            count = num_threads or min(self._threads_before, MAX_THREADS)
            # OpenMP's number of threads belongs to the thread that sets it
            self._threads = ThreadPoolExecutor(count, "pictures", torch.set_num_threads, (1,))
        for _ in range(count):
            # a twin for each thread, since a network's work buffers cannot be shared
            self._tokenizers.put(tokenizer.twin())
        self._together = tokenizer.encode_batch
        self.batch_size = count * self._together
        """Pictures to encode at once."""

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """Pictures uint8 [B, 3, size, size] to codes int32 [B, codes_per_image]."""
        from megachameleon.tokens.vq.tokenizer import without_tf32

        batches = [pictures[start : start + self._together] for start in range(0, len(pictures), self._together)]
        apply = map if self._threads is None else self._threads.map
        with without_tf32():  # the setting is the process's: threads that change it would disturb each other
            return np.concatenate(list(apply(self._encode, batches)))

    def close(self) -> None:
        """End the threads, and let PyTorch have as many as before."""
        if self._threads is not None:
            import torch

            self._threads.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads_before)

    def _encode(self, pictures: np.ndarray) -> np.ndarray:
        tokenizer = self._tokenizers.get()
        try:
            return tokenizer.encode(pictures).numpy().astype(np.int32)
        finally:
            self._tokenizers.put(tokenizer)
