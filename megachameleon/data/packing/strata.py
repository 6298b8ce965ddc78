"""Samples binned by the share of their labels that are picture codes: packs are sorted by it, blending uses it."""

import numpy as np

NUM_STRATA = 16
"""Bins; samples of pictures alone stand in the last."""


def stratum_of(labels: np.ndarray, image_labels: np.ndarray) -> np.ndarray:
    """The stratum of samples with so many labels, of which so many are picture codes: int64 [samples]."""
    return np.minimum(image_labels.astype(np.int64) * NUM_STRATA // np.maximum(labels, 1), NUM_STRATA - 1)
