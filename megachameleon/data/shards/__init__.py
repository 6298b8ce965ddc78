"""The files that documents of ids lie in: their bytes, writing, reading, checking, merging."""
