"""Rows for `dropserve evaluate`: what DATA of the command line holds, as a published model takes it.

The model's manifest says how columns are read: nothing is inferred, and what it would refuse is refused in one line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from models.contract import Feature, Manifest, ModelInput, ModelOutput, counted, listed, one_line
from training import images, tables
from training.datasets import DATASETS, MISSING, Dataset, load
from training.errors import InputError
from training.plan import TargetError
from training.splits import split
from training.tables import TableError

Array = NDArray[Any]

NPZ = ".npz"
# Different values of a column that makes subgroups, at most.
MAX_SUBGROUPS = 50


class HeldOutError(InputError):
    """DATA cannot judge the model. One line: the data, what was found, what is wanted."""

    def __init__(self, data: str, found: str) -> None:
        super().__init__(f"{data}: {one_line(found)}")


@dataclass(frozen=True)
class HeldOut:
    """Rows with their answers, as the model's signatures take them."""

    name: str
    # Which rows they are, for people: "the 42 test rows".
    described: str
    # [N, ...] by input name.
    inputs: Mapping[str, Array]
    # One array [N] for each output of the model, in its order: class numbers (int64) or values (float64). Of several
    # places in a row [N, ...], some of them NO_CLASS.
    targets: Sequence[Array]
    # The column that makes subgroups, and its values as texts [N].
    subgroup: str | None = None
    groups: Array | None = None
    # Sentences that whoever reads the figures must know.
    notes: tuple[str, ...] = field(default=())

    @property
    def rows(self) -> int:
        return len(self.targets[0])


def read(data: str, manifest: Manifest, *, target: str | None = None, subgroup: str | None = None) -> HeldOut:
    """The rows of DATA: a bundled data set's test rows, a CSV or Parquet file's, a folder's or an .npz file's.

    Of a file or folder that trained the model, under this name or another, they are its test rows.
    Raises InputError or ArtifactError (an .npz file).
    """
    if data.lower().endswith(NPZ):
        return _arrays(data, manifest, target, subgroup)
    if len(manifest.outputs) > 1:
        names = ", ".join(output.name for output in manifest.outputs)
        raise HeldOutError(data, f"{manifest.name} has the outputs {names}; wanted an .npz file with a y for each")
    if data not in DATASETS and tables.is_table(data):
        return _file(Path(data), manifest, target, subgroup)
    is_folder = data not in DATASETS and images.is_folder(data)
    loaded = images.read(Path(data)) if is_folder else load(data)
    if target not in (None, loaded.target):
        raise TargetError(str(target), loaded)
    if is_folder and not _trained(loaded, manifest):
        rows = np.arange(len(loaded.y))
        return _dataset(data, loaded, rows, f"all {counted(len(rows), 'image')}", manifest, subgroup)
    rows = split(loaded.y, loaded.task).test
    found = _dataset(data, loaded, rows, _test_rows(rows), manifest, subgroup)
    return replace(found, notes=(*found.notes, _only_test_rows(loaded.name))) if is_folder else found


def outliers(data: str, manifest: Manifest) -> dict[str, dict[str, Array]]:
    """Rows that someone knows to be unlike the model's, without answers: inputs [M, ...] by their name and the input's.

    data: a bundled data set, all of it; a CSV or Parquet file; images anywhere in a folder; the inputs of an .npz file.
    Raises InputError or ArtifactError (an .npz file).
    """
    if data.lower().endswith(NPZ):
        from models.holdout import Holdout

        return {Path(data).name: Holdout.read(Path(data)).inputs(manifest.inputs)}
    if data not in DATASETS and tables.is_table(data):
        path = Path(data)
        return {path.name: _inputs(path, _table(path, manifest), manifest)}
    if data not in DATASETS and images.is_folder(data):
        return {f"{Path(data).resolve().name}-images": _images(Path(data), manifest)}
    loaded = load(data)
    _check_form(data, loaded, manifest)
    return {loaded.name: loaded.tensors(np.arange(len(loaded.y)))}


def _images(folder: Path, manifest: Manifest) -> dict[str, Array]:
    found = images.below(folder)
    wanted = {item.name: list(item.shape) for item in manifest.inputs}
    fits = len(wanted) == 1 and len(*wanted.values()) == 3
    if not fits or any(size not in (None, own) for size, own in zip(*wanted.values(), found.shape[1:], strict=True)):
        shown = ", ".join(f"{name} {shape}" for name, shape in wanted.items())
        raise HeldOutError(str(folder), f"its images are {list(found.shape[1:])}; {manifest.name} takes {shown}")
    return {next(iter(wanted)): found}


