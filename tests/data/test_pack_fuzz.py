"""Packs and indices with changed bytes: a clear error or the right tokens, never anything else."""

import numpy as np
import pytest

from megachameleon.data.packing.pack_file import PackedShard, pack_path, read_pack, verify_pack
from megachameleon.data.packing.pack_index import PackIndex, index_path
from megachameleon.data.packing.packing_job import pack_folder
from megachameleon.data.shards.reader import ShardReader

CASES = 1500
LENGTH = 31
ABSURD = (0, 1, 2**31, 2**62, 2**63 - 1, 2**64 - 1)


@pytest.fixture
def folder(tmp_path, make_document, write_shard):
    random = np.random.default_rng(0)
    for shard in range(3):
        documents = [make_document(*random.integers(0, 5, random.integers(1, 9)), seed=i) for i in range(8)]
        write_shard(tmp_path / f"unit_{shard}", documents)
    pack_folder(tmp_path, LENGTH, "best_fit")
    return tmp_path


def changed(content: bytes, random: np.random.Generator) -> bytes:
    """One bit or byte, a few, a number made absurd, a stretch removed or repeated, or the end cut off."""
    data = bytearray(content)
    place = int(random.integers(len(data)))
    if random.random() < 0.3:  # the start matters most
        place = int(random.integers(min(len(data), 64)))
    match int(random.integers(7)):
        case 0 | 1:
            data[place] ^= 1 << int(random.integers(8))
        case 2:
            for other in random.integers(len(data), size=5):
                data[other] = int(random.integers(256))
        case 3:
            place -= place % 8
            data[place : place + 8] = ABSURD[random.integers(len(ABSURD))].to_bytes(8, "little")
        case 4:
            del data[place : place + int(random.integers(1, 17))]
        case 5:
            data[place:place] = data[place : place + 8]
        case 6:
            del data[place:]
    return bytes(data)


def damage(path, read):
    """Change the file in many ways; count the errors, and require that whatever is read is what was written."""
    content = path.read_bytes()
    wanted = read()
    random = np.random.default_rng(0)
    refused = 0
    for case in range(CASES):
        mutant = changed(content, random)
        if mutant == content:
            continue
        path.unlink()  # a new file: maps of the old one stay what they are
        path.write_bytes(mutant)
        try:
            got = read()
        except ValueError as error:
            assert str(path.parent) in str(error)
            refused += 1
        else:
            assert got == wanted, f"case {case}: other values were read without an error"
    return refused


def test_damaged_packs_are_refused_or_harmless(folder):
    shard = ShardReader(folder / "unit_1")
    path = pack_path(folder / "unit_1", "best_fit", LENGTH)

    def read():
        header, packing, checks = read_pack(path)
        samples = PackedShard(folder / "unit_1", shard.ids, packing, LENGTH, checks)
        return header, [tuple(part.tolist() for part in samples.read(i)) for i in range(header.samples)]

    assert damage(path, read) > 0.9 * CASES


def test_verifying_a_pack_finds_every_change(folder):
    path = pack_path(folder / "unit_0", "best_fit", LENGTH)
    assert damage(path, lambda: verify_pack(path)) > 0.98 * CASES  # what is left was no change


def test_damaged_indices_are_refused(folder):
    path = index_path(folder, "best_fit", LENGTH)

    def read():
        index = PackIndex(path)
        strata = index.summary.strata
        found = [index.find(k, i) for k in range(len(strata)) for i in range(strata[k])]
        return index.summary, found, [index.entry(number) for number in range(3)]

    assert damage(path, read) > 0.95 * CASES
