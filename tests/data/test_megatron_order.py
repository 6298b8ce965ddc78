import numpy as np
import pytest

from megachameleon.data.blending.megatron_order import MegatronSamples

LENGTH, SAMPLES = 32, 300


@pytest.fixture
def folders(tmp_path, make_document, write_shard):
    """Two shards of text and one of pictures."""
    random = np.random.default_rng(0)
    for name, number in (("text", 40), ("text", 25), ("pairs", 50)):
        picture = [0] * (name == "pairs")
        documents = [make_document(*picture, int(random.integers(1, 40)), seed=i) for i in range(number)]
        write_shard(tmp_path / name / f"unit_{number}", documents)
    return tmp_path


class Tokenizer:
    """As little of megatron's tokenizer as its datasets use."""

    def __init__(self, vocabulary):
        self.vocab_size, self.pad, self.eod = vocabulary.size, vocabulary.pad, vocabulary.eos
        self.eos = self.eod
        self.unique_identifiers = {"name": "test"}


def build_with_megatron(tmp_path, vocabulary, prefixes, weights, isolate):
    """What pretrain_gpt.py does with --train-data-path."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=7,
        sequence_length=LENGTH,
        blend_per_split=[(list(map(str, prefixes)), weights), None, None],
        tokenizer=Tokenizer(vocabulary),
        reset_position_ids=isolate,
        reset_attention_mask=isolate,
        eod_mask_loss=isolate,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [SAMPLES, 0, 0], lambda: True, config).build()[0]


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("names", [("text", "pairs"), ("pairs",)])
def test_samples_are_those_of_megatron_core(folders, vocabulary, isolate, names):
    shares = {"text": 0.6, "pairs": 0.4}
    chosen = {name: [folders / name] for name in names}
    ours = MegatronSamples.of(
        chosen,
        {name: shares[name] for name in names},
        num_samples=SAMPLES,
        sequence_length=LENGTH,
        seed=7,
        isolate_documents=isolate,
    )
    assert not (folders / "pairs" / "unit_50").exists()  # megatron-core's default place of caches
    prefixes, weights = [folders / "pairs" / "unit_50"], [0.4]
    if "text" in names:
        texts = [folders / "text" / "unit_25", folders / "text" / "unit_40"]
        tokens = [prefix.with_suffix(".bin").stat().st_size for prefix in texts]
        prefixes = [*texts, *prefixes]
        weights = [0.6 * size / sum(tokens) for size in tokens] + weights
    theirs = build_with_megatron(folders, vocabulary, prefixes, weights, isolate)
    assert ours.num_samples == len(theirs) >= SAMPLES
    for position in range(len(theirs)):
        sample, wanted = ours[position], theirs[position]
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            assert np.array_equal(getattr(sample, name), wanted[name].numpy()), (position, name)
    assert sum(ours.drawn_before(200).values()) == 200


def test_documents_and_pictures_are_marked(folders, vocabulary):
    samples = MegatronSamples.of(
        {"pairs": [folders / "pairs"]},
        {"pairs": 1.0},
        num_samples=SAMPLES,
        sequence_length=LENGTH,
        seed=7,
        isolate_documents=True,
    )
    sample = samples.batch([3, 4])
    ends = sample.tokens[0] == vocabulary.eos
    assert ends.any() and (np.diff(sample.document_ids[0]) == ends[:-1]).all()
    assert (sample.position_ids[0][1:][ends[:-1]] == 0).all()
    assert np.array_equal(sample.image_mask, vocabulary.is_image_code(sample.labels))
    assert samples.history(5) != MegatronSamples.of(
        {"pairs": [folders / "pairs"]},
        {"pairs": 1.0},
        num_samples=SAMPLES + 1,
        sequence_length=LENGTH,
        seed=7,
        isolate_documents=True,
    ).history(5)


def test_a_run_can_use_the_order_of_megatron(config, corpus):
    from megachameleon.training.batches import open_data, require_enough_samples

    stages = "data.stages=[{weights: {pairs: 0.7, text: 0.3}}]"
    settings = config("data.order=megatron", stages)
    data = open_data(settings.data, settings.training)
    require_enough_samples(data, settings.training, done=0, consumed=0)
    batch = data.train.batch(range(4))
    assert batch.tokens.shape == (4, settings.data.sequence_length) and not list(corpus.rglob("cache"))
    for wrong in ("data.packing=continuous", "data.stages=[{weights: {pairs: 1}, samples: 5}, {weights: {text: 1}}]"):
        with pytest.raises(ValueError, match="megatron"):
            config("data.order=megatron", stages, wrong)