def _dataset(
    data: str, loaded: Dataset, rows: NDArray[np.int64], which: str, manifest: Manifest, subgroup: str | None
) -> HeldOut:
    _check_form(data, loaded, manifest)
    [output] = manifest.outputs
    if loaded.task != output.task:
        raise HeldOutError(data, f"a {loaded.task}; {manifest.name} is a {output.task}")
    y = loaded.y[rows]
    if output.task == "classification":
        y = _classes(data, "target", np.array(loaded.labels, object)[y], output)
    groups = None
    if subgroup is not None:
        if subgroup not in loaded.columns:
            raise HeldOutError(data, f"no column {subgroup!r} for subgroups; {listed(loaded.columns)} wanted")
        values = loaded.x[subgroup] if loaded.kinds else loaded.x[:, loaded.columns.index(subgroup)]
        groups = _groups(data, subgroup, as_written(values[rows]))
    return HeldOut(
        loaded.name, which, loaded.tensors(rows), [_typed(y, output)], subgroup, groups, _strangers(loaded, manifest)
    )


def _check_form(data: str, loaded: Dataset, manifest: Manifest) -> None:
    found = {item.name: (item.dtype, list(item.shape)) for item in loaded.inputs}
    wanted = {item.name: (item.dtype, list(item.shape)) for item in manifest.inputs}
    if found != wanted or (loaded.columns and loaded.columns != _column_names(manifest)):
        raise HeldOutError(data, f"its rows are {_shapes(found)}; {manifest.name} takes {_shapes(wanted)}")


def _trained(loaded: Dataset, manifest: Manifest) -> bool:
    """Whether these rows trained the model, whatever they are called now."""
    known = manifest.training_data
    if known is None or known.test_rows == 0 or known.rows != len(loaded.y):
        return False
    return replace(loaded, name=known.name).sha256 == known.sha256


def _test_rows(rows: NDArray[np.int64]) -> str:
    return f"the {counted(len(rows), 'test row')}"


def _only_test_rows(name: str) -> str:
    return f"{name} trained the model: only the rows that neither training nor calibration saw are judged"


def _strangers(loaded: Dataset, manifest: Manifest) -> tuple[str, ...]:
    """Whether the model was trained on other data than these."""
    known = manifest.training_data
    if known is not None and known.name == loaded.name and known.sha256 != loaded.sha256:
        return (f"{loaded.name} has changed since it trained the model: some of these rows may have been among them",)
    return ()


def _file(path: Path, manifest: Manifest, target: str | None, subgroup: str | None) -> HeldOut:
    """All rows of the file; of the one that trained the model, or a copy of it, the test rows."""
    table = _table(path, manifest)
    target = _target_name(path, table, manifest, target, subgroup)
    [output] = manifest.outputs
    inputs = _inputs(path, table, manifest)
    y = _answers(path, target, table.column(target), output)
    groups = None
    if subgroup is not None:
        if subgroup not in table.column_names:
            raise TableError(path, f"no column {subgroup!r} for subgroups; wanted one of {listed(table.column_names)}")
        column = tables.plain(path, f"column {subgroup!r}", table.column(subgroup), "categorical")
        groups = _groups(str(path), subgroup, tables.as_texts(column))
    found = HeldOut(path.name, f"all {counted(len(y), 'row')}", inputs, [y], subgroup, groups)
    return _without_training_rows(found, path, manifest, target, table.column_names)


def _table(path: Path, manifest: Manifest) -> pa.Table:
    """The file's rows, with every column that the model takes."""
    if not manifest.is_table:
        wanted = ", ".join(f"{item.name} {item.shape}" for item in manifest.inputs)
        raise TableError(path, f"a table, but {manifest.name} takes {wanted}; wanted an .npz file")
    features = [feature for item in manifest.inputs for feature in item.features or ()]
    table = tables.file_columns(path, set(), [feature.name for feature in features if feature.kind == "categorical"])
    if table.num_rows == 0:
        raise TableError(path, "no rows; wanted at least one to judge the model by")
    missing = [name for name in _column_names(manifest) if name not in table.column_names]
    if missing:
        raise TableError(
            path, f"no column {listed(missing)}, which {manifest.name} takes; found {listed(table.column_names)}"
        )
    return table


def _inputs(path: Path, table: pa.Table, manifest: Manifest) -> dict[str, Array]:
    """[N, ...] by input name."""
    columns = {
        feature.name: _column(path, feature, table.column(feature.name), item)
        for item in manifest.inputs
        for feature in item.features or ()
    }
    return {
        item.name: np.stack([columns[feature.name] for feature in item.features or ()], axis=1)
        if item.shape
        else next(columns[feature.name] for feature in item.features or ())
        for item in manifest.inputs
    }


def _target_name(path: Path, table: pa.Table, manifest: Manifest, target: str | None, subgroup: str | None) -> str:
    """The target where it is named, or where it is the only column left."""
    indices = tables.index_columns(table)
    left = [name for name in table.column_names if name not in (*_column_names(manifest), *indices)]
    if not left and target not in indices:
        raise TableError(
            path, f"no column beside those that {manifest.name} predicts from; wanted one with the answers"
        )
    if target is None:
        others = [name for name in left if name != subgroup]
        if len(others) != 1:
            raise TableError(path, f"no target; wanted --target COLUMN, {listed(left)}")
        return others[0]
    if target not in table.column_names:
        raise TableError(path, f"target {target!r} is not among its columns; wanted one of {listed(left)}")
    if target in _column_names(manifest):
        raise TableError(path, f"target {target!r} is what {manifest.name} predicts from; wanted {listed(left)}")
    return target


