"""Tests that need a GPU: `make test-gpu`. Each says what it lacks where it cannot run."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    missing = pytest.mark.skip(reason="no CUDA device that this process may see; run `make test-gpu` on a GPU")
    for item in items:
        if "/gpu/" in str(item.path):
            item.add_marker(missing)


@pytest.fixture
def require_backend():
    """Skip unless an operation's backend can run here."""
    from megachameleon.config import KernelsConfig
    from megachameleon.model.kernels.table import resolve

    def require(operation, backend):
        try:
            resolve(KernelsConfig(**{operation: backend}), "cuda")
        except ValueError as error:
            pytest.skip(str(error))

    return require


@pytest.fixture(scope="session", autouse=True)
def one_gpu():
    """A process group of one, as megatron-core needs it."""
    if not torch.cuda.is_available():
        yield None
        return
    from megachameleon.config import ParallelConfig
    from megachameleon.parallel.context import parallel_context

    with parallel_context(ParallelConfig()) as context:
        yield context
