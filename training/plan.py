"""What one `dropserve train` is to do, checked before TensorFlow is loaded and before a minute is spent on it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from models.calibration_settings import AS_USUAL, CalibrationSettings
from models.contract import Task, check_name
from training import images, tables
from training.datasets import DATASETS, Dataset, check_known, load
from training.errors import InputError
from training.recipes import Recipe, changed, recipe_of

# Networks of an ensemble at most: five do nearly all that more would, and each one is stored.
MAX_MEMBERS = 50


class TargetError(InputError):
    def __init__(self, target: str, data: Dataset) -> None:
        super().__init__(f"target {target!r}: {data.name} is set up for its target {data.target!r} only")


class AlreadySetUp(InputError):
    def __init__(self, option: str, name: str) -> None:
        super().__init__(f"{option}: {name} is set up already; the option is for a table from a file")


class NothingStochastic(InputError):
    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name}: visible and hidden dropout are both 0, so that there is nothing to draw; "
            "wanted at least one rate above 0 (--compare shows the net without dropout beside it)"
        )


class ReportError(InputError):
    def __init__(self, path: Path, found: str) -> None:
        super().__init__(f"--report {path}: {found}; wanted a file that can be written")


class EnsembleError(InputError):
    def __init__(self, members: int) -> None:
        super().__init__(f"--ensemble {members}: wanted 2 to {MAX_MEMBERS} members")


class NoNoise(InputError):
    def __init__(self, name: str) -> None:
        super().__init__(f"--heteroscedastic: {name}, a classification; wanted a regression: only its target has noise")


class TypedTwice(InputError):
    def __init__(self, column: str) -> None:
        super().__init__(f"--type {column}: given more than once; wanted it once, as in {column}=numeric,nullable")


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
    # Whether the rates are learned by Concrete Dropout where the recipe has dropout.
    concrete: bool = False
    # Rates at which that begins, by the names of the recipe; those that were not given are not there.
    begin: Mapping[str, float] = field(default_factory=dict)
    # What is asked of the calibration.
    calibration: CalibrationSettings = AS_USUAL
    # Seeds to try while the network comes out as one answer to every row.
    tries: int = 1
    # Networks of the published ensemble; 1: no ensemble.
    members: int = 1


def plan(
    data: str,
    *,
    repository: Path,
    seed: int,
    num_samples: int,
    target: str | None = None,
    types: Sequence[str] = (),
    task: Task | None = None,
    name: str | None = None,
    visible_dropout: float | None = None,
    hidden_dropout: float | None = None,
    epochs: int | None = None,
    compare: bool = False,
    concrete: bool = False,
    heteroscedastic: bool = False,
    calibration: CalibrationSettings = AS_USUAL,
    ensemble: int | None = None,
) -> Plan:
    """Check the request and load its data. None stands for the data set's default.

    data: a data set's name, a CSV or Parquet file, or a folder of images.
    ensemble: its members.
    types: as `training.tables.ColumnType.parse` reads them.
    Raises InputError or ArtifactError (the model's name), with nothing written.
    """
    members = 1 if ensemble is None else ensemble
    if ensemble is not None and not 2 <= ensemble <= MAX_MEMBERS:
        raise EnsembleError(ensemble)
    name = check_name(default_name(data) if name is None else name)
    check_writable(repository / name)
    loaded = dataset(data, target, types, task)
    calibration.check_task(loaded.task == "classification")
    chosen = changed(recipe_of(loaded), visible_dropout=visible_dropout, hidden_dropout=hidden_dropout, epochs=epochs)
    if heteroscedastic and loaded.task != "regression":
        raise NoNoise(data)
    chosen = replace(chosen, heteroscedastic=heteroscedastic)
    if not chosen.is_stochastic:
        raise NothingStochastic(data)
    given = {"visible_dropout": visible_dropout, "hidden_dropout": hidden_dropout}
    begin = {place: rate for place, rate in given.items() if rate is not None}
    return Plan(
        loaded,
        name,
        repository,
        chosen,
        seed,
        num_samples,
        compare,
        concrete=concrete,
        begin=begin,
        calibration=calibration,
        members=members,
    )


def dataset(data: str, target: str | None = None, types: Sequence[str] = (), task: Task | None = None) -> Dataset:
    """The rows that DATA of the command line stands for; raises InputError."""
    given: dict[str, tables.ColumnType] = {}
    for text in types:
        column, kind = tables.ColumnType.parse(text)
        if column in given:
            raise TypedTwice(column)
        given[column] = kind
    is_own = data not in DATASETS
    if is_own and tables.is_table(data):
        return tables.read(Path(data), target=target, types=given, task=task)
    loaded = images.read(Path(data)) if is_own and images.is_folder(data) else load(data)
    if types:
        raise AlreadySetUp("--type", data)
    if task not in (None, loaded.task):
        raise AlreadySetUp("--task", data)
    if target not in (None, loaded.target):
        raise TargetError(str(target), loaded)
    return loaded


def default_name(data: str) -> str:
    """A model's name for DATA: a data set's own, or a file's or folder's without its ending, as a model may be called.

    Raises UnknownDataset where DATA is none of them.
    """
    if data in DATASETS or not (tables.is_table(data) or images.is_folder(data)):
        check_known(data)
        return data
    path = Path(data)
    stem = path.stem if tables.is_table(data) else path.resolve().name
    return re.sub(r"[^a-z0-9_.-]+", "-", stem.lower()).strip("-_.")[:63].rstrip("-_.") or "table"


def check_writable(folder: Path) -> None:
    """Raise RepositoryError unless the folder, or the nearest one above it that exists, can take a new entry."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise RepositoryError(folder, nearest, "not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RepositoryError(folder, nearest, "read-only for this user")


def check_report(path: Path) -> None:
    """Raise ReportError unless a page can be written there, in place of an older one too."""
    if path.is_dir():
        raise ReportError(path, "is a folder")
    if not path.parent.is_dir():
        raise ReportError(path, f"there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ReportError(path, "read-only for this user")
