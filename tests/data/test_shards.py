import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megachameleon.data.shards.document_checks import find_image_spans
from megachameleon.data.shards.manifest import ShardManifest
from megachameleon.data.shards.reader import Dataset, ShardReader
from megachameleon.data.shards.writer import ShardWriter
from megachameleon.tokens.vocabulary import Vocabulary


@pytest.fixture
def documents(make_document):
    return [make_document(5, 0, 7, 0, seed=1), make_document(3, seed=2), make_document(0, 4, seed=3)]


def test_bytes_equal_those_of_megatron_cores_builder(tmp_path, documents, write_shard):
    write_shard(tmp_path / "ours", documents)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    theirs = IndexedDataset(str(tmp_path / "ours"))
    assert all(np.array_equal(theirs[i], document) for i, document in enumerate(documents))


@pytest.mark.parametrize(("size", "dtype"), [(65_536, np.uint16), (65_600, np.int32)])
def test_dtype_is_uint16_whenever_ids_fit(tmp_path, size, dtype):
    vocabulary = Vocabulary(size=size)
    with ShardWriter(tmp_path / "x", vocabulary, tokenizer="t") as writer:
        writer.add([0, size - 1, 2])
        writer.commit()
    assert Dataset.open(tmp_path / "x").document(0).dtype == dtype
    theirs = IndexedDataset(str(tmp_path / "x"))  # its views die with it
    assert theirs[0].tolist() == [0, size - 1, 2]


def test_documents_spans_and_counts_come_back(tmp_path, documents, write_shard, vocabulary):
    dataset = write_shard(tmp_path / "x", documents)
    assert dataset.lengths.tolist() == [len(document) for document in documents]
    for index, document in enumerate(documents):
        assert np.array_equal(dataset.document(index), document)
    assert dataset.image_spans(0).tolist() == [[6, 6], [19, 6]]
    assert dataset.image_spans(1).tolist() == []
    assert dataset.image_spans(2).tolist() == [[1, 6]]
    manifest = dataset.shards[0].manifest
    assert (manifest.num_images, manifest.num_image_tokens) == (3, 18)
    assert manifest.num_text_tokens == sum(map(len, documents)) - 18
    assert manifest.vocabulary == vocabulary
    dataset.shards[0].verify()


def test_nothing_exists_before_commit_or_after_an_error(tmp_path, documents, vocabulary):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "x", vocabulary, tokenizer="t") as writer:
        writer.add(documents[0])
        raise RuntimeError("killed")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="no finished shards"):
        Dataset.open(tmp_path)


def test_a_shard_without_manifest_says_to_run_again(tmp_path, documents, write_shard):
    write_shard(tmp_path / "a", documents)
    write_shard(tmp_path / "b", documents)
    (tmp_path / "b.json").unlink()
    with pytest.raises(ValueError, match=r"b\.json: no manifest.*run preprocess_data\.py again"):
        ShardReader(tmp_path / "b")
    assert len(Dataset.open(tmp_path)) == len(documents)
    (tmp_path / "a.json").unlink()
    with pytest.raises(ValueError, match="2 unfinished"):
        Dataset.open(tmp_path)


@pytest.mark.parametrize("bad", [[], [3, 128], [-1, 3], [0.5]])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, vocabulary, bad):
    with ShardWriter(tmp_path / "x", vocabulary, tokenizer="t") as writer, pytest.raises(ValueError, match="document"):
        writer.add(bad)


@pytest.mark.parametrize(
    ("ids", "lengths", "what"),
    [
        ([0, 60, 2, 0, 2], [3, 3], "5 came"),
        ([0, 60, 2, 0, 2], [3, 1], "5 came"),
        ([0, 60, 2, 0, 2], [3, 0, 2], "document 2: 0 "),
        ([0, 60, 2, 0, 2], [2**63 - 1, 6, 2**63 - 1], "document 1: "),
        ([0, 60, 2, 0, 128], [3, 2], r"document 2: id 128 is outside the vocabulary 0\.\.127"),
        ([0, -1, 2, 0, 2], [3, 2], "document 1: id -1 is outside"),
        ([0, 60, 2, 12, 2], [3, 2], "document 2: 0 begin_image, 0 picture codes and 1 end_image"),
        ([0, 13, 5, 5, 5, 5, 12, 2], [4, 4], "document 1: 1 begin_image, 2 picture codes and 0 end_image"),
    ],
)
def test_a_block_is_refused_whole_and_the_document_is_named(tmp_path, vocabulary, ids, lengths, what):
    assert (vocabulary.end_image, vocabulary.begin_image) == (12, 13)
    with ShardWriter(tmp_path / "x", vocabulary, tokenizer="t") as writer:
        writer.add([0, 70, 2])
        with pytest.raises(ValueError, match=what):
            writer.add_block(np.array(ids), np.array(lengths))
        writer.commit()
    assert Dataset.open(tmp_path / "x").document(0).tolist() == [0, 70, 2]


