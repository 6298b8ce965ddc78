import shutil
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from megachameleon.data.blending.blending import BlendedSamples
from megachameleon.data.blending.mixture import Stage
from megachameleon.data.documents import DocumentOptions
from megachameleon.data.packing import packed as packed_module
from megachameleon.data.packing.pack_file import pack_path, verify_pack
from megachameleon.data.packing.pack_index import PackIndex, ShardEntry, index_path, write_index
from megachameleon.data.packing.packed import IndexedSource, PackedDataset, Place, open_packed
from megachameleon.data.packing.packing import PACKING_MODES
from megachameleon.data.packing.packing_job import pack_folder, verify_packs
from megachameleon.data.packing.strata import NUM_STRATA
from megachameleon.data.plan import PlannedInput, make_units, save_plan
from megachameleon.data.shards.reader import shard_prefixes

LENGTH = 31


@pytest.fixture
def folder(tmp_path, make_document, write_shard):
    """Five shards of text and pictures, the third of them without documents."""
    random = np.random.default_rng(0)
    for shard in range(5):
        documents = [make_document(*random.integers(0, 4, 4), seed=i) for i in range(30 if shard != 2 else 0)]
        _write(write_shard, tmp_path / "data" / f"unit_{shard}", documents)
    return tmp_path / "data"


def _write(write_shard, prefix, documents):
    try:
        write_shard(prefix, documents)
    except ValueError as error:  # the fixture opens what it wrote, and this shard has no documents
        assert "no documents" in str(error)


def all_samples(dataset):
    return [tuple(part.tolist() for part in dataset.read(index)) for index in range(len(dataset))]


@pytest.mark.parametrize("mode", PACKING_MODES)
def test_an_index_gives_the_samples_that_memory_gives(folder, mode):
    before = open_packed([folder], LENGTH, mode)
    summary = pack_folder(folder, LENGTH, mode)
    after = open_packed([folder], LENGTH, mode)
    assert isinstance(after.sources[0], IndexedSource) and not isinstance(before.sources[0], IndexedSource)
    assert all_samples(after) == all_samples(before)
    assert after.fingerprint == before.fingerprint and asdict(after.summary) == asdict(before.summary)
    assert summary.documents == 120 and summary.shards == 5 and after.fill_rate > 0.8
    for index in range(len(after)):
        assert after.index_of(after.place(index)) == before.index_of(before.place(index)) == index
        assert after.place(index) == before.place(index)
    with pytest.raises(ValueError, match="no sample 99"):
        after.index_of(Place(folder / "unit_1", 99))


def test_several_folders_are_one_dataset(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "more")
    pack_folder(folder, LENGTH, "best_fit")
    both = open_packed([folder, tmp_path / "more" / "unit_0"], LENGTH, "best_fit")
    apart = [open_packed([path], LENGTH, "best_fit") for path in (folder, tmp_path / "more" / "unit_0")]
    assert sorted(all_samples(both)) == sorted(all_samples(apart[0]) + all_samples(apart[1]))
    assert all(both.index_of(both.place(index)) == index for index in range(len(both)))
    assert (np.diff([_stratum(both, index) for index in range(len(both))]) >= 0).all()


def _stratum(dataset, index):
    sample = dataset[index]
    return int(sample.image_mask.sum() * NUM_STRATA // sample.loss_mask.sum())


def test_packing_can_be_interrupted_and_done_in_parts(folder):
    pack_folder(folder, LENGTH, "best_fit", unit=1)
    first = pack_path(folder / "unit_1", "best_fit", LENGTH)
    assert first.exists() and not index_path(folder, "best_fit", LENGTH).exists()
    made = first.stat().st_mtime_ns
    content = first.read_bytes()
    damaged = pack_path(folder / "unit_3", "best_fit", LENGTH)
    damaged.write_bytes(content[:50])
    pack_folder(folder, LENGTH, "best_fit", workers=2)
    verify_pack(damaged)
    assert first.stat().st_mtime_ns == made
    index = index_path(folder, "best_fit", LENGTH).read_bytes()
    pack_folder(folder, LENGTH, "best_fit")
    assert index_path(folder, "best_fit", LENGTH).read_bytes() == index
    with pytest.raises(ValueError, match="has 5 shards; choose 0 to 4"):
        pack_folder(folder, LENGTH, "best_fit", unit=5)


def test_a_shard_alone_gets_no_index(folder):
    prefix = shard_prefixes(folder)[0]
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match=f"^{prefix}: a shard, but an index is of a folder; give {folder}, "):
        pack_folder(prefix, LENGTH, "best_fit")
    with pytest.raises(ValueError, match="--workers 0: must be at least 1"):
        pack_folder(folder, LENGTH, "best_fit", workers=0)
    assert sorted(folder.iterdir()) == before


