"""Our own format, as a source and a target of conversions."""
