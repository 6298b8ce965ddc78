"""JSON from strangers: one object, in UTF-8, no key twice, of bounded depth and number of values."""

import json
from typing import Any

from megachameleon.data.records import decode_text, kind_of

MAX_VALUES = 1 << 22
"""Values of one record; as Python's objects, more would take gigabytes."""
_SURELY_FEW = 1 << 20
"""Bytes that cannot have too many values; shorter records are not counted."""


def parse_json(data: bytes) -> dict[str, Any]:
    """Parse one JSON object.

    Raises:
        ValueError: not UTF-8, not JSON, not an object, a key twice, or too deep or too many values.
    """
    # counted before parsing, because Python's objects would fill memory first
    if len(data) > _SURELY_FEW and sum(data.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise ValueError(f"JSON with more than {MAX_VALUES:,} commas and brackets")
    try:
        values = _DECODER.decode(decode_text(data))
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8 (at its byte {error.start})") from None
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"JSON is {kind_of(values)}, not an object")
    return values


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    # of two equal keys Python keeps the last without a word, and readers do not agree on it
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in values if keys.count(key) > 1)
        raise ValueError(f"JSON has the key {twice!r} twice")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct)
"""Kept, because `json.loads` would make one for each record."""
