import importlib.util
from pathlib import Path

import pytest
import torch

from megachameleon.tokens.vq.gan_training import GanTraining
from megachameleon.tokens.vq.network import PatchConfig
from megachameleon.tokens.vq.patch_training import PatchTraining
from megachameleon.tokens.vq.source import PictureInput
from megachameleon.tokens.vq.vqgan import VQGANConfig

PATH = Path(__file__).resolve().parents[2] / "tools" / "train_image_tokenizer.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("train_image_tokenizer", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def job_of(tool, *flags):
    return tool.make_job(tool.build_parser().parse_args([*flags, "--precision", "fp32"]), torch.device("cpu"))


def test_without_flags_the_defaults_of_either_network_count(tool):
    small = job_of(tool, "--input", "a", "--output", "b")
    assert small.shape == PatchConfig() and small.training == PatchTraining() and small.max_pictures == 50_000
    large = job_of(tool, "--network", "vqgan", "--input", "a", "--output", "b")
    assert large.shape == VQGANConfig() and large.training == GanTraining() and large.max_pictures is None


def test_flags_reach_the_job(tool):
    flags = [
        "--input",
        "faces=a",
        "b",
        "--weight",
        "faces=2",
        "--output",
        "c",
        "--network",
        "vqgan",
        "--channels",
        "32",
    ]
    flags += ["--multipliers", "1", "2", "--image-size", "32", "--gan-start", "7", "--perceptual", "v.pth", "--no-flip"]
    flags += ["--zoom", "1.5", "--workers", "3", "--fid-weights", "i.pth", "--evaluate-every", "9", "--accumulate", "2"]
    job = job_of(tool, *flags, "--num-codes", "64", "--seed", "5")
    assert job.inputs == (PictureInput(Path("a"), "faces"), PictureInput(Path("b"))) and job.weights == {"faces": 2.0}
    shape = {"image_size": 32, "base_channels": 32, "channel_multipliers": (1, 2), "num_codes": 64}
    assert job.shape == VQGANConfig(**shape)
    assert job.training == GanTraining(gan_start=7, perceptual=Path("v.pth"), accumulate=2, seed=5)
    assert (job.augmentation.zoom, job.augmentation.flip, job.workers, job.evaluate_every) == (1.5, False, 3, 9)
    assert job.fid_weights == Path("i.pth") and job.missing == []


def test_a_config_file_stands_before_typed_flags(tool, tmp_path):
    path = tmp_path / "vqgan.yaml"
    path.write_text(
        "network: vqgan\ninput: [faces=a, b]\noutput: c\nimage-size: 64\nsteps: 10\nflip: false\ngan_start: 4\n"
    )
    job = job_of(tool, *tool.config_arguments(path), "--steps", "20")
    assert job.shape.image_size == 64 and job.training.steps == 20 and job.training.gan_start == 4
    assert len(job.inputs) == 2 and not job.augmentation.flip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("setps: 3", "'setps' is not a flag of this tool; did you mean steps"),
        ("- 3", "one `flag: value` a line"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_config_file_is_refused(tool, tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        tool.config_arguments(path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "b"], "--input is missing"),
        (["--input", "a"], "--output is missing"),
        (["--input", "a", "--output", "b", "--gan-start", "3"], "--gan-start is not a setting of --network patch"),
        (["--input", "a", "--output", "b", "--network", "vqgan", "--grid", "3"], "--grid is not a setting"),
        (["--input", "a", "--output", "b", "--weight", "faces"], "--weight faces: write TAG=FACTOR"),
        (["--input", "a", "--output", "b", "--network", "vqgan", "--zoom", "9"], "--zoom"),
        (["--input", "a", "--output", "b", "--max-pictures", "0"], "--max-pictures 0 must be at least 1"),
    ],
)
def test_wrong_flags_are_refused(tool, flags, message):
    with pytest.raises(ValueError, match=message):
        job_of(tool, *flags)
