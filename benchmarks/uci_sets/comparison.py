"""Ours beside the reference, split by split: differences, their standard error, and whether that is what was wanted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

# Mean log-likelihood: table 1 of Lakshminarayanan et al. 2017, with its sign turned.
DEEP_ENSEMBLES = {
    "yacht": -1.18,
    "bostonHousing": -2.41,
    "energy": -1.38,
    "concrete": -3.06,
    "wine-quality-red": -0.94,
    "power-plant": -2.79,
    "kin8nm": 1.20,
    "naval-propulsion-plant": 5.63,
    "protein-tertiary-structure": -2.83,
}


@dataclass(frozen=True)
class Paired:
    """One figure over the splits that both have."""

    ours: float
    theirs: float
    # Mean of ours - theirs over splits, and its standard error; NaN for one split.
    difference: float
    error: float
    # Within one standard error of the reference, or better.
    met: bool


def paired(ours: ArrayLike, theirs: ArrayLike, *, higher_is_better: bool) -> Paired:
    """Compare one number a split with the other's on the same splits."""
    own, other = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    differences = own - other
    mean = float(differences.mean())
    error = float(differences.std(ddof=1) / math.sqrt(len(differences))) if len(differences) > 1 else math.nan
    worse = -mean if higher_is_better else mean
    return Paired(float(own.mean()), float(other.mean()), mean, error, worse <= 0 or worse <= error)
