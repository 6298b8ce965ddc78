"""The training loop: data, step, schedule, callbacks, checkpoints tied together."""
