"""Where the time of a step goes: data, forward, backward, communication, optimizer.

On a GPU the times are the device's: events in its stream, looked at after the step has been read, so nobody waits for
them. `data` is then what the device lost by waiting for data, not how long the host took to read it. On the CPU they
are the host's.

`communication` is what is left between the passes: transfers between pipeline stages and the bubble, and gradients
summed after the last backward. What runs inside a pass (tensor and context parallelism, gradients summed meanwhile)
counts there. `optimizer` begins with the gradient norm and the agreement of all ranks, so it holds the wait for slow
ones.
"""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megachameleon.training.monitors.base import Monitor
from megachameleon.training.monitors.forward_watch import ForwardWatch

if TYPE_CHECKING:
    from megachameleon.training.batches import Batch
    from megachameleon.training.step import TrainingState

Mark = float | torch.cuda.Event


class StepTimes(Monitor):
    """Of this process; recomputation is part of backward."""

    def __init__(self, watch: ForwardWatch) -> None:
        self.watch = watch
        self.on_gpu = watch.context.device.type == "cuda"
        self._spans: list[tuple[str, Mark, Mark]] = []
        self._step_begins: Mark | None = None
        self._update_begins: Mark | None = None
        self._forward_begins: Mark | None = None
        for decoder in watch.decoders:
            decoder.register_forward_pre_hook(self._enter)
            decoder.register_forward_hook(self._leave)

    def begin(self, step: int) -> None:
        """Start the clock."""
        self._spans = []
        self._step_begins = self._mark()

    def follow(self, batches: "Iterator[Batch]") -> "Iterator[Batch]":
        """Time each reading of a micro-batch."""
        batches = iter(batches)
        while True:
            start = self._mark()
            batch = next(batches, None)
            if batch is None:
                return
            self._spans.append(("data", start, self._mark()))
            yield batch

    def after_backward(self, state: "TrainingState") -> None:
        """Passes and their communication are done."""
        self._update_begins = self._mark()
        assert self._step_begins is not None
        self._spans.append(("passes", self._step_begins, self._update_begins))

    def after_update(self, state: "TrainingState") -> None:
        """The update is done."""
        assert self._update_begins is not None
        self._spans.append(("optimizer", self._update_begins, self._mark()))

    def seconds(self) -> dict[str, float]:
        """Of the last step, by part. Ask after its report has been read: then nothing has to be waited for."""
        parts = dict.fromkeys(("data", "forward", "backward", "communication", "optimizer", "passes"), 0.0)
        for part, start, end in self._spans:
            parts[part] += _seconds_between(start, end)
        known = parts["data"] + parts["forward"] + parts["backward"]
        parts["communication"] = max(parts.pop("passes") - known, 0.0)
        return parts

    def _mark(self) -> Mark:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _enter(self, decoder: nn.Module, arguments: Any) -> None:
        self._forward_begins = self._mark() if self.watch.inside else None

    def _leave(self, decoder: nn.Module, arguments: Any, output: Tensor) -> None:
        if self._forward_begins is not None:
            self._spans.append(("forward", self._forward_begins, self._mark()))
            self._forward_begins = None
            if output.requires_grad:
                # Not a backward hook of the module, which would put nodes of its own into the graph.
                output.register_hook(self._backward_begins)

    def _backward_begins(self, grad: Tensor) -> None:
        start = self._mark()

        def backward_ends() -> None:
            self._spans.append(("backward", start, self._mark()))

        torch.autograd.Variable._execution_engine.queue_callback(backward_ends)


def _seconds_between(start: Mark, end: Mark) -> float:
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return start.elapsed_time(end) / 1e3
    assert isinstance(end, float)
    return end - start
