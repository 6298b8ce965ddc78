"""What is measured inside a training step, on the device, without waiting for it."""