def test_a_document_longer_than_the_index_can_count_is_refused(tmp_path, vocabulary):
    with ShardWriter(tmp_path / "x", vocabulary, tokenizer="t") as writer:
        endless = np.broadcast_to(np.uint8(70), 2**31)  # takes no memory
        with pytest.raises(ValueError, match="2,147,483,647"):
            writer.add(endless)


def test_torn_pictures_are_refused(vocabulary, make_document):
    document = make_document(2, 0, 2)
    start = int(find_image_spans(document, vocabulary)[0, 0])
    for position in range(start, start + vocabulary.image_length):
        with pytest.raises(ValueError, match="whole pictures"):
            find_image_spans(np.delete(document, position), vocabulary)
    swapped = document.copy()
    swapped[[start + 5, start + 6]] = swapped[[start + 6, start + 5]]
    with pytest.raises(ValueError, match="whole pictures"):
        find_image_spans(swapped, vocabulary)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".spans"])
def test_damaged_files_are_refused(tmp_path, documents, write_shard, suffix):
    write_shard(tmp_path / "x", documents)
    path = tmp_path / f"x{suffix}"
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    with pytest.raises(ValueError, match=f"x{suffix}: .*preprocess the data again"):
        Dataset.open(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=f"x{suffix}: missing"):
        Dataset.open(tmp_path)


@pytest.mark.parametrize("suffix", [".idx", ".spans"])
def test_a_flipped_bit_of_an_index_is_found_when_the_shard_is_opened(tmp_path, documents, write_shard, suffix):
    write_shard(tmp_path / "x", documents)
    path = tmp_path / f"x{suffix}"
    content = path.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=f"x{suffix}: its SHA-256"):
            ShardReader(tmp_path / "x")


def test_every_flipped_bit_is_found(tmp_path, documents, write_shard):
    write_shard(tmp_path / "x", documents)
    random = np.random.default_rng(0)
    for suffix in (".bin", ".idx", ".spans"):
        path = tmp_path / f"x{suffix}"
        content = path.read_bytes()
        for position in random.integers(0, len(content), 12):
            changed = bytearray(content)
            changed[position] ^= 1 << int(random.integers(8))
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=r"preprocess"):
                ShardReader(tmp_path / "x").verify()
        path.write_bytes(content)
    ShardReader(tmp_path / "x").verify()


def test_a_wrong_manifest_is_refused(tmp_path, documents, write_shard, vocabulary):
    dataset = write_shard(tmp_path / "x", documents)
    manifest = dataset.shards[0].manifest
    path = tmp_path / "x.json"
    for changed in (replace(manifest, num_documents=7), replace(manifest, dtype="int32")):
        changed.save(path)
        with pytest.raises(ValueError, match=r"x\.json"):
            ShardReader(tmp_path / "x")
    shard = '{"format": "megachameleon-shard"'
    for text in (
        "{",
        "[]",
        "[" * 100_000,
        "9" * 5000,
        shard + "}",
        shard + ', "version": 2}',
        shard + ', "version": []}',
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"x\.json"):
            Dataset.open(tmp_path)
    path.write_text(shard + ', "version": 1}')
    with pytest.raises(
        ValueError, match=r"format version 1, this program reads version 2; run preprocess_data\.py run"
    ):
        Dataset.open(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"tokenizer": "other"},
        {"num_images": True},
        {"inputs": [{"name": "a.tar", "bytes": 1, "sha256": "0" * 64}]},
        {"options": {"seed": 1}},
        {"quarantined": {"a.tar": 1}},
        {"manifest_sha256": None},
        {"comment": "harmless"},
    ],
)
def test_no_field_of_a_manifest_can_be_changed(tmp_path, documents, write_shard, changed):
    write_shard(tmp_path / "x", documents)
    values = json.loads((tmp_path / "x.json").read_text())
    (tmp_path / "x.json").write_text(json.dumps({**values}))  # white space means nothing
    assert len(ShardReader(tmp_path / "x")) == len(documents)
    (tmp_path / "x.json").write_text(json.dumps({**values, **changed}))
    with pytest.raises(ValueError, match=r"x\.json: damaged manifest \(changed since it was written"):
        ShardReader(tmp_path / "x")


