"""The nine regression sets as a folder of files: fixed splits, grids, the reference's own results."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# In the order in which they run, the cheapest first.
NAMES = (
    "yacht",
    "bostonHousing",
    "energy",
    "concrete",
    "wine-quality-red",
    "power-plant",
    "kin8nm",
    "naval-propulsion-plant",
    "protein-tertiary-structure",
)
# The reference's results are of its run with 100 times the epochs of `n_epochs.txt`.
EPOCH_FACTOR = 100


class DataError(Exception):
    """What was found in the data folder, what was wanted."""


@dataclass(frozen=True)
class Split:
    """Row numbers of the set."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]


@dataclass(frozen=True)
class Reference:
    """The reference's results, one number a split: RMSE in the target's units, mean log-likelihood in nats."""

    rmse: Floats
    ll: Floats


@dataclass(frozen=True)
class RegressionSet:
    """One set. x [N, F] and y [N] in their own units; tau, the precision of the noise, in 1 / units of y squared."""

    name: str
    x: Floats
    y: Floats
    splits: tuple[Split, ...]
    rates: tuple[float, ...]
    taus: tuple[float, ...]
    hidden_units: int
    epochs: int
    reference: Reference


@lru_cache(maxsize=2)
def load(folder: Path, name: str) -> RegressionSet:
    """Read `folder/name`. Raises DataError."""
    if name not in NAMES:
        raise DataError(f"no set {name!r}; wanted one of {', '.join(NAMES)}")
    home = folder / name
    table = _numbers(home / "data.txt", 2)
    rows = len(table)
    count = int(_numbers(home / "n_splits.txt")[0])
    columns = _indices(home / "index_features.txt", table.shape[1])
    [target] = _indices(home / "index_target.txt", table.shape[1])
    return RegressionSet(
        name=name,
        x=table[:, columns],
        y=table[:, target],
        splits=tuple(
            Split(_indices(home / f"index_train_{number}.txt", rows), _indices(home / f"index_test_{number}.txt", rows))
            for number in range(count)
        ),
        rates=tuple(_numbers(home / "dropout_rates.txt").tolist()),
        taus=tuple(_numbers(home / "tau_values.txt").tolist()),
        hidden_units=int(_numbers(home / "n_hidden.txt")[0]),
        epochs=int(_numbers(home / "n_epochs.txt")[0] * EPOCH_FACTOR),
        reference=Reference(
            *(_one_each(home / "reference" / f"test_{kind}.txt", count) for kind in ("MC_rmse", "ll")),
        ),
    )


def _numbers(path: Path, dimensions: Literal[1, 2] = 1) -> Floats:
    try:
        return np.loadtxt(path, ndmin=dimensions)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or 'not there'}); wanted the set's files") from None
    except ValueError as error:
        raise DataError(f"{path} is not numbers: {error}") from None


def _indices(path: Path, count: int) -> NDArray[np.int64]:
    indices = _numbers(path).astype(np.int64)
    if len(indices) == 0 or indices.min() < 0 or indices.max() >= count:
        raise DataError(f"{path} has indices outside 0 .. {count - 1}")
    return indices


def _one_each(path: Path, count: int) -> Floats:
    values = _numbers(path)
    if len(values) != count:
        raise DataError(f"{path} has {len(values)} numbers; wanted {count}, one a split")
    return values
