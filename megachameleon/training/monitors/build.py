"""Which monitors a configuration asks for."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from megachameleon.config.logging import MonitorName
from megachameleon.training.monitors.attention_logits import AttentionLogits
from megachameleon.training.monitors.base import Monitor
from megachameleon.training.monitors.forward_watch import ForwardWatch
from megachameleon.training.monitors.gradient_norms import GradientNorms
from megachameleon.training.monitors.norms import block_norms, output_norm
from megachameleon.training.monitors.parameter_groups import ParameterGroups
from megachameleon.training.monitors.picture_codes import PictureCodes
from megachameleon.training.monitors.step_times import StepTimes
from megachameleon.training.monitors.update_ratios import UpdateRatios

if TYPE_CHECKING:
    from megachameleon.training.trainer import Trainer


def build_monitors(trainer: "Trainer") -> list[Monitor]:
    """Monitors of a built model, attached to this rank's part of it."""
    model, logging, state = trainer.config.model, trainer.config.logging, trainer.state
    if not logging.monitors:
        return []
    watch, every = ForwardWatch(state.model, trainer.context), logging.monitor_every
    groups = ParameterGroups(state.model, trainer.context)
    heads, keys = model.num_attention_heads, model.num_query_groups
    makers: dict[MonitorName, Callable[[], Monitor]] = {
        "step_times": lambda: StepTimes(watch),
        "output_norm": lambda: output_norm(watch, model.num_layers),
        "block_norms": lambda: block_norms(watch, model.num_layers, every),
        "attention_logits": lambda: AttentionLogits(watch, model.num_layers, heads, keys, every),
        "gradient_norms": lambda: GradientNorms(watch, groups, every),
        "update_ratios": lambda: UpdateRatios(watch, groups, state.optimizer, every),
        "picture_codes": lambda: PictureCodes(watch, trainer.data.vocabulary, every),
    }
    # The watch is first, since the others ask it what they see.
    return [watch, *(makers[name]() for name in logging.monitors)]