def test_options_need_not_be_as_json_has_them(tmp_path, documents, vocabulary):
    with ShardWriter(tmp_path / "x", vocabulary, tokenizer="t") as writer:
        writer.add(documents[1])
        writer.commit(options={"lengths": {9: 1, 10: 2}, "languages": ("en", "de")})
    options = ShardReader(tmp_path / "x").manifest.options
    assert options == {"lengths": {"9": 1, "10": 2}, "languages": ["en", "de"]}


def test_a_manifest_with_numbers_that_json_lacks_is_not_written(tmp_path, documents, vocabulary):
    with ShardWriter(tmp_path / "x", vocabulary, tokenizer="t") as writer:
        writer.add(documents[1])
        with pytest.raises(ValueError, match="JSON"):
            writer.commit(options={"share": float("nan")})
    assert list(tmp_path.glob("*.json")) == []


def test_several_shards_are_one_dataset(tmp_path, documents, write_shard):
    write_shard(tmp_path / "b.1", documents[1:])
    write_shard(tmp_path / "a", documents[:1])
    (tmp_path / "notes.json").write_text(json.dumps({"not": "a shard"}))
    dataset = Dataset.open(tmp_path)
    assert all(np.array_equal(dataset.document(i), document) for i, document in enumerate(documents))
    assert np.array_equal(dataset.image_spans(2), [[1, 6]])
    listed = Dataset.open([tmp_path / "b.1.idx", tmp_path / "a"])
    assert np.array_equal(listed.document(2), documents[0])
    assert listed.fingerprint != dataset.fingerprint == Dataset.open(str(tmp_path)).fingerprint
    with pytest.raises(IndexError):
        dataset.document(3)


def test_mixed_vocabularies_and_tokenizers_are_refused(tmp_path, documents, write_shard, vocabulary):
    write_shard(tmp_path / "a", documents)
    with ShardWriter(tmp_path / "b", vocabulary, tokenizer="other") as writer:
        writer.add(documents[1])
        writer.commit()
    with pytest.raises(ValueError, match="tokenizer"):
        Dataset.open(tmp_path)
    with ShardWriter(tmp_path / "b", replace(vocabulary, size=192), tokenizer="t" * 16) as writer:
        writer.add(documents[1])
        writer.commit()
    with pytest.raises(ValueError, match="size=128"):
        Dataset.open(tmp_path)


def test_image_tokenizers_are_compared_among_all_shards(tmp_path, documents, vocabulary):
    for name, image_tokenizer in {"a": None, "b": "A", "c": None, "d": "B"}.items():
        with ShardWriter(tmp_path / name, vocabulary, tokenizer="t", image_tokenizer=image_tokenizer) as writer:
            writer.add(documents[0 if image_tokenizer else 1])
            writer.commit()
        if name == "c":
            assert Dataset.open(tmp_path).image_tokenizer == "A"
    with pytest.raises(ValueError, match=r"different image_tokenizers: .*b with A, .*d with B"):
        Dataset.open(tmp_path)


def test_an_old_manifest_is_gone_for_good_before_new_data_comes(tmp_path, documents, write_shard, monkeypatch):
    write_shard(tmp_path / "x", documents)
    old = (tmp_path / "x.bin").read_bytes()
    states = []

    def look(folder):
        states.append(((tmp_path / "x.json").exists(), (tmp_path / "x.bin").read_bytes() == old))

    monkeypatch.setattr("megachameleon.data.shards.writer.sync_directory", look)
    write_shard(tmp_path / "x", documents[1:])
    assert states == [(False, True), (False, False)]


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder or shard"):
        Dataset.open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no finished shards"):
        Dataset.open(tmp_path)


def test_an_empty_shard_is_readable_and_adds_nothing(tmp_path, documents, write_shard, vocabulary):
    write_shard(tmp_path / "a", documents)
    with ShardWriter(tmp_path / "b", vocabulary, tokenizer="t" * 16) as writer:
        writer.commit()
    assert len(Dataset.open(tmp_path)) == len(documents)
    with pytest.raises(ValueError, match="no documents"):
        Dataset.open(tmp_path / "b")


def test_the_manifest_is_the_same_after_reading(tmp_path, documents, write_shard):
    manifest = write_shard(tmp_path / "x", documents).shards[0].manifest
    manifest.save(tmp_path / "copy.json")
    assert ShardManifest.load(tmp_path / "copy.json") == manifest
