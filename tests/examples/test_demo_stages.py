"""The demo's stages fit its configuration, and the configuration fits itself."""

import json
from pathlib import Path

import pytest

from examples.demo.profiles import FULL, QUICK
from examples.demo.run_folder import RunFolder
from examples.demo.stages import DATASETS, LAYOUTS, TRAIN_CONFIG, VALIDATION, Machine, build_stages, training_overrides
from megachameleon.config import load_config

PROJECT = Path(__file__).parents[2]
RUN = RunFolder(Path("runs/demo"))


def test_train_yaml_names_the_datasets_and_prompts_of_the_demo():
    config = load_config(str(PROJECT / TRAIN_CONFIG))
    assert set(config.data.train) == set(DATASETS)
    assert {f"valid_{name}" for name in config.data.validation} == set(VALIDATION)
    fixed = json.loads((PROJECT / "examples/demo/prompts.json").read_text())["prompts"]
    assert list(config.logging.drawing.prompts) == fixed


@pytest.mark.parametrize("profile", [FULL, QUICK], ids=["full", "quick"])
def test_every_profile_is_a_valid_run_under_every_layout(profile):
    for processes, layout in LAYOUTS.values():
        config = load_config(str(PROJECT / TRAIN_CONFIG), [*training_overrides(RUN, profile, 2), *layout])
        config.validate_world(processes)
        assert config.model.vocab_size == profile.vocab_size


@pytest.mark.parametrize("profile", [FULL, QUICK], ids=["full", "quick"])
def test_stages_need_only_what_comes_before_and_have_an_expected_time(profile):
    stages = build_stages(RUN, profile, Machine(cores=2, processes=2, gpus=0))
    names = [stage.name for stage in stages]
    assert list(profile.expected_seconds) == names
    for number, stage in enumerate(stages):
        assert set(stage.needs) <= set(names[:number])
        assert all((PROJECT / path).is_file() for path in stage.inputs)
