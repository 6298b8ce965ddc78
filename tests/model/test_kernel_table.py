"""What `auto` takes, and which choices are refused, on machines that this one is not."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from megachameleon.config import KernelsConfig, load_config
from megachameleon.config.kernels import OPERATIONS
from megachameleon.optional_packages import (
    APEX,
    LIGER,
    TRANSFORMER_ENGINE,
    require_loadable_transformer_engine,
    why_unusable,
)

ROOT = Path(__file__).resolve().parents[2]
FAKES = {
    "liger": {"liger_kernel/__init__.py": "", "liger_kernel/ops.py": "LigerFusedGateUpSiLUMulFunction = None"},
    "another apex": {"apex/__init__.py": "config = {}"},
    "apex without kernels": {"apex/__init__.py": "", "apex/optimizers.py": "class FusedAdam: ..."},
    "broken": {"transformer_engine/__init__.py": "raise RuntimeError('cudnn shared object not found')"},
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Make a fake package importable; forget it and what was found out about it afterwards."""
    before = set(sys.modules)

    def add(name):
        for path, text in FAKES[name].items():
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        why_unusable.cache_clear()

    yield add
    why_unusable.cache_clear()
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("liger_kernel", "apex", "transformer_engine"):
            del sys.modules[name]


def resolve(device_type, **choices):
    from megachameleon.model.kernels.table import resolve

    return resolve(KernelsConfig(**choices), device_type)


def test_configuration_and_table_have_the_same_backends():
    from megachameleon.model.kernels.table import TABLE

    hints = get_type_hints(KernelsConfig)
    assert tuple(TABLE) == OPERATIONS
    for operation, backends in TABLE.items():
        assert get_args(hints[operation]) == ("auto", *backends)


def test_automatic_choice(install):
    all_torch = KernelsConfig(**dict.fromkeys(OPERATIONS, "torch"))
    assert resolve("cpu") == resolve("cuda") == all_torch
    install("liger")
    assert resolve("cpu") == all_torch
    assert resolve("cuda") == replace(all_torch, swiglu="liger")
    assert resolve("cuda", swiglu="reference").swiglu == "reference"


@pytest.mark.parametrize(
    ("device_type", "choice", "message"),
    [
        ("cpu", {"norm": "transformer_engine"}, r"kernels.norm: transformer_engine needs a CUDA device"),
        ("cuda", {"norm": "transformer_engine"}, r"transformer-engine, which is not installed; build it as .* says"),
        ("cuda", {"optimizer": "apex"}, r"apex .* which is not installed; build it as .* PyPI's apex is another"),
        ("cuda", {"swiglu": "liger"}, r"liger-kernel, which is not installed; pip install megachameleon\[liger\], or"),
        ("cuda", {"rotary": "liger"}, r"kernels.rotary: 'liger' is not one of auto, reference, torch"),
    ],
)
def test_impossible_choices_are_refused(device_type, choice, message):
    with pytest.raises(ValueError, match=message):
        resolve(device_type, **choice)


def test_old_gpus_have_no_fp8(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an A100")
    with pytest.raises(ValueError, match=r"kernels.fp8: scaled_mm needs a GPU of Ada, Hopper or later, not an A100"):
        resolve("cuda", fp8="scaled_mm")
    assert resolve("cpu", fp8="scaled_mm").linear == "torch"


@pytest.mark.parametrize("package", ["another apex", "apex without kernels"])
def test_pypis_apex_is_not_apex(install, package):
    install(package)
    assert "does not load (ModuleNotFoundError: No module named 'fused_weight" in why_unusable(APEX)
    with pytest.raises(ValueError, match=r"kernels.linear: apex needs apex .NVIDIA's"):
        resolve("cuda", linear="apex")


def test_other_packages_are_judged_by_what_is_used_of_them(install):
    assert why_unusable(TRANSFORMER_ENGINE) == why_unusable(LIGER) == "is not installed"
    require_loadable_transformer_engine()
    install("liger")
    assert why_unusable(LIGER) is None
    install("broken")
    with pytest.raises(ValueError, match=r"RuntimeError: cudnn shared object not found.*pip uninstall"):
        require_loadable_transformer_engine()


def dry_run(path, *overrides):
    return subprocess.run(
        [sys.executable, "tools/train.py", "debug", "--dry-run", *overrides],
        cwd=ROOT,
        env={"PYTHONPATH": f"{path}:{ROOT}", "PATH": "", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_broken_transformer_engine_is_one_line(tmp_path, install):
    """megatron-core would die on import, with a page of traceback."""
    install("broken")
    done = dry_run(tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "transformer-engine: is installed but does not load" in done.stderr


def test_a_dry_run_refuses_what_the_run_would(config):
    from megachameleon.planning.dry_run import dry_run

    with pytest.raises(ValueError, match=r"kernels.linear: apex needs a CUDA device"):
        dry_run(config("kernels.linear=apex"), None)


def test_contradictions_are_found_in_the_configuration():
    with pytest.raises(ValueError, match=r"kernels.norm: 'apex' is not one of"):
        load_config("debug", ["kernels.norm=apex"])


def test_the_table_says_what_was_chosen_and_what_forced():
    from megachameleon.model.kernels.table import choose_kernels, describe_kernels

    asked = KernelsConfig(linear="reference", fp8="none")
    rows = {name: (backend, what) for name, backend, what in describe_kernels(asked, choose_kernels(asked, "cpu"))}
    assert rows["linear"][0] == "reference (forced)" and rows["norm"][0] == "torch (chosen)"
    assert set(rows) == set(OPERATIONS) and all(what for _, what in rows.values())
