"""Plain weights and transformers' Chameleon are those of the tests of the model; releases' files those of tokens."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[2]
sys.path[:0] = [str(TESTS / "model"), str(TESTS / "tokens")]
