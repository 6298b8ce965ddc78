"""Damage done to small shards, and what a reader makes of it.

Each layer catches something:

* the hash over the manifest: every change of a count, name, option, tokenizer or hash in `.json`;
* the hashes of `.idx` and `.spans` in the manifest: every change of either, such as two lengths swapped with their
  offsets made right again, or a picture moved by one id;
* the structure alone (`forge` makes all hashes right again, as if nobody had looked at them): everything that would
  make a reader crash, allocate without bound or leave its files. Swapped lengths pass: they need the hashes.

Run as a program it damages and forges shards under a limit of memory, see `main`.
"""

import hashlib
import json
import random
import resource
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megachameleon.data.shards.format import IDX_HEADER, SPANS_HEADER
from megachameleon.data.shards.manifest import OWN_HASH
from megachameleon.data.shards.reader import Dataset, shard_file

Files = dict[str, bytes]
"""Content by suffix."""

EXTREMES = (0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
JSON_VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**30, 0.0, 1.5, float("nan"), float("inf"), -0.0),
    *("", "x", "uint16", "int32", "0" * 64, "\ud800", [], {}, [[]], [1, 2], [{}], {"": None}, {"name": 1}),
)


def read_files(prefix: Path) -> Files:
    """The four files of a shard without `.bin`, which opening checks by size only."""
    return {suffix: shard_file(prefix, suffix).read_bytes() for suffix in (".idx", ".spans", ".json")}


def write_files(prefix: Path, files: Files) -> None:
    for suffix, content in files.items():
        shard_file(prefix, suffix).write_bytes(content)


def content_of(prefix: Path) -> tuple[Any, list[tuple[list[int], list[list[int]]]]]:
    """Manifest, and ids and spans of all documents, through everything that a run uses."""
    dataset = Dataset.open(prefix.parent)
    documents = [(dataset.document(i).tolist(), dataset.image_spans(i).tolist()) for i in range(len(dataset))]
    return dataset.shards[0].manifest, documents


def outcome(prefix: Path, original: Any) -> str:
    """`same`, `refused`, or `wrong`: it opened and said something else. Errors but ValueError come through."""
    try:
        return "same" if content_of(prefix) == original else "wrong"
    except ValueError:
        return "refused"


