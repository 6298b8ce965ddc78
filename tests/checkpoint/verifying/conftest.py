"""Checkpoints are those of the tests of the formats; plain weights and Meta's formula those of the model."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[2]
sys.path[:0] = [str(TESTS / "checkpoint" / "formats"), str(TESTS / "model"), str(TESTS / "tokens")]
