import pytest

from megachameleon.data.shards.writer import ShardWriter
from megachameleon.tokens.vocabulary import Vocabulary
from megachameleon.training.batches import open_data, require_enough_samples


def write_shard(folder, vocabulary, *, image_tokenizer="i"):
    with ShardWriter(folder / "shard", vocabulary, tokenizer="t", image_tokenizer=image_tokenizer) as writer:
        for _ in range(4):
            writer.add([vocabulary.bos, *vocabulary.encode_image([0] * vocabulary.codes_per_image), vocabulary.eos])
        writer.commit()


def open_with(config, name, folder):
    settings = config(f"data.train.{name}=[{folder}]")
    return open_data(settings.data, settings.training)


def test_datasets_of_one_tokenizer_open(config, corpus):
    settings = config()
    data = open_data(settings.data, settings.training)
    assert data.tokenizers == {"text": "t", "image": "i"}
    assert set(data.train.datasets) == {"pairs", "text"} and len(data.validation["all"]) > 0


def test_shards_of_another_vocabulary_are_refused(config, tmp_path):
    write_shard(tmp_path / "other", Vocabulary.compact(num_text_ids=100, num_image_codes=16, image_grid=(4, 2)))
    with pytest.raises(ValueError, match=r"has image_grid=\(2, 4\) but that of dataset other has \(4, 2\)"):
        open_with(config, "other", tmp_path / "other")


def test_shards_of_another_image_tokenizer_are_refused(config, corpus, tmp_path):
    write_shard(tmp_path / "other", Vocabulary.load(corpus / "tokenizer"), image_tokenizer="j")
    with pytest.raises(ValueError, match="made with another image tokenizer"):
        open_with(config, "other", tmp_path / "other")


def test_missing_and_empty_folders_are_refused(config, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        with pytest.raises(ValueError, match=str(tmp_path / folder)):
            open_with(config, "other", tmp_path / folder)


def test_a_run_longer_than_its_stages_is_refused(config):
    settings = config("data.stages=[{weights: {pairs: 1}, samples: 80}]")
    data = open_data(settings.data, settings.training)
    with pytest.raises(ValueError, match="hold 80 samples, but the run needs 160"):
        require_enough_samples(data, settings.training, done=0, consumed=0)
    require_enough_samples(data, settings.training, done=15, consumed=40)  # it began with smaller batches


def test_another_text_tokenizer_is_refused(config, corpus, tmp_path):
    """The same layout of ids, but trained on other text."""
    from megachameleon.tokens.text.training import train_text_tokenizer

    vocabulary = Vocabulary.compact(num_text_ids=297, num_image_codes=16, image_grid=(2, 4))
    first = train_text_tokenizer(["red heart, sun, dog face " * 20], vocabulary, tmp_path / "first")
    train_text_tokenizer(["black cat, moon, green tree " * 20], vocabulary, tmp_path / "second")
    with ShardWriter(tmp_path / "shards" / "x", vocabulary, tokenizer=first.fingerprint) as writer:
        writer.add([vocabulary.bos, *first.encode("red heart"), vocabulary.eos])
        writer.commit()
    data = [f"data.train={{a: [{tmp_path / 'shards'}]}}", "data.stages=[{weights: {a: 1}}]", "data.validation={}"]
    settings = config(*data, f"data.tokenizer={tmp_path / 'second'}")
    with pytest.raises(ValueError, match="is not the tokenizer that made the shards"):
        open_data(settings.data, settings.training)
    open_data(config(*data, f"data.tokenizer={tmp_path / 'first'}").data, settings.training)
