"""Whether two checkpoints, of whatever format, are the same model."""
