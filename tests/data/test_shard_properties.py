"""Any documents of any vocabulary are written and read back, or refused."""

import json
import os
import tempfile
from itertools import chain, combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megachameleon.data.shards.document_checks import find_pictures, require_ids
from megachameleon.data.shards.manifest import ShardManifest
from megachameleon.data.shards.reader import Dataset, ShardReader
from megachameleon.data.shards.writer import ShardWriter
from megachameleon.tokens.vocabulary import Vocabulary

MANY = settings(max_examples=150, deadline=None, derandomize=True, database=None)
SOME = settings(MANY, max_examples=60)
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

vocabularies = st.one_of(
    st.builds(
        Vocabulary.compact,
        num_text_ids=st.sampled_from((1, 40, 300, 65_000, 65_529 - 4, 66_000)),
        num_image_codes=st.sampled_from((1, 2, 8)),
        image_grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    ),
    st.sampled_from((Vocabulary(), Vocabulary(size=65_535))),
)


@st.composite
def documents_of(draw, vocabulary: Vocabulary, min_size: int = 0) -> list[np.ndarray]:
    """Documents of text, pictures, both, or control ids, none empty."""
    text = st.lists(st.integers(vocabulary.text_start, vocabulary.size - 1), min_size=1, max_size=9).map(np.array)
    controls = sorted(set(vocabulary.control_ids.values()) - {vocabulary.begin_image, vocabulary.end_image})
    control = st.sampled_from(controls).map(lambda i: np.array([i]))
    codes = st.integers(0, 2**32 - 1).map(
        lambda seed: np.random.default_rng(seed).integers(0, vocabulary.num_image_codes, vocabulary.codes_per_image)
    )
    segments = st.lists(st.one_of(text, control, codes.map(vocabulary.encode_image)), min_size=1, max_size=4)
    return draw(st.lists(segments.map(np.concatenate), min_size=min_size, max_size=7))


def plain_spans(ids: list[int], vocabulary: Vocabulary) -> list[list[int]] | None:
    """Pictures of a document by a plain loop; None when one is torn."""
    spans, position = [], 0
    while position < len(ids):
        if ids[position] == vocabulary.begin_image:
            codes = ids[position + 1 : position + vocabulary.image_length - 1]
            end = ids[position + vocabulary.image_length - 1 : position + vocabulary.image_length]
            if not all(map(vocabulary.is_image_code, codes)) or end != [vocabulary.end_image]:
                return None
            spans.append([position, vocabulary.image_length])
            position += vocabulary.image_length
        elif ids[position] == vocabulary.end_image or vocabulary.is_image_code(ids[position]):
            return None
        else:
            position += 1
    return spans


def write(prefix: Path, vocabulary: Vocabulary, documents: list[np.ndarray]) -> ShardManifest:
    with ShardWriter(prefix, vocabulary, tokenizer="t", image_tokenizer="i") as writer:
        for document in documents:
            writer.add(document)
        return writer.commit()


def scratch_folder() -> tempfile.TemporaryDirectory:
    """In memory if there is such a place, for each example is written and flushed."""
    return tempfile.TemporaryDirectory(dir=IN_MEMORY)


@SOME
@given(st.data())
def test_documents_and_spans_come_back_for_us_and_for_megatron_core(data):
    vocabulary = data.draw(vocabularies)
    documents = data.draw(documents_of(vocabulary, min_size=1))
    split = data.draw(st.integers(0, len(documents)))
    with scratch_folder() as name:
        folder = Path(name)
        parts = {"a": documents[:split], "b": documents[split:]}
        manifests = [write(folder / name, vocabulary, part) for name, part in parts.items()]
        dataset = Dataset.open(folder)
        assert dataset.lengths.tolist() == [len(document) for document in documents]
        for index, document in enumerate(documents):
            assert dataset.document(index).dtype == vocabulary.token_dtype
            assert dataset.document(index).tolist() == document.tolist()
            assert dataset.image_spans(index).tolist() == plain_spans(document.tolist(), vocabulary)
        assert dataset.num_images.sum() == sum(manifest.num_images for manifest in manifests)
        for part, shard in zip(parts.values(), dataset.shards, strict=True):
            shard.verify()
            if part:
                theirs = IndexedDataset(str(shard.prefix))  # its views die with it
                assert [theirs[i].tolist() for i in range(len(theirs))] == [document.tolist() for document in part]


@SOME
@given(st.data())
def test_blocks_write_the_bytes_of_single_documents(data):
    vocabulary = data.draw(vocabularies)
    documents = data.draw(documents_of(vocabulary))
    dtypes = [np.int32, np.int64, np.uint64, vocabulary.token_dtype]
    with scratch_folder() as name:
        one_by_one, in_blocks = Path(name) / "one" / "x", Path(name) / "many" / "x"
        expected = write(one_by_one, vocabulary, documents)
        with ShardWriter(in_blocks, vocabulary, tokenizer="t", image_tokenizer="i") as writer:
            begin = 0
            while begin < len(documents):
                end = data.draw(st.integers(begin + 1, len(documents)))
                ids = np.concatenate(documents[begin:end]).astype(data.draw(st.sampled_from(dtypes)))
                lengths = [len(document) for document in documents[begin:end]]
                writer.add_block(ids, np.array(lengths, data.draw(st.sampled_from(("i4", "i8", "u8")))))
                begin = end
            assert writer.num_documents == len(documents)
            assert writer.commit() == expected
        for suffix in (".bin", ".idx", ".spans", ".json"):
            assert in_blocks.with_suffix(suffix).read_bytes() == one_by_one.with_suffix(suffix).read_bytes()


