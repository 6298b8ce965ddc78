import sqlite3

import numpy as np
import pytest

from megachameleon.data.preprocessing.block import Block
from megachameleon.data.preprocessing.picture_codes import MAX_WAITING, CodeCaches, CodeFiller, PictureCounts, code_key
from megachameleon.data.records import PictureSegment


class Encoder:
    """Codes of a picture are its first pixel, modulo 8; remembers the sizes of the batches."""

    batch_size = 4

    def __init__(self):
        self.batches: list[int] = []

    def encode(self, pixels):
        self.batches.append(len(pixels))
        return (pixels[:, 0, :1, 0] % 8).astype(np.int32).repeat(4, axis=1)


def block(vocabulary, *keys: str, codes=None) -> Block:
    document = np.concatenate([[vocabulary.bos], *[vocabulary.encode_image([0] * 4) for _ in keys], [vocabulary.eos]])
    known = codes or {}
    return Block(
        input=0,
        num_records=1,
        position=0,
        ids=document.astype(np.uint16),
        lengths=np.array([len(document)]),
        holes=np.arange(len(keys)) * vocabulary.image_length + 2,
        keys=list(keys),
        codes=known,
        pixels={key: np.full((3, 8, 8), int(key), np.uint8) for key in keys if key not in known},
    )


def filled(blocks, vocabulary) -> list[list[int]]:
    """The code that each picture of each block got."""
    rows = [b.ids[b.holes[:, None] + np.arange(4)].astype(int) - vocabulary.image_code_start for b in blocks]
    assert all((row == row[:, :1]).all() for row in rows)
    return [row[:, 0].tolist() for row in rows]


def test_batches_are_full_over_blocks_which_leave_in_order(vocabulary):
    encoder, counts = Encoder(), PictureCounts()
    filler = CodeFiller(encoder, vocabulary, None, counts)
    assert filled(filler.add(block(vocabulary, "1", "2", "1")), vocabulary) == []
    assert filled(filler.add(block(vocabulary)), vocabulary) == []  # text waits for its turn
    assert filled(filler.add(block(vocabulary, "3", "2", "4", "5")), vocabulary) == [[1, 2, 1], []]
    assert encoder.batches == [4]
    assert filled(filler.finish(), vocabulary) == [[3, 2, 4, 5]]
    assert encoder.batches == [4, 1]
    known = {"6": np.full(4, 6, np.int32)}
    assert filled(filler.add(block(vocabulary, "6", "5", codes=known)), vocabulary) == [[6, 5]]
    assert encoder.batches == [4, 1]
    assert (counts.pictures, counts.cached, counts.encoded) == (9, 3, 5)


def test_text_does_not_wait_for_ever(vocabulary):
    filler = CodeFiller(Encoder(), vocabulary, None, PictureCounts())
    assert list(filler.add(block(vocabulary, "1"))) == []
    out = [len(list(filler.add(block(vocabulary)))) for _ in range(MAX_WAITING + 1)]
    assert out == [0] * (MAX_WAITING - 1) + [MAX_WAITING + 1, 1]


def test_codes_are_forgotten_also_where_some_block_always_waits(vocabulary):
    filler = CodeFiller(Encoder(), vocabulary, None, PictureCounts(), remember=8)
    done = list(filler.add(block(vocabulary, "200")))
    for first in range(0, 160, 4):
        done += filler.add(block(vocabulary, *map(str, range(first, first + 4))))
        assert len(filler._known) <= 2 * 8 + 4
    done += filler.finish()
    assert filled(done, vocabulary) == [[0], *([first % 8 + i for i in range(4)] for first in range(0, 160, 4))]


def test_impossible_codes_are_refused(vocabulary):
    filler = CodeFiller(Encoder(), vocabulary, None, PictureCounts())
    with pytest.raises(ValueError, match=r"codes 9\.\.9 are outside the vocabulary's"):
        list(filler.add(block(vocabulary, "1", codes={"1": np.full(4, 9, np.int32)})))


def test_keys_tell_content_and_preparation_apart():
    pictures = [PictureSegment(b"a", "x"), PictureSegment(b"b", "x"), PictureSegment(b"a", "x", "pad")]
    assert len({code_key(picture, exact) for picture in pictures for exact in (True, False)}) == 6
    assert code_key(PictureSegment(b"a", "y"), True) == code_key(pictures[0], True)


def test_caches_are_asked_in_turn_and_only_the_first_is_written(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    cache = CodeCaches([old], "f", 4)
    cache.put({"a": np.array([1, 2, 3, 4]), "b": np.array([5, 6, 7, 8])})
    cache.close()
    before = (old / "codes-f.sqlite").read_bytes()
    both = CodeCaches([new, old, tmp_path / "absent"], "f", 4)
    both.put({"a": np.array([0, 0, 0, 0])})
    found = both.get(["a", "b", "c"])
    assert {key: codes.tolist() for key, codes in found.items()} == {"a": [0] * 4, "b": [5, 6, 7, 8]}
    reading = CodeCaches([new, old], "f", 4, read_only=True)
    assert sorted(reading.get(["a", "b", "c"])) == ["a", "b"]
    for caches in (both, reading):
        caches.close()
    assert (old / "codes-f.sqlite").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


def test_codes_that_changed_are_not_believed(tmp_path):
    cache = CodeCaches([tmp_path], "f", 4)
    cache.put({"a": np.array([1, 2, 3, 4]), "b": np.array([5, 6, 7, 8])})
    cache.close()
    with sqlite3.connect(tmp_path / "codes-f.sqlite") as connection:
        (blob,) = connection.execute("SELECT codes FROM codes WHERE key = 'a'").fetchone()
        connection.execute("UPDATE codes SET codes = ? WHERE key = 'a'", (b"\x02" + blob[1:],))
        connection.execute("INSERT INTO codes VALUES ('c', (SELECT codes FROM codes WHERE key = 'b'))")
    connection.close()
    cache = CodeCaches([tmp_path], "f", 4)
    assert sorted(cache.get(["a", "b", "c"])) == ["b"]
    cache.close()
