"""What one `dropserve train` is to do, checked before TensorFlow is loaded and before a minute is spent on it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from models.contract import check_name
from training.datasets import Dataset, check_known, load
from training.errors import InputError
from training.recipes import Recipe, recipe


class TargetError(InputError):
    def __init__(self, target: str, data: Dataset) -> None:
        super().__init__(f"target {target!r}: {data.name} is set up for its target {data.target!r} only")


class NothingStochastic(InputError):
    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name}: visible and hidden dropout are both 0, so that there is nothing to draw; "
            "wanted at least one rate above 0 (--compare shows the net without dropout beside it)"
        )


class RepositoryError(InputError):
    def __init__(self, folder: Path, obstacle: Path, found: str) -> None:
        super().__init__(f"{folder}: cannot be written, since {obstacle} is {found}; wanted a writable folder")


@dataclass(frozen=True)
class Plan:
    data: Dataset
    # Of the model: its folder in the repository and its name at the server.
    name: str
    repository: Path
    recipe: Recipe
    # Of the initial weights, the shuffling and training's own masks: 0 .. 2**32 - 1.
    seed: int
    # Draws of an answer, where the caller of the server names none.
    num_samples: int
    # Whether the nets without dropout, and with dropout in one place only, are fitted too, to set their figures beside.
    compare: bool


def plan(
    data: str,
    *,
    repository: Path,
    seed: int,
    num_samples: int,
    target: str | None = None,
    name: str | None = None,
    visible_dropout: float | None = None,
    hidden_dropout: float | None = None,
    epochs: int | None = None,
    compare: bool = False,
) -> Plan:
    """Check the request and load its data. None stands for the data set's default.

    Raises InputError or ArtifactError (the model's name), with nothing written.
    """
    check_known(data)
    name = check_name(data if name is None else name)
    chosen = recipe(data, visible_dropout=visible_dropout, hidden_dropout=hidden_dropout, epochs=epochs)
    if not chosen.is_stochastic:
        raise NothingStochastic(data)
    check_writable(repository / name)
    loaded = load(data)
    if target not in (None, loaded.target):
        raise TargetError(str(target), loaded)
    return Plan(loaded, name, repository, chosen, seed, num_samples, compare)


def check_writable(folder: Path) -> None:
    """Raise RepositoryError unless the folder, or the nearest one above it that exists, can take a new entry."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise RepositoryError(folder, nearest, "not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RepositoryError(folder, nearest, "read-only for this user")