def test_verifying_packs_names_each_that_is_wrong(folder, write_shard, make_document):
    for mode in ("best_fit", "continuous"):
        pack_folder(folder, LENGTH, mode)
    assert verify_packs(folder) == []
    path = pack_path(folder / "unit_0", "continuous", LENGTH)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    _replace(folder / "unit_3", write_shard, make_document)
    index_path(folder, "other", 5).write_bytes(b"nothing")
    problems = verify_packs(folder)
    assert len(problems) == 4 and all(
        name in "".join(problems) for name in ("unit_0.pack-cont", "unit_3", "pack-other")
    )


def _remove(prefix, write_shard, make_document):
    prefix.with_suffix(".json").unlink()


def _replace(prefix, write_shard, make_document):
    write_shard(prefix, [make_document(5, 0, seed=1000 + i) for i in range(30)])


def _replace_and_pack(prefix, write_shard, make_document):
    _replace(prefix, write_shard, make_document)
    pack_folder(prefix, LENGTH, "best_fit", unit=0)  # the shard alone: the folder's index is the old one


def _truncate(prefix, write_shard, make_document):
    path = prefix.with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:-2])


def _remove_pack(prefix, write_shard, make_document):
    pack_path(prefix, "best_fit", LENGTH).unlink()


@pytest.mark.parametrize("damage", [_remove, _replace, _replace_and_pack, _truncate, _remove_pack])
@pytest.mark.parametrize("at_start", [True, False])
def test_a_changed_missing_or_replaced_shard_is_named(folder, write_shard, make_document, damage, at_start):
    pack_folder(folder, LENGTH, "best_fit")
    damage(folder / "unit_3", write_shard, make_document)
    with pytest.raises(ValueError, match=r"unit_3.*(missing|changed or replaced)"):
        dataset = open_packed([folder], LENGTH, "best_fit", checked=64 if at_start else 0)
        assert not at_start
        all_samples(dataset)


def test_a_flipped_bit_of_the_data_is_noticed_when_it_is_read(folder):
    pack_folder(folder, LENGTH, "best_fit")
    content = bytearray((folder / "unit_1.bin").read_bytes())
    content[40] ^= 1
    (folder / "unit_1.bin").write_bytes(content)
    dataset = open_packed([folder], LENGTH, "best_fit")
    with pytest.raises(ValueError, match=r"unit_1.bin: sample \d+ has another checksum"):
        all_samples(dataset)


def test_an_index_from_before_the_plan_grew_is_refused(folder):
    pack_folder(folder, LENGTH, "best_fit")
    shared = dict.fromkeys(("root", "tokenizer", "tokenizer_fingerprint"), "")
    shared |= {"image_tokenizer": None, "image_tokenizer_fingerprint": None, "options": DocumentOptions()}
    shared |= {"allow_damaged_archives": False, "drop_duplicates": False}
    entry = {"bytes": 1, "sha256": "0" * 64, "text_bytes": 1, "num_pictures": 0}
    for count in (5, 6):
        units = make_units([PlannedInput(name=f"{i}.jsonl", **entry) for i in range(count)])
        save_plan(folder, shared, units, np.empty(0, np.int64), replace=True)
        if count == 5:
            open_packed([folder], LENGTH, "best_fit")
    with pytest.raises(ValueError, match="made of 5 shards, but the plan beside it has 6 units"):
        open_packed([folder], LENGTH, "best_fit")


def test_too_much_to_pack_at_each_start_asks_for_an_index(folder, monkeypatch):
    monkeypatch.setattr(packed_module, "MAX_DOCUMENTS", 100)
    with pytest.raises(ValueError, match=r"first run: preprocess_data.py pack .* --sequence-length 31 --packing cont"):
        open_packed([folder], LENGTH, "continuous")
    monkeypatch.setattr(packed_module, "MAX_SHARDS", 4)
    with pytest.raises(ValueError, match="5 shards are too many"):
        open_packed([folder], LENGTH, "best_fit")


