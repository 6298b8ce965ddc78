"""Long text in parts that can be encoded apart, for tokenizers in which a newline stands alone."""

from collections.abc import Iterator

STRETCH = 500
"""Characters that are encoded at once where lines allow; sentencepiece's queue of merges is slower on longer text."""


def stretches(text: str) -> Iterator[str]:
    """One or more lines at a time, with their ends; together they are `text`."""
    start = 0
    while len(text) - start > STRETCH:
        end = text.rfind("\n", start, start + STRETCH) + 1 or text.find("\n", start + STRETCH) + 1
        if not end:
            break
        yield text[start:end]
        start = end
    yield text[start:]