@settings(MANY, max_examples=500)
@given(st.data())
def test_torn_pictures_are_refused_exactly_where_a_plain_loop_refuses_them(data):
    vocabulary = Vocabulary.compact(
        num_text_ids=1, num_image_codes=1, image_grid=data.draw(st.sampled_from(((1, 1), (1, 2), (1, 3))))
    )
    picture = vocabulary.encode_image(np.zeros(vocabulary.codes_per_image)).tolist()
    pieces = st.lists(st.sampled_from(([vocabulary.text_start], picture)), max_size=5)
    ids = list(chain(*data.draw(pieces)))
    positions = st.integers(0, max(0, len(ids) - 1))
    for a, b in data.draw(st.lists(st.tuples(positions, positions), max_size=2 if ids else 0)):
        ids[a], ids[b] = ids[b], ids[a]
    cuts = sorted(data.draw(st.sets(positions, max_size=3)))
    parts = [ids[a:b] for a, b in pairwise([0, *cuts, len(ids)]) if a < b]
    spans = [plain_spans(part, vocabulary) for part in parts]
    lengths = np.array([len(part) for part in parts], np.int64)
    if None in spans:
        with pytest.raises(ValueError, match=f"document {7 + spans.index(None)}: .* do not make whole pictures"):
            find_pictures(np.array(ids, np.uint16), lengths, vocabulary, first=7)
    else:
        counts, found = find_pictures(np.array(ids, np.uint16), lengths, vocabulary)
        assert counts.tolist() == [len(part) for part in spans]
        assert found.tolist() == list(chain(*spans))


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (1, 3)])
def test_any_two_ids_that_change_places_are_noticed(grid):
    vocabulary = Vocabulary.compact(num_text_ids=1, num_image_codes=1, image_grid=grid)
    picture = vocabulary.encode_image(np.zeros(vocabulary.codes_per_image)).tolist()
    document = [vocabulary.text_start, *picture, *picture, vocabulary.text_start]
    for a, b in combinations(range(len(document)), 2):
        ids = document.copy()
        ids[a], ids[b] = ids[b], ids[a]
        if ids != document:
            assert plain_spans(ids, vocabulary) is None
            with pytest.raises(ValueError, match="do not make whole pictures"):
                find_pictures(np.array(ids), np.array([len(ids)]), vocabulary)


@MANY
@given(st.data())
def test_one_changed_id_of_a_picture_is_refused(data):
    vocabulary = data.draw(vocabularies)
    codes = np.arange(vocabulary.codes_per_image) % vocabulary.num_image_codes
    document = np.concatenate(([vocabulary.bos], vocabulary.encode_image(codes), [vocabulary.text_start]))
    position = data.draw(st.integers(1, vocabulary.image_length))
    others = st.integers(0, vocabulary.size - 1).filter(lambda i: i != document[position])
    if vocabulary.is_image_code(document[position]):
        others = others.filter(lambda i: not vocabulary.is_image_code(i))
    changed = document.copy()
    changed[position] = data.draw(others)
    for torn in (changed, np.delete(document, position), document[:position]):
        if len(torn) > 1:  # else only bos is left
            with pytest.raises(ValueError, match="do not make whole pictures"):
                find_pictures(torn, np.array([len(torn)]), vocabulary)


@MANY
@given(st.data())
def test_ids_that_a_vocabulary_lacks_are_refused_in_every_dtype(data):
    vocabulary = data.draw(vocabularies)
    dtype = np.dtype(data.draw(st.sampled_from(("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4"))))
    limits = np.iinfo(dtype)
    ids = data.draw(
        st.lists(st.integers(int(limits.min), int(limits.max)) | st.sampled_from((0, 127, int(limits.max))), max_size=9)
    )
    outside = [not 0 <= i < vocabulary.size for i in ids]
    array, lengths = np.array(ids, dtype), np.ones(len(ids), np.int64)
    if any(outside):
        first = outside.index(True)
        with pytest.raises(ValueError, match=rf"document {first}: id {ids[first]} is outside"):
            require_ids(array, lengths, vocabulary)
    else:
        require_ids(array, lengths, vocabulary)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@SOME
@given(options=st.dictionaries(st.text(), JSON, max_size=4), quarantined=st.dictionaries(st.text(), st.integers(0)))
def test_manifests_come_back_whatever_their_options(options, quarantined):
    with scratch_folder() as name:
        prefix = Path(name) / "x"
        vocabulary = Vocabulary.compact(num_text_ids=9, num_image_codes=1, image_grid=(1, 1))
        with ShardWriter(prefix, vocabulary, tokenizer="t") as writer:
            writer.add([0, 2])
            written = writer.commit(options=options, quarantined=quarantined)
        assert ShardReader(prefix).manifest == written
        again = json.dumps(json.loads((Path(name) / "x.json").read_text()))
        (Path(name) / "x.json").write_text(again)
        assert ShardReader(prefix).manifest == written