def test_a_start_looks_at_all_of_few_shards_and_at_a_few_of_many(folder, monkeypatch):
    pack_folder(folder, LENGTH, "best_fit")
    looked_at = []
    original = IndexedSource._open_shard
    monkeypatch.setattr(
        IndexedSource, "_open_shard", lambda self, name, pack: looked_at.append(name) or original(self, name, pack)
    )
    open_packed([folder], LENGTH, "best_fit")
    assert looked_at == ["unit_0", "unit_1", "unit_3", "unit_4"]  # unit_2 has no samples
    monkeypatch.setattr(packed_module, "CHECKED_SHARDS", 4)
    looked_at.clear()
    open_packed([folder], LENGTH, "best_fit")
    assert looked_at == ["unit_0", "unit_1", "unit_3"]


def test_names_in_an_index_cannot_leave_its_folder(folder):
    pack_folder(folder, LENGTH, "best_fit")
    path = index_path(folder, "best_fit", LENGTH)
    index = PackIndex(path)
    entries = [index.entry(number)[0] for number in range(5)]
    write_index(path, index.summary, [replace(entry, name=f"../data/{entry.name}") for entry in entries])
    with pytest.raises(ValueError, match="not the name of a shard"):
        open_packed([folder], LENGTH, "best_fit")


@pytest.fixture
def huge(folder, tmp_path):
    """The index of 100,000 shards that do not exist, with 1.7e8 samples, in 64 folders."""
    pack_folder(folder, LENGTH, "best_fit")
    summary = PackIndex(index_path(folder, "best_fit", LENGTH)).summary
    strata = [0] * NUM_STRATA
    strata[0], strata[7], strata[12] = 700, 500, 500
    entries = [ShardEntry(f"unit_{number:06d}", "0" * 32, strata) for number in range(100_000)]
    counts = {"shards": 100_000, "strata": [100_000 * count for count in strata], "tokens": 31 * 170_000_000}
    labels = {"labels": 30 * 170_000_000, "image_labels": 12 * 170_000_000}
    folders = [tmp_path / f"huge_{number}" for number in range(64)]
    for number, one in enumerate(folders):
        one.mkdir()
        path = index_path(one, "best_fit", LENGTH)
        if number:
            path.hardlink_to(index_path(folders[0], "best_fit", LENGTH))
        else:
            write_index(path, replace(summary, **counts, **labels), entries)
    return folders


def test_ten_billion_samples_start_without_touching_shards(huge, monkeypatch):
    opened = []
    original = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *args, **more: opened.append(path) or original(path, *args, **more))
    tracemalloc.start()
    datasets = {path.name: open_packed([path], LENGTH, "best_fit", checked=0) for path in huge}
    weights = {name: 1.0 + number for number, name in enumerate(datasets)}
    blended = BlendedSamples.of(datasets, [Stage(None, weights, "tokens")], seed=1)
    assert len(opened) == 64 and {path.suffix for path in opened} == {".index"}
    assert sum(map(len, datasets.values())) == 64 * 170_000_000 > 10**10
    places = {}
    for position in [0, 1, 10**9, 10**10, *range(5 * 10**9, 5 * 10**9 + 100)]:
        draw = blended.blend[position]
        if position % 10**9 < 2:
            assert blended.blend.position_of(draw) == position
        source, index = datasets[draw.dataset].sources[0], draw.index
        stratum = 0 if index < 70_000_000 else 7 if index < 120_000_000 else 12
        entry, within = source.index.find(stratum, index - {0: 0, 7: 70_000_000, 12: 120_000_000}[stratum])
        places[position] = (draw.dataset, entry.name, stratum, within)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(places.values())) == len(places)
    assert peak < 40e6 and len(opened) == 64


def test_one_dataset_of_two_huge_folders(huge):
    one = IndexedSource(huge[0], index_path(huge[0], "best_fit", LENGTH))
    both = PackedDataset([one, IndexedSource(huge[1], index_path(huge[1], "best_fit", LENGTH))], "both")
    assert len(both) == 340_000_000 and both.strata[7] == 100_000_000
