"""Packages of GPU kernels that may or may not be installed, and whether they work on this machine.

An installed package is not yet a working one: Transformer Engine's wheel installs anywhere but loads only with its
libraries, and PyPI's `apex` is another package of the same name. So each is judged by importing what is used of it.
"""

import importlib
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

GUIDE = "docs/guides/gpu.md"


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package and what of it is used."""

    name: str
    """For people."""
    modules: tuple[str, ...]
    """What is imported to see whether it works."""
    attribute: str
    """Of the last module."""
    remedy: str
    """What to do where it is missing."""

    @property
    def is_installed(self) -> bool:
        """Whether there is something of that name, working or not."""
        # Of the top name only: to find a submodule, its parents are imported.
        return any(find_spec(name.partition(".")[0]) for name in self.modules)


TRANSFORMER_ENGINE = Package(
    name="transformer-engine",
    modules=("transformer_engine.pytorch", "transformer_engine_torch", "transformer_engine.pytorch.optimizers"),
    attribute="FusedAdam",
    remedy=f"build it as {GUIDE} says",
)
APEX = Package(
    name="apex (NVIDIA's, not PyPI's)",
    modules=("fused_weight_gradient_mlp_cuda", "amp_C", "apex.optimizers"),
    attribute="FusedAdam",
    remedy=f"build it as {GUIDE} says; PyPI's apex is another package",
)
LIGER = Package(
    name="liger-kernel",
    modules=("liger_kernel.ops",),
    attribute="LigerFusedGateUpSiLUMulFunction",
    remedy="pip install megachameleon[liger]",
)


@cache
def why_unusable(package: Package) -> str | None:
    """What keeps a package from being used; None where it can be. It is imported once."""
    if not package.is_installed:
        return "is not installed"
    try:
        for name in package.modules:
            module = importlib.import_module(name)
    except Exception as error:  # a broken build may raise anything: ImportError, RuntimeError, OSError
        first_line = str(error).partition("\n")[0]
        return f"is installed but does not load ({type(error).__name__}: {first_line})"
    if not hasattr(module, package.attribute):
        return f"is installed but has no {module.__name__}.{package.attribute}"
    return None


def require_loadable_transformer_engine() -> None:
    """megatron-core imports Transformer Engine wherever it is installed, and dies with it where it does not load.

    Raises:
        ValueError: it is installed and does not load.
    """
    if TRANSFORMER_ENGINE.is_installed and (reason := why_unusable(TRANSFORMER_ENGINE)):
        raise ValueError(
            f"transformer-engine: {reason}, and megatron-core cannot do without it once it is there; "
            f"{TRANSFORMER_ENGINE.remedy}, or remove it: pip uninstall transformer-engine transformer-engine-torch"
        )
