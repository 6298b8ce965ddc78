"""Files that end early or are not what their names say."""

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager


class DamagedArchiveError(ValueError):
    """A file that ends early or is not what its name says; everything before the damage was read."""

    def __init__(self, path: str, damage: str) -> None:
        super().__init__(path, damage)  # both, for an error that comes from another process is made anew from them
        self.path = path
        self.reason = f"damaged or truncated ({damage})"

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.reason}; copy it again "
            "(preprocess_data.py plan --allow-damaged-archives keeps what is before the damage)"
        )


@contextmanager
def damage_reported(source: str) -> Iterator[None]:
    """Turn what damaged files make the readers raise into `DamagedArchiveError`."""
    try:
        yield
    # gzip tells damage by three kinds of errors, depending on where it is
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DamagedArchiveError(source, str(error)) from None