def forge(files: Files) -> Files:
    """Make all hashes and sizes fit again, as far as the manifest can be read."""
    try:
        values = json.loads(files[".json"])
        for suffix in (".idx", ".spans"):
            content = files[suffix]
            values["files"][suffix].update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        values.pop(OWN_HASH, None)
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        values[OWN_HASH] = hashlib.sha256(canonical.encode()).hexdigest()
        return {**files, ".json": json.dumps(values).encode()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return files


def swap_lengths(files: Files) -> Files:
    """The first two documents exchange their lengths, and offsets follow: consistent, and wrong."""
    idx = bytearray(files[".idx"])
    n = IDX_HEADER.unpack_from(idx)[3]
    lengths = np.frombuffer(idx, "<i4", n, IDX_HEADER.size)
    offsets = np.frombuffer(idx, "<i8", n, IDX_HEADER.size + 4 * n)
    assert lengths[0] != lengths[1]
    width = int(offsets[1]) // int(lengths[0])
    lengths[:2] = lengths[1::-1].copy()
    offsets[1] = lengths[0] * width
    return {**files, ".idx": bytes(idx)}


def move_pictures(files: Files) -> Files:
    """All pictures begin one id earlier: consistent, and wrong."""
    spans = bytearray(files[".spans"])
    n, m = SPANS_HEADER.unpack_from(spans)[2:]
    np.frombuffer(spans, "<i4", 2 * m, SPANS_HEADER.size + 8 * (n + 1))[::2] -= 1
    return {**files, ".spans": bytes(spans)}


def overflowing_shares(files: Files) -> Files:
    """Shares whose differences, as int64, are all positive and add up to too many: numpy.repeat crashes on them."""
    spans = bytearray(files[".spans"])
    n = SPANS_HEADER.unpack_from(spans)[2]
    first = np.frombuffer(spans, "<i8", n + 1, SPANS_HEADER.size)
    assert n >= 4
    first[1:4] = (2**62, -(2**63), -(2**62))
    return {**files, ".spans": bytes(spans)}


def boundless_idx(files: Files) -> Files:
    """Both counts of the header say the same absurd number."""
    idx = files[".idx"]
    return {
        **files,
        ".idx": IDX_HEADER.pack(*IDX_HEADER.unpack_from(idx)[:3], 2**62, 2**62 + 1) + idx[IDX_HEADER.size :],
    }


CONSISTENT = (boundless_idx, swap_lengths, move_pictures, overflowing_shares)


def damage(dice: random.Random, files: Files, others: Files) -> Files:
    """One or two changes of one or two files, chosen by `dice`; `others` are of another shard."""
    if dice.random() < 0.02:
        return dice.choice(CONSISTENT if SPANS_HEADER.unpack_from(files[".spans"])[3] else CONSISTENT[:2])(files)
    changed = dict(files)
    for _ in range(dice.choice((1, 1, 1, 2))):
        suffix = dice.choice(tuple(files))
        if suffix == ".json" and dice.random() < 0.8:
            changed[suffix] = _damaged_json(dice, changed[suffix])
        else:
            changed[suffix] = dice.choice(_BYTE_DAMAGE)(dice, changed[suffix], others[suffix])
    return changed


def _flip(dice: random.Random, content: bytes, other: bytes) -> bytes:
    changed = bytearray(content or b"\0")
    for _ in range(dice.choice((1, 1, 2, 8))):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def _truncate(dice: random.Random, content: bytes, other: bytes) -> bytes:
    return content[: dice.randrange(len(content) + 1)]


def _extend(dice: random.Random, content: bytes, other: bytes) -> bytes:
    more = dice.choice((b"\0" * dice.choice((1, 4, 8, 20)), content, dice.randbytes(dice.randrange(1, 64)), b" \n"))
    return dice.choice((content + more, more + content))


def _cut_out(dice: random.Random, content: bytes, other: bytes) -> bytes:
    start = dice.randrange(len(content) + 1)
    return content[:start] + content[start + dice.choice((1, 4, 8, 20)) :]


def _set_field(dice: random.Random, content: bytes, other: bytes) -> bytes:
    """A number anywhere, the header's counts above all, becomes extreme."""
    width = dice.choice((1, 4, 8, 8))
    start = dice.choice((8, 9, 16, 17, 18, 24, 26, 32, 34, 40, dice.randrange(len(content) + 1)))
    return content[:start] + (dice.choice(EXTREMES) % 256**width).to_bytes(width, "little") + content[start + width :]


def _swap_fields(dice: random.Random, content: bytes, other: bytes) -> bytes:
    width = dice.choice((4, 8))
    a, b = sorted(dice.choices(range(0, max(1, len(content) - width), width // 4), k=2))
    swapped = content[:a] + content[b : b + width] + content[a + width : b] + content[a : a + width]
    return swapped + content[b + width :] if a + width <= b else content[::-1]


def _replace(dice: random.Random, content: bytes, other: bytes) -> bytes:
    return dice.choice((other, b"", b"\0" * len(content), dice.randbytes(len(content))))


_BYTE_DAMAGE: tuple[Callable[[random.Random, bytes, bytes], bytes], ...] = (
    *(_flip, _flip, _truncate, _extend, _cut_out, _set_field, _set_field, _set_field, _swap_fields, _replace),
)


def _damaged_json(dice: random.Random, content: bytes) -> bytes:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if dice.random() < 0.1:
        return _odd_text(dice, content)
    places = _places(values)
    if places:
        holder, key = dice.choice(places)
        value = holder[key]
        action = dice.choice(("set", "set", "set", "delete", "add", "swap", "nudge"))
        if action == "delete":
            del holder[key]
        elif action == "add" and isinstance(holder, dict):
            holder[dice.choice(("", "note", "__class__", key + "_"))] = dice.choice(JSON_VALUES)
        elif action == "swap":
            other, other_key = dice.choice(places)
            holder[key], other[other_key] = json.loads(json.dumps([other[other_key], value]))
        elif action == "nudge" and type(value) is int:
            holder[key] = value + dice.choice((-1, 1, 2**32))
        else:
            holder[key] = dice.choice(JSON_VALUES)
    return json.dumps(values, indent=dice.choice((None, 1)), sort_keys=dice.random() < 0.5).encode()


def _odd_text(dice: random.Random, content: bytes) -> bytes:
    number = b'"num_tokens": ' + dice.choice((b"9" * 5000, b"1e999", b"-1", b"1.0", b"0x10", b"01"))
    deep = dice.randrange(900, 1000)
    texts = (
        b"\xef\xbb\xbf" + content,  # a byte order mark
        b"[" * 100_000,
        b'{"a":' * 50_000,
        content.replace(b"{", b'{"format": "megachameleon-shard",', 1),  # a key twice, the same
        content.replace(b"{", b'{"num_tokens": 1,', 1),  # the second one counts
        content.rstrip()[:-1] + b', "num_tokens": 1}',
        content.rstrip()[:-1] + b', "deep": ' + b"[" * deep + b"]" * deep + b"}",
        content.replace(b'"num_tokens"', number + b', "num_tokens"', 1),
        content.rstrip()[:-1] + b", " + number + b"}",
        content.replace(b"\n", b" \r\n\t"),
        content.decode().encode("utf-16"),
    )
    return dice.choice(texts)


def _places(values: Any) -> list[tuple[Any, Any]]:
    """Every (list or dict, index or key) in a JSON value."""
    found: list[tuple[Any, Any]] = []
    waiting = [values]  # not by recursion: some are deep
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        found += [(holder, key) for key in keys]
        waiting += [holder[key] for key in keys]
    return found


def fuzz(folder: Path, cases: range, *, forged: bool) -> Counter[str]:
    """Damage both shards `folder/a/x` and `folder/b/x`; returns what came of it.

    Args:
        cases: seeds; odd ones damage b.
        forged: make hashes fit again, then read and verify what opens; only ValueError may come of it.
    """
    prefixes = (folder / "a" / "x", folder / "b" / "x")
    files, originals = [read_files(p) for p in prefixes], [content_of(p) for p in prefixes]
    results: Counter[str] = Counter()
    for case in cases:
        which = case % 2
        changed = damage(random.Random(case), files[which], files[1 - which])
        write_files(prefixes[which], forge(changed) if forged else changed)
        try:
            result = outcome(prefixes[which], originals[which])
        except BaseException as error:
            raise AssertionError(f"case {case}, forged={forged}: {error!r}") from error
        results[result] += 1
        if result == "wrong" and not forged:
            raise AssertionError(f"case {case}: opened with other content")
    for prefix, content in zip(prefixes, files, strict=True):
        write_files(prefix, content)
    return results


def main() -> None:
    """`shard_fuzz.py FOLDER CASES`: fuzz with forged hashes and 300 MB beyond the imports; prints the counts."""
    folder, cases = Path(sys.argv[1]), int(sys.argv[2])
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000,) * 2)
    print(json.dumps(fuzz(folder, range(cases), forged=True)))


if __name__ == "__main__":
    main()
