"""One code path for CUDA/NCCL and CPU/gloo: what megatron-core 0.16 needs to run without a GPU.

With CUDA, `install` only picks this process's GPU. Without it, megatron-core's CUDA calls are led to the CPU:

- `torch.cuda.current_device`, `synchronize` and `manual_seed`, called in RoPE, layers, pipeline transfers, random;
- `device="cuda"` keywords, `pin_memory=True` and `Tensor.cuda()`, through one function mode;
- type strings such as "torch.cuda.FloatTensor", by which its optimizers recognise parameters, inside
  `optimizer_scope` only;
- the tracker of random states, which would otherwise read CUDA generators.

With `adam.py`, this is the only module that replaces attributes of other packages. One of them is replaced on either
device: without Transformer Engine, megatron-core 0.16's recomputation of norm outputs asks for it by mistake.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megachameleon.optional_packages import require_loadable_transformer_engine

SUPPORTED_MEGATRON = "0.16."


def pick_device(local_rank: int = 0) -> torch.device:
    """This process's device: its GPU if there is CUDA, else the CPU.

    Args:
        local_rank: its number on this machine. Where SLURM shows each process its own GPU only, that is number 0.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def communication_backend(device: torch.device) -> str:
    """The torch.distributed backend that carries collectives of `device`."""
    return "nccl" if device.type == "cuda" else "gloo"


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 natively, so that it is worth using."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere: the first with bf16 tensor cores
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def peak_memory(device: torch.device) -> int:
    """Largest memory that this process has used so far, in bytes: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def install(device: torch.device) -> None:
    """Make megatron-core run on `device`. Call once, before anything else of megatron-core is used.

    Raises:
        ValueError: megatron-core has another version than was tested, or would die with a broken Transformer Engine.
    """
    # Both before the first import of megatron-core: it warns, and loads Transformer Engine, while it is imported.
    quiet_libraries()
    require_loadable_transformer_engine()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif not isinstance(_active_mode(), _CudaNamesOnCpu):
        _lead_cuda_to_cpu()
    _check_megatron_version()
    _mend_recompute_of_norms()


@contextlib.contextmanager
def optimizer_scope() -> Iterator[None]:
    """Within it, parameters on the CPU carry the type strings by which megatron-core's optimizers know them."""
    mode = _active_mode()
    if not isinstance(mode, _CudaNamesOnCpu):
        yield
        return
    mode.cuda_type_strings = True
    try:
        yield
    finally:
        mode.cuda_type_strings = False


class _CudaNamesOnCpu(TorchFunctionMode):
    """Rewrites requests for CUDA into requests for the CPU."""

    cuda_type_strings = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs:
            device = kwargs.get("device")
            if device is not None and not isinstance(device, int) and str(device).startswith("cuda"):
                kwargs = {**kwargs, "device": torch.device("cpu")}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        result = func(*args, **(kwargs or {}))
        if self.cuda_type_strings and func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _active_mode() -> TorchFunctionMode | None:
    """The CPU mode if it is installed; looked up in torch's own stack, so that no state is kept here."""
    from torch.overrides import _get_current_function_mode_stack

    return next((mode for mode in _get_current_function_mode_stack() if isinstance(mode, _CudaNamesOnCpu)), None)


def _lead_cuda_to_cpu() -> None:
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None
    # torch's own version queues the seed until CUDA starts, which it never does.
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    # Entered and never left: megatron-core asks for CUDA at any time, not in one block of ours.
    _CudaNamesOnCpu().__enter__()
    from megatron.core.tensor_parallel import random as megatron_random

    tracker = _cpu_tracker_class(megatron_random)
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # Marked as initialised too, or the first use would replace it by one that reads CUDA's generators.
    megatron_random._CUDA_RNG_STATE_TRACKER = tracker()
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def _cpu_tracker_class(megatron_random: Any) -> type:
    class CpuRNGStatesTracker(megatron_random.CudaRNGStatesTracker):
        """megatron-core's tracker of named random states, over the CPU generator."""

        _current_state_name: str

        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        # megatron-core's own takes any change of the CPU's generator in here for a mistake, and warns.
        @contextlib.contextmanager
        def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outer_state, outer_name = torch.get_rng_state(), str(self._current_state_name)
            if outer_name != "default-rng":
                self.states_[outer_name] = outer_state
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer_state)
                self._current_state_name = outer_name

    return CpuRNGStatesTracker


def _mend_recompute_of_norms() -> None:
    """`CheckpointWithoutOutput()` takes its default `fp8=False` for "FP8 is on", since it tests for None."""
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import random as megatron_random

    if not megatron_random.HAVE_TE:
        tensor_parallel.CheckpointWithoutOutput = partial(megatron_random.CheckpointWithoutOutput, fp8=None)


def quiet_libraries() -> None:
    """Drop notices that a user can do nothing about, most of them on kernels that are not installed.

    The table of kernels says once what was chosen; docs/decisions.md lists what is hidden here.
    """
    for name in ("megatron", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in (r"megatron\.", r"torch\.distributed\.", r"torch\.jit\."):
        warnings.filterwarnings("ignore", module=module)
    # The distributed optimizer keeps gradients on views of fp32 weights; on the CPU the warning names this file.
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")


def _check_megatron_version() -> None:
    from megatron.core.package_info import __version__ as version

    if not version.startswith(SUPPORTED_MEGATRON):
        raise ValueError(
            f"megatron-core: version {version} is installed, this release works with {SUPPORTED_MEGATRON}*; "
            "install the version in requirements.txt"
        )
