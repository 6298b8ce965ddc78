"""Checkpoints of other projects, and of our own, as one stream of plain tensors: read, written, converted."""
