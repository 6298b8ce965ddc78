"""A safetensors file written tensor by tensor: the header first, which needs shapes only, then the bytes."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megachameleon.checkpoint.formats.plain import Digests, Piece
from megachameleon.checkpoint.snapshot import KINDS

STRIDE = 8 << 20
"""Bytes that are hashed and written at a time."""


def file_order(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """Wide types first, so that each tensor begins at a multiple of its type's size."""
    return tuple(sorted(pieces, key=lambda piece: -piece.dtype.itemsize))


def write_safetensors(path: Path, pieces: Sequence[Piece], tensors: Iterable[Tensor]) -> Digests:
    """Write a file and make it durable; only one tensor is needed in memory at a time.

    Args:
        pieces: names, shapes and types in `file_order`.
        tensors: their values, in the same order.

    Returns:
        The file's `sha256`.

    Raises:
        OSError: it cannot be written; what there is of it is left.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        header = _header(pieces)
        digest.update(header)
        file.write(header)
        for piece, tensor in zip(pieces, tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (piece.dtype, piece.shape), piece.name
            values = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
            for start in range(0, len(values), STRIDE):
                digest.update(values[start : start + STRIDE])
                file.write(values[start : start + STRIDE])
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest()}


def _header(pieces: Sequence[Piece]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers opens no file without it
    begin = 0
    for piece in pieces:
        end = begin + torch.Size(piece.shape).numel() * piece.dtype.itemsize
        entries[piece.name] = {"dtype": KINDS[piece.dtype], "shape": list(piece.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
