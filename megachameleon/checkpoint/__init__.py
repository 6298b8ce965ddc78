"""Checkpoints: complete or invisible, resharded at load, never unpickled."""
