"""Meta's release format."""
