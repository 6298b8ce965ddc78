"""What happens around steps: one idea a file, each built on `base.Callback`."""
