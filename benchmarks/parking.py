"""Which memory belongs to which contestant, and where it waits while others have their turn.

Models that do not fit on a GPU together can still be measured interleaved: between turns the storages of a contestant
are copied to the host and emptied in place, so every view of them stays valid.
"""

import contextlib
import gc
from collections.abc import Iterator

import torch
from torch import Tensor


class Parking:
    """Storages by contestant."""

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.device, self.enabled = device, enabled
        self.kept_bytes: dict[str, int] = {}
        """What a contestant keeps on the device between its steps."""
        self._storages: dict[str, list[torch.UntypedStorage]] = {}
        self._copies: dict[str, list[Tensor]] = {}

    @contextlib.contextmanager
    def building(self, name: str) -> Iterator[None]:
        """What is allocated within and still there at the end belongs to `name`."""
        before = self._live_storages()  # held until the end, so that no address is used again
        yield
        own = [storage for place, storage in self._live_storages().items() if place not in before]
        self._storages[name] = own
        self.kept_bytes[name] = sum(storage.nbytes() for storage in own)
        if self.enabled:
            self._copies[name] = [torch.empty(storage.nbytes(), dtype=torch.uint8) for storage in own]
            self._leave(name)

    @contextlib.contextmanager
    def turn_of(self, name: str) -> Iterator[None]:
        """Within it, `name` has its memory on the device."""
        if not self.enabled:
            yield
            return
        for storage, copy in zip(self._storages[name], self._copies[name], strict=True):
            storage.resize_(copy.nbytes)
            _bytes_of(storage).copy_(copy)
        yield
        self._leave(name)

    def _leave(self, name: str) -> None:
        for storage, copy in zip(self._storages[name], self._copies[name], strict=True):
            copy.copy_(_bytes_of(storage))
            # emptied in place: views in models and optimizers stay valid
            storage.resize_(0)
        if self.device.type == "cuda":
            # or the allocator keeps what the next one needs, in blocks of other sizes
            torch.cuda.empty_cache()

    def _live_storages(self) -> dict[int, torch.UntypedStorage]:
        """By address, those that Python knows of."""
        # cycles keep tensors alive that nobody can reach any more
        gc.collect()
        # Compilers leave tensors of other types behind, which have no memory.
        tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter)]
        storages = [t.untyped_storage() for t in tensors if t.device.type == self.device.type and not t.is_sparse]
        return {storage.data_ptr(): storage for storage in storages if storage.nbytes() and storage.resizable()}


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
