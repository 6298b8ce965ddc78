"""What the fork server imports once, so that a rank starts in a moment."""

import megachameleon.checkpoint.saving
import megachameleon.model.decoder
import megachameleon.training.batches
import megachameleon.training.callbacks.build
import megachameleon.training.checkpointing
import megachameleon.training.run
import megachameleon.training.trainer  # noqa: F401
