"""Backends of the decoder's operations: one file each, and the table that picks."""
