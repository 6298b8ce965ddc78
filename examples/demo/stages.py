"""The stages of the demo: which public tool is called, with which arguments, on what, leaving what."""

import sys
from dataclasses import dataclass
from pathlib import Path

from examples.demo.pipeline import Stage
from examples.demo.process import Command
from examples.demo.profiles import Profile
from examples.demo.run_folder import RunFolder

TRAIN_CONFIG = Path("examples/demo/train.yaml")
GLOBAL_BATCH_SIZE = 4
"""Samples of a step; small, because the model learns by the number of updates."""
# Two are made at a time: these stand so that a picture is encoded before another dataset wants it too.
DATASETS = {
    "pairs_draw": ("pairs_en", ("--picture-first", "0")),
    "pairs_tones": ("pairs_tones", ("--picture-first", "0.3")),
    "text": ("text", ()),
    "pairs_read": ("pairs_en", ("--picture-first", "1")),
    "pairs_world": ("pairs_world", ("--picture-first", "0")),
    "interleaved": ("interleaved", ()),
}
VALIDATION = {
    "valid_world": ("valid_world", ("--picture-first", "0")),
    "valid_tones": ("valid_tones", ("--picture-first", "0.3")),
    "valid_interleaved": ("valid_interleaved", ()),
    "valid_text": ("valid_text", ()),
}
DRAWING = ("--guidance", "1.25", "--temperature", "0.2")
"""A model that knows each picture by heart draws best when it hardly gambles."""
LAYOUTS = {
    "single": (1, ()),
    "tp2": (2, ("parallel.tensor_parallel=2", "parallel.sequence_parallel=true")),
    "pp2": (2, ("parallel.pipeline_parallel=2", "parallel.virtual_pipeline_parallel=3")),
    "cp2": (2, ("parallel.context_parallel=2", "parallel.recompute=full")),
    "dp2": (2, ("parallel.distributed_optimizer=true", "parallel.overlap_grad_reduce=true")),
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the demo may use: CPU cores, processes for training, GPUs."""

    cores: int
    """Logical ones that this process may use."""
    processes: int
    gpus: int
    """0: all runs on the CPU."""

    @property
    def threads(self) -> dict[str, str]:
        """Threads of each of several processes."""
        return {"OMP_NUM_THREADS": str(max(self.cores // self.processes, 1))}

    @property
    def half_of_threads(self) -> dict[str, str]:
        """Threads of each of two commands at once."""
        return {"OMP_NUM_THREADS": str(max(self.cores // 2, 1))}


def build_stages(run: RunFolder, profile: Profile, machine: Machine) -> list[Stage]:
    """Every stage in order."""
    return [
        raw_stage(run, profile),
        text_tokenizer_stage(run, profile),
        image_tokenizer_stage(run, profile, machine),
        shards_stage(run, profile, machine),
        training_stage(run, profile, machine),
        layouts_stage(run, profile, machine),
        generation_stage(run, profile, machine),
        evaluation_stage(run, profile, machine),
        report_stage(run, profile),
    ]


def python(*words: object) -> Command:
    """A command of this Python."""
    return (sys.executable, *map(str, words))


def one(command: Command) -> tuple[tuple[Command, ...], ...]:
    """The chains of a stage of one command."""
    return ((command,),)


def torchrun(processes: int, *words: object) -> Command:
    """A command of one or more processes on this machine."""
    if processes == 1:
        return python(*words)
    return python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, *words)


def raw_stage(run: RunFolder, profile: Profile) -> Stage:
    """Raw sources from installed packages."""
    return Stage(
        name="raw",
        title="Raw data from installed packages",
        chains=one(python("-m", "examples.demo.make_raw_data", "--output", run.raw, *profile.raw_flags)),
        outputs=(run.raw,),
        # requirements: raw data comes out of packages, whose versions decide it
        inputs=(Path("examples/demo/prompts.json"), Path("requirements.txt")),
        expected_seconds=profile.expected_seconds["raw"],
    )


def text_tokenizer_stage(run: RunFolder, profile: Profile) -> Stage:
    """BPE on everything that training reads, in all languages."""
    inputs = [run.raw / name for name in ("text", "pairs_en", "pairs_world", "pairs_tones", "interleaved")]
    vocabulary = ("--vocab-size", profile.vocab_size, "--num-codes", profile.num_codes)
    grid = f"{profile.grid}x{profile.grid}"
    # Rare characters (most of CJK) are spelt in bytes: a small vocabulary is better spent on words.
    coverage = ("--character-coverage", "0.98")
    tool = ("tools/train_text_tokenizer.py", "--input", *inputs, "--output", run.tokenizer, "--replace", *coverage)
    return Stage(
        name="text_tokenizer",
        title="Text tokenizer",
        chains=one(python(*tool, *vocabulary, "--grid", grid)),
        outputs=(run.tokenizer,),
        needs=("raw",),
        expected_seconds=profile.expected_seconds["text_tokenizer"],
    )


def image_tokenizer_stage(run: RunFolder, profile: Profile, machine: Machine) -> Stage:
    """A VQ autoencoder on the pictures that training may see."""
    inputs = [run.raw / name for name in ("pairs_en", "pairs_tones")]
    shape = ("--image-size", profile.image_size, "--grid", profile.grid, "--num-codes", profile.num_codes)
    tool = ("tools/train_image_tokenizer.py", "--input", *inputs, "--output", run.image_tokenizer)
    return Stage(
        name="image_tokenizer",
        title="Image tokenizer",
        chains=one(torchrun(machine.processes, *tool, *shape, *profile.image_tokenizer_flags)),
        outputs=(run.image_tokenizer,),
        needs=("raw",),
        expected_seconds=profile.expected_seconds["image_tokenizer"],
        environment=machine.threads,
    )


def shards_stage(run: RunFolder, profile: Profile, machine: Machine) -> Stage:
    """Each dataset planned, made and verified; a picture that stands in several is encoded once."""
    tool = "tools/preprocess_data.py"
    cache = ("--code-cache", run.root / "picture_codes")
    chains = []
    for name, (source, flags) in {**DATASETS, **VALIDATION}.items():
        output = ("--output", run.shards / name)
        tokenizers = ["--tokenizer", run.tokenizer]
        # shards of text alone then do not depend on the image tokenizer
        if not source.endswith("text"):
            tokenizers += ["--image-tokenizer", run.image_tokenizer]
        plan = python(tool, "plan", "--input", run.raw / source, *output, *tokenizers, *flags)
        chains.append((plan, python(tool, "run", *output, *cache), python(tool, "verify", *output)))
    return Stage(
        name="shards",
        title="Shards of tokens",
        chains=tuple(chains),
        outputs=(run.shards, run.root / "picture_codes"),
        needs=("text_tokenizer", "image_tokenizer"),
        expected_seconds=profile.expected_seconds["shards"],
        environment=machine.half_of_threads,
        at_once=2,
        quiet=True,
    )


def training_overrides(run: RunFolder, profile: Profile, processes: int) -> tuple[str, ...]:
    """What train.yaml cannot know: where this run's data is, the sizes of the profile, data-parallel processes."""
    folders = {f"data.train.{name}": run.shards / name for name in DATASETS}
    folders |= {f"data.validation.{name.removeprefix('valid_')}": run.shards / name for name in VALIDATION}
    return (
        f"training.global_batch_size={GLOBAL_BATCH_SIZE}",
        f"training.micro_batch_size={GLOBAL_BATCH_SIZE // processes}",
        f"model.vocab_size={profile.vocab_size}",
        f"data.tokenizer={run.tokenizer}",
        f"data.image_tokenizer={run.image_tokenizer}",
        *(f"{key}=[{folder}]" for key, folder in folders.items()),
        *profile.training,
    )


def training_stage(run: RunFolder, profile: Profile, machine: Machine) -> Stage:
    """The decoder, with data parallelism over all processes."""
    words = (
        "tools/train.py",
        TRAIN_CONFIG,
        f"output_dir={run.training}",
        *training_overrides(run, profile, machine.processes),
    )
    return Stage(
        name="training",
        title="Training",
        chains=one(torchrun(machine.processes, *words)),
        outputs=(run.training,),
        needs=("text_tokenizer", "image_tokenizer", "shards"),
        inputs=(TRAIN_CONFIG,),
        expected_seconds=profile.expected_seconds["training"],
        environment=machine.threads,
    )


def layouts_stage(run: RunFolder, profile: Profile, machine: Machine) -> Stage:
    """A few steps of the same training under five layouts; on CPU, where any machine has two places for processes."""
    short = (
        f"training.num_steps={profile.layout_steps}",
        f"optimizer.warmup_steps={profile.layout_steps - 1}",
        # fp32, so that layouts differ by the order of sums alone
        *("training.precision=fp32", "training.log_every=1", "training.validate_every=0"),
        *("logging.tensorboard=false", "logging.drawing.prompts=[]"),
    )
    chains = []
    for name, (processes, layout) in LAYOUTS.items():
        words = ("tools/train.py", TRAIN_CONFIG, *training_overrides(run, profile, 2), *short, *layout)
        chains.append((torchrun(processes, *words, f"output_dir={run.layouts / name}"),))
    return Stage(
        name="layouts",
        title="The first steps under five layouts",
        chains=tuple(chains),
        outputs=(run.layouts,),
        needs=("text_tokenizer", "image_tokenizer", "shards"),
        inputs=(TRAIN_CONFIG,),
        expected_seconds=profile.expected_seconds["layouts"],
        # two chains at once, of two processes each
        environment={"OMP_NUM_THREADS": str(max(machine.cores // 4, 1)), "CUDA_VISIBLE_DEVICES": ""},
        at_once=2,
        quiet=True,
    )


def generation_stage(run: RunFolder, profile: Profile, machine: Machine) -> Stage:
    """Captions to pictures, pictures to captions, text continued, one interleaved document."""
    uses = {
        "draw": ("--modality", "image", *DRAWING),
        "read": ("--modality", "text", "--greedy", "--repetition-penalty", "1", "--max-new-tokens", "24"),
        "continue": ("--modality", "text", "--max-new-tokens", "100"),
        "interleaved": ("--modality", "both", "--repetition-penalty", "1", "--max-pictures", "4", *DRAWING),
    }
    chains = []
    for name, flags in uses.items():
        words = ("tools/generate.py", run.training, "--prompts", run.prompts(name), "--output", run.generated / name)
        chains.append((python(*words, *flags),))
    return Stage(
        name="generation",
        title="Drawing, reading and writing",
        chains=tuple(chains),
        outputs=(run.generated,),
        needs=("training",),
        expected_seconds=profile.expected_seconds["generation"],
        environment=machine.half_of_threads,
        at_once=2,
        quiet=True,
    )


def evaluation_stage(run: RunFolder, profile: Profile, machine: Machine) -> Stage:
    """Is the nearest real picture to a drawing the prompted one?"""
    files = (
        "--prompts",
        run.prompts("retrieval"),
        "--gallery",
        run.raw / "gallery",
        "--output",
        run.evaluation,
        *DRAWING,
    )
    return Stage(
        name="evaluation",
        title="Evaluation",
        chains=one(torchrun(machine.processes, "tools/evaluate.py", "retrieval", run.training, *files)),
        outputs=(run.evaluation,),
        needs=("training",),
        expected_seconds=profile.expected_seconds["evaluation"],
        environment=machine.threads,
    )


def report_stage(run: RunFolder, profile: Profile) -> Stage:
    """The page."""
    templates = Path("examples/demo/templates")
    return Stage(
        name="report",
        title="Report",
        chains=one(python("-m", "examples.demo.report", "--run", run.root)),
        outputs=(run.report,),
        needs=("evaluation", "generation", "layouts"),
        inputs=(templates / "report.html.j2", templates / "style.css"),
        expected_seconds=profile.expected_seconds["report"],
    )
