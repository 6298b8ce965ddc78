"""How fast a run is, what of the hardware it uses, what it has cost and when it will be done."""

import time
from typing import TYPE_CHECKING, Any

from megachameleon.training.callbacks.base import Callback, StepEvent
from megachameleon.training.callbacks.flops import flops_per_token, peak_flops
from megachameleon.training.monitors.step_times import StepTimes

if TYPE_CHECKING:
    from megachameleon.training.trainer import Trainer


class Throughput(Callback):
    """Fills `values` after each step, on the main process; stands before the callbacks that show them."""

    name = "throughput"

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        """`mfu_causal`, `mfu_full_attention`, `time/<part>` in seconds, `eta_hours`, `gpu_hours`, `cost`,
        `effective_time`; what is not known is not there."""
        self._begun: float | None = None
        """When the run was first started, seconds since 1970."""
        self._started: float | None = None
        """When this process started it."""
        self._first_step = 0
        self._held = 0.0
        """Seconds for which processes before this one had the devices, as far as their checkpoints know."""
        self._useful = 0.0
        """Seconds in steps that the weights of now have come from."""
        self._times: StepTimes | None = None
        self._peak: float | None = None
        self._flops = (0.0, 0.0)

    def on_start(self, trainer: "Trainer") -> None:
        """Start the clock; again after a roll-back, whose past is paid for all the same."""
        self._held = self._held_until_now()
        self._started = time.time()
        self._begun = self._begun or self._started
        self._first_step = trainer.step
        self._times = next((m for m in trainer.monitors if isinstance(m, StepTimes)), None)
        self._peak = peak_flops(trainer.context.device, trainer.config.logging.peak_tflops)
        self._flops = flops_per_token(trainer.config.model, trainer.config.data.sequence_length)

    def on_step(self, trainer: "Trainer", event: StepEvent) -> None:
        """Work out the values of this step."""
        self._useful += event.seconds
        if trainer.context.is_main:
            world_size = trainer.context.world_size
            self.values = self._mfu(event.tokens_per_second / world_size)
            if self._times is not None:
                self.values |= {f"time/{part}": seconds for part, seconds in self._times.seconds().items()}
            remaining = trainer.config.training.num_steps - event.step
            self.values |= self._bill(remaining, event.step, world_size, trainer.config.logging.price_per_gpu_hour)

    def state_dict(self) -> dict[str, Any]:
        """What goes on over restarts."""
        return {"begun": self._begun, "held": self._held_until_now(), "useful": self._useful}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on; a roll-back takes back what was useful, not what has passed."""
        self._useful = state["useful"]
        # Else it is a roll-back in this very process: its clock goes on.
        if self._started is None:
            self._begun, self._held = state["begun"], state["held"]

    def _held_until_now(self) -> float:
        return self._held + (0.0 if self._started is None else time.time() - self._started)

    def _mfu(self, tokens_per_second: float) -> dict[str, float]:
        if self._peak is None:
            return {}
        causal, full = (flops * tokens_per_second / self._peak for flops in self._flops)
        return {"mfu_causal": causal, "mfu_full_attention": full}

    def _bill(self, remaining: int, step: int, world_size: int, price: float) -> dict[str, float]:
        assert self._started is not None and self._begun is not None
        now = time.time()
        # By wall time, so that validations and checkpoints are in the estimate.
        done = max(step - self._first_step, 1)
        gpu_hours = self._held_until_now() / 3600 * world_size
        values = {
            "eta_hours": (now - self._started) / done * remaining / 3600,
            "gpu_hours": gpu_hours,
            "effective_time": min(self._useful / max(now - self._begun, 1e-9), 1.0),
        }
        return values | ({"cost": gpu_hours * price} if price else {})
