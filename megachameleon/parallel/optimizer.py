"""AdamW and its schedule, from megatron-core; clipping without waiting for the device."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megachameleon.config import KernelsConfig, OptimizerConfig, ParallelConfig
from megachameleon.parallel.adam import use_adam
from megachameleon.parallel.device import optimizer_scope
from megachameleon.parallel.optimizer_state import create_state, parts_of


def build_optimizer(
    chunks: Sequence[torch.nn.Module], config: OptimizerConfig, parallel: ParallelConfig, kernels: KernelsConfig
) -> Any:
    """megatron-core's optimizer over fp32 master weights. Norms, biases and other vectors are not decayed.

    Args:
        chunks: this process's model chunks, wrapped.
    """
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer

    transformer_config: Any = chunks[0].config
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=transformer_config.bf16,
        params_dtype=transformer_config.params_dtype,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    use_adam(kernels.optimizer)
    with optimizer_scope():
        # Groups of gloo serve checkpoints only, and a fake world has none.
        gloo = dist.get_backend() != dist.Backend.FAKE
        optimizer = get_megatron_optimizer(megatron_config, list(chunks), use_gloo_process_groups=gloo)
    # Set afterwards: megatron-core builds AdamW without a way to ask for its fused form.
    for part in parts_of(optimizer):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"], group["foreach"] = kernels.optimizer == "torch", False
    create_state(optimizer)
    return optimizer


def not_finite(norm: Tensor) -> Tensor:
    """Whether a norm, float32 [], is infinite or NaN: bool [] on its device."""
    return ~norm.isfinite()


@torch.no_grad()
def optimizer_step(
    optimizer: Any, clip_grad: float, num_tokens: Tensor, refuses: Callable[[Tensor], Tensor] = not_finite
) -> Tensor:
    """Divide gradients by the number of tokens, clip and update, without waiting for the device.

    Args:
        clip_grad: largest global gradient norm; 0 turns clipping off.
        num_tokens: labels that the gradients are a sum over, on all ranks; a number on the device.
        refuses: takes the norm and says, as a bool [] on the device and alike on all ranks, whether weights and
            moments must stay as they are. Only torch's fused update can be told so without waiting for the device.

    Returns:
        The global gradient norm before clipping, float32 []; the same on every rank.
    """
    with optimizer_scope():
        optimizer.prepare_grads()
        # A step may have no label at all: then nothing is divided, not by zero.
        divisor = num_tokens.float().clamp(min=1)
        norm = gradient_norm(optimizer) / divisor
        if clip_grad > 0:
            # Clipping as in torch's clip_grad_norm_, 1e-6 included; only its factor goes into the one division.
            divisor = divisor * ((norm + 1e-6) / clip_grad).clamp(min=1)
        # The norm is of the mean gradient and before clipping, which is what limits are set on.
        skip = refuses(norm)
        if not all(_skips_on_the_device(part) for part in parts_of(optimizer)) and bool(skip):
            return norm
        for part in parts_of(optimizer):
            _divide(part, divisor, skip)
        optimizer.step_with_ready_grads()
    return norm


def _skips_on_the_device(part: Any) -> bool:
    adam = part.optimizer
    return adam is None or (isinstance(adam, torch.optim.AdamW) and adam.param_groups[0]["fused"])


def _divide(part: Any, divisor: Tensor, skip: Tensor) -> None:
    """Have the gradients of one optimizer divided: in the pass of a fused update, or else in one of its own."""
    adam = part.optimizer
    if adam is None:
        return
    if _skips_on_the_device(part):
        # The hand-over of torch's GradScaler: a fused update divides by the one, and does nothing if the other is 1.
        adam.grad_scale, adam.found_inf = divisor, skip.float()
        return
    gradients = [parameter.grad for parameter in part.get_parameters() if parameter.grad is not None]
    if gradients:
        torch._foreach_div_(gradients, divisor)


def gradient_norm(optimizer: Any) -> Tensor:
    """L2 norm over the summed gradients of all parameters on all ranks, float32 [], each counted once.

    megatron-core's own reads one number from the device for each parameter where there is no apex.
    """
    # Without CUDA this is the CPU: device.py leads it there.
    total = torch.zeros((), device=torch.cuda.current_device())
    for part in parts_of(optimizer):
        gradients = part.get_main_grads_for_grad_norm()
        square = torch.stack(torch._foreach_norm(gradients)).square().sum() if gradients else torch.zeros_like(total)
        dist.all_reduce(square, group=part.get_grad_stats_parallel_group())
        total += square
    return total.sqrt()


def build_schedule(optimizer: Any, config: OptimizerConfig, num_steps: int) -> Any:
    """Warm-up and decay over `num_steps` optimizer steps; a pure function of the step, so it has no state to save."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    exponential = config.decay == "exponential"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=num_steps,
        lr_decay_style="WSD" if exponential else config.decay,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=num_steps,
        wd_incr_style="constant",
        # megatron-core has exponential decay only as the last phase of WSD: that phase follows the warm-up here.
        wsd_decay_steps=num_steps - config.warmup_steps if exponential else None,
        lr_wsd_decay_style="exponential" if exponential else None,
    )


def set_learning_rate(schedule: Any, step: int, factor: float = 1.0) -> float:
    """Set the rate of the update that ends optimizer step `step` (counted from 1), times `factor`; returns it."""
    # From 0 each time: its own count would go on from wherever it was before a resume or a roll-back.
    schedule.num_steps = 0
    schedule.step(increment=step)
    # `step` has just set the rates anew, so factors of earlier steps are not multiplied up.
    if factor != 1.0:
        for group in schedule.optimizer.param_groups:
            group["lr"] *= factor
    return max(group["lr"] for group in schedule.optimizer.param_groups if not group.get("is_decoupled_lr"))
