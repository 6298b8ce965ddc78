"""Where each stage of the demo leaves its results, for the driver that makes them and the report that shows them."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run of the demo below `root`, usually `runs/demo`."""

    root: Path

    @property
    def raw(self) -> Path:
        """Raw sources of `make_raw_data`."""
        return self.root / "raw"

    @property
    def tokenizer(self) -> Path:
        """The text tokenizer and the vocabulary."""
        return self.root / "tokenizer"

    @property
    def image_tokenizer(self) -> Path:
        """The image tokenizer."""
        return self.root / "image_tokenizer"

    @property
    def shards(self) -> Path:
        """One folder of shards for each dataset."""
        return self.root / "shards"

    @property
    def training(self) -> Path:
        """The run folder of `tools/train.py`."""
        return self.root / "train"

    @property
    def layouts(self) -> Path:
        """One run folder for each parallel layout."""
        return self.root / "layouts"

    def prompts(self, name: str) -> Path:
        """The prompts of one call of `tools/generate.py`."""
        return self.raw / "prompts" / f"{name}.jsonl"

    @property
    def generated(self) -> Path:
        """One folder for each call of `tools/generate.py`."""
        return self.root / "generated"

    @property
    def evaluation(self) -> Path:
        """Results of `tools/evaluate.py`."""
        return self.root / "evaluation"

    @property
    def stages_json(self) -> Path:
        """Time and memory of each stage."""
        return self.root / "stages.json"

    @property
    def report(self) -> Path:
        """The page."""
        return self.root / "report.html"
