"""Text and pictures to token ids and back."""
