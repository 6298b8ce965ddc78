import dataclasses

import pytest
import yaml

from megachameleon.config import RunConfig, load_config, preset_names, to_yaml
from megachameleon.config.binding import bind


def test_presets_have_the_published_sizes():
    assert load_config("chameleon_7b").model.num_parameters == 7_013_158_912
    assert load_config("chameleon_34b").model.num_parameters == 34_293_522_432
    assert set(preset_names()) == {"debug", "1b", "chameleon_7b", "chameleon_34b"}


def test_printed_configuration_reads_back_equal():
    config = load_config("chameleon_34b", ["optimizer.lr=3e-4", "logging.drawing.prompts=[a, b]"])
    assert bind(RunConfig, yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", r"optimizer\.lrr: unknown key; did you mean 'lr'"),
        ("model.num_layer=1", r"model\.num_layer: unknown key; did you mean 'num_layers'"),
        ("optimizr.lr=1", r"optimizr: unknown key; did you mean 'optimizer'"),
        ("model.norm_order=swim", r"model\.norm_order: 'swim' is not one of pre, swin"),
        ("training.num_steps=many", r"training\.num_steps: expected int, got 'many'"),
        ("training.num_steps=true", r"training\.num_steps: expected int, got True"),
        ("training.num_steps=1.5", r"training\.num_steps: expected int, got 1\.5"),
        ("parallel.tensor_parallel=3", r"3 does not divide model\.num_attention_heads=4; sizes that do: 1, 2, 4"),
        ("parallel.pipeline_parallel=3", r"3 does not divide model\.num_layers=2; sizes that do: 1, 2"),
        ("parallel.sequence_parallel=true", r"sequence_parallel: needs tensor_parallel of 2 or more"),
        (
            "model.hidden_size=30",
            r"model\.hidden_size: 30 is not divisible by num_attention_heads=4; 28 or 32 would work",
        ),
        ("model.qk_norm_groups=3", r"qk_norm_groups: 3 does not divide model.num_query_groups=2; 1, 2 would work"),
        ("data.sequence_length=4096", r"4096 is longer than model\.context_length=128"),
        ("optimizer.warmup_steps=20", r"warmup_steps: 20 leaves nothing of training\.num_steps=20"),
        ("data.stages=[{weights: {a: 1}}]", r"weights\.a: no such dataset in data\.train"),
        ("logging.drawing.top_p=7", r"logging\.drawing\.top_p: 7\.0 must be between"),
        ("optimizer.lr=.inf", r"optimizer\.lr: need"),
        ("model.rope_theta=0", r"model\.rope_theta"),
        ("training.num_steps", r"expected key\.sub=value"),
        ("training.seed.x=1", r"unknown key|no keys of its own|expected int"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_config("debug", [override])


def test_world_that_does_not_divide():
    config = load_config("debug")
    with pytest.raises(
        ValueError, match="8 is not divisible by data-parallel size 3 x micro_batch_size 2 = 6; 6 or 12"
    ):
        config.validate_world(3)
    with pytest.raises(ValueError, match="does not divide the 3 processes; start a multiple of 2"):
        load_config("debug", ["parallel.tensor_parallel=2"]).validate_world(3)


def test_files_extend_presets_and_each_other(tmp_path):
    (tmp_path / "base.yaml").write_text("extends: debug\noptimizer: {lr: 0.5, weight_decay: 0.25}\n")
    (tmp_path / "run.yaml").write_text("extends: base.yaml\noptimizer: {lr: 0.125}\n")
    config = load_config(str(tmp_path / "run.yaml"), ["training.seed=9"])
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.training.seed) == (0.125, 0.25, 9)
    assert config.model == load_config("debug").model


def test_a_circle_of_files_is_an_error(tmp_path):
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text(f"extends: {b}\n")
    b.write_text(f"extends: {a}\n")
    with pytest.raises(ValueError, match="extends itself"):
        load_config(str(a))


def test_missing_and_malformed_files(tmp_path):
    with pytest.raises(ValueError, match="neither a file nor a preset; did you mean 'chameleon_7b'"):
        load_config("chameleon_7")
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: [unclosed")
    with pytest.raises(ValueError, match=r"bad\.yaml: not valid YAML"):
        load_config(str(bad))
    bad.write_text("extends: debug\noptimizer: {lr: 1}\noptimizer: {lr: 2}\n")
    with pytest.raises(ValueError, match="key 'optimizer' is given twice"):
        load_config(str(bad))
    bad.write_bytes(b"model: {\xe9: 1}")
    with pytest.raises(ValueError, match=r"bad\.yaml: not UTF-8"):
        load_config(str(bad))
    with pytest.raises(ValueError, match="is a folder"):
        load_config(str(tmp_path))
    bad.write_text("model: !!python/object/apply:os.system ['true']")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(str(bad))


@pytest.mark.parametrize("text", ["a: &a [*a]\n", "a: " + "[" * 3000, None])
def test_a_billion_laughs(tmp_path, text):
    """A few lines more, and an error that wrote the values out would fill any memory."""
    made = ["lol"] * 9
    for _ in range(5):
        made = [made] * 9
    (tmp_path / "bad.yaml").write_text(text or yaml.safe_dump({"model": {"num_layers": made}}))
    with pytest.raises(ValueError, match=r"bad\.yaml: not valid YAML: (its aliases make more than|lists in too many)"):
        load_config(str(tmp_path / "bad.yaml"))


def test_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config("debug").training.seed = 2