def _column(path: Path, feature: Feature, column: pa.ChunkedArray, item: ModelInput) -> Array:
    """A feature [N] as its tensor has it: float32 (NaN is missing), bool or text ("" is missing)."""
    where = f"column {feature.name!r}"
    column = tables.plain(path, where, column, feature.kind)
    holes = tables.find_holes(column)
    if holes.any() and not feature.nullable:
        raise TableError(
            path,
            f"{where}: no value in row {int(np.argmax(holes)) + 1:,}; wanted one, since it was never missing before",
        )
    if feature.kind == "categorical":
        return tables.as_texts(column)
    values = tables.as_numbers(path, where, column, feature.kind)
    return values.astype(bool) if item.dtype == "bool" else values


def _answers(path: Path, target: str, column: pa.ChunkedArray, output: ModelOutput) -> Array:
    where = f"target {target!r}"
    column = tables.plain(path, where, column, "categorical" if output.task == "classification" else None)
    holes = tables.find_holes(column)
    if holes.any():
        raise TableError(path, f"{where}: no value in row {int(np.argmax(holes)) + 1:,}; wanted a value in every row")
    if output.task == "classification":
        return _typed(_classes(str(path), where, tables.as_texts(column), output), output)
    return _typed(tables.as_numbers(path, where, column, "numeric"), output)


def _classes(data: str, where: str, labels: Array, output: ModelOutput) -> NDArray[np.int64]:
    known = {label: number for number, label in enumerate(output.labels or ())}
    for row, label in enumerate(labels):
        if label not in known:
            raise HeldOutError(data, f"{where}: unknown label {label!r} in row {row + 1:,}; wanted {listed(known)}")
    return np.array([known[label] for label in labels], np.int64)


def _without_training_rows(
    found: HeldOut, path: Path, manifest: Manifest, target: str, columns: Sequence[str]
) -> HeldOut:
    """Only the test rows where the file's rows are those that trained the model."""
    known = manifest.training_data
    if known is None or known.rows != found.rows:
        # Without reading it again.
        return found
    features = {feature.name: feature for item in manifest.inputs for feature in item.features or ()}
    types = {
        name: tables.ColumnType(features[name].kind, nullable=features[name].nullable)
        if name in features
        else tables.ColumnType(ignored=True)
        for name in columns
        if name != target
    }
    with contextlib.suppress(TableError):
        data = tables.read(path, target=target, types=types, task=manifest.outputs[0].task)
        if _trained(data, manifest):
            rows = split(data.y, data.task).test
            return HeldOut(
                found.name,
                _test_rows(rows),
                {name: values[rows] for name, values in found.inputs.items()},
                [target_values[rows] for target_values in found.targets],
                found.subgroup,
                None if found.groups is None else found.groups[rows],
                (_only_test_rows(path.name),),
            )
    return found


def _arrays(data: str, manifest: Manifest, target: str | None, subgroup: str | None) -> HeldOut:
    from models.holdout import Holdout

    for option, value in (("--target", target), ("--subgroup", subgroup)):
        if value is not None:
            raise HeldOutError(data, f"{option} is for a table; an .npz file has `y`, and no columns")
    rows = Holdout.read(Path(data)).matched(manifest.inputs, manifest.outputs, may_be_padded=True)
    found = HeldOut(Path(data).name, "", rows.inputs, rows.targets)
    return HeldOut(found.name, f"all {counted(found.rows, 'row')}", rows.inputs, rows.targets)


def as_written(values: Array) -> Array:
    """A column's values [N] as texts."""
    return np.array([f"{value:g}" if isinstance(value, np.floating) else str(value) for value in values], object)


def _groups(data: str, name: str, values: Array) -> Array:
    found = sorted(set(values.tolist()))
    if len(found) > MAX_SUBGROUPS:
        raise HeldOutError(
            data, f"column {name!r} has {len(found):,} different values; wanted at most {MAX_SUBGROUPS} for subgroups"
        )
    return np.array([value if value != MISSING else "(missing)" for value in values], object)


def _typed(y: Array, output: ModelOutput) -> Array:
    return y.astype(np.int64 if output.task == "classification" else np.float64)


def _column_names(manifest: Manifest) -> tuple[str, ...]:
    return tuple(feature.name for item in manifest.inputs for feature in item.features or ())


def _shapes(inputs: Mapping[str, tuple[str, list[Any]]]) -> str:
    """A few inputs, for people."""
    shown = [f"{name} {shape}" for name, (_, shape) in inputs.items()]
    return ", ".join(shown[:5]) + (", ..." if len(shown) > 5 else "")
