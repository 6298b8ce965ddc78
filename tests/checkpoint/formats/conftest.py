"""Plain weights and transformers' Chameleon are those of the tests of the model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "model"))
