"""Is the caption the picture's name? Word for word, any of its names, or nearest to one of them."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from megachameleon.evaluation.gallery import NamedPrompt
from megachameleon.evaluation.statistics import wilson_interval


def comparable(text: str) -> str:
    """Text without case, surplus space and differences of Unicode form."""
    # the same name may be written with combined or separate accents
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


class KnownNames:
    """All names of all pictures, searched by shared pairs of characters."""

    def __init__(self, named: Iterable[NamedPrompt]) -> None:
        keys: dict[str, set[str]] = defaultdict(set)
        for prompt in named:
            keys[comparable(prompt.text)].add(prompt.key)
        self._names = sorted(keys)
        self._keys = [keys[name] for name in self._names]
        self._pairs = [_pairs(name) for name in self._names]
        self._sizes = np.array([pairs.total() for pairs in self._pairs])
        self._holders: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for index, pairs in enumerate(self._pairs):
            for pair, count in pairs.items():
                self._holders[pair].append((index, count))

    def keys_of(self, text: str) -> set[str]:
        """Pictures with exactly this name."""
        wanted = comparable(text)
        index = int(np.searchsorted(self._names, wanted)) if self._names else 0
        return self._keys[index] if index < len(self._names) and self._names[index] == wanted else set()

    def nearest(self, text: str) -> tuple[str, set[str]]:
        """The most similar known name by the Dice coefficient of character pairs, and its pictures; "" if none is."""
        pairs = _pairs(comparable(text))
        shared = np.zeros(len(self._names))
        for pair, count in pairs.items():
            for index, own in self._holders.get(pair, ()):
                # by holders of a pair, not by names: most names share no pair with a caption
                shared[index] += min(count, own)
        if not shared.any():
            return "", set()
        # of equal ones the first by name, the same in every run
        best = int(np.argmax(2 * shared / (self._sizes + pairs.total())))
        return self._names[best], self._keys[best]


def _pairs(text: str) -> Counter[str]:
    # marks at both ends, so that beginnings and ends of names count and single letters have pairs
    padded = f"\x02{text}\x03"
    return Counter(padded[i : i + 2] for i in range(len(padded) - 1))


def caption_report(prompts: Sequence[NamedPrompt], said: Sequence[str], names: KnownNames) -> dict[str, Any]:
    """Rates by kind with 95 % Wilson intervals, and every caption.

    `exact`: the expected name. `any_name`: a name of the picture in any language. `nearest_name`: the known name that
    is most similar belongs to the picture.
    """
    rows = [_judge(prompt, text, names) for prompt, text in zip(prompts, said, strict=True)]
    kinds = list(dict.fromkeys(prompt.kind for prompt in prompts))
    groups = [_rates(kind, [row for row in rows if row["kind"] == kind]) for kind in kinds]
    return {
        "prompts": len(prompts),
        "groups": groups if len(kinds) == 1 else [*groups, _rates("all", rows)],
        "captions": rows,
    }


def _judge(prompt: NamedPrompt, said: str, names: KnownNames) -> dict[str, Any]:
    nearest, keys = names.nearest(said)
    return {
        "key": prompt.key,
        "kind": prompt.kind,
        "lang": prompt.lang,
        "name": prompt.text,
        "said": said,
        "nearest": nearest,
        "exact": comparable(said) == comparable(prompt.text),
        "any_name": prompt.key in names.keys_of(said),
        "nearest_name": prompt.key in keys,
    }


def _rates(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    group: dict[str, Any] = {"name": name, "held_out": name.startswith("held-out"), "prompts": len(rows)}
    for measure in ("exact", "any_name", "nearest_name"):
        hits = sum(row[measure] for row in rows)
        group[measure] = hits / len(rows)
        group[f"{measure}_interval"] = list(wilson_interval(hits, len(rows)))
    return group
