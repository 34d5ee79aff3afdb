"""The rows that the users send.

`sonar.csv` beside this module: every fourth row of Connectionist Bench (Sonar, Mines vs. Rocks), Gorman & Sejnowski
1988, UCI Machine Learning Repository, CC BY 4.0.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import httpx

from loadtest.errors import RowsError
from loadtest.manifest import Instance, Manifest

SONAR = Path(__file__).with_name("sonar.csv")
SONAR_TARGET = "object"


@dataclass(frozen=True)
class Form:
    """How the server's model takes an instance, by its OpenAPI document: working examples, and its features' names."""

    examples: list[Instance]
    names: frozenset[str]


def choose(host: str, path: Path | None, target: str | None) -> list[Instance]:
    """The rows of a file; without one, Sonar's where they fit the model, else the server's own examples.

    path: `.csv` with a header, sent by name where the model knows the names, else in the file's order; or `.json` with
    a list of instances or {"instances": [...]}. target: the CSV file's column that is not a feature.
    Raises RowsError where the file or the server has no usable rows.
    """
    if path is not None and path.suffix == ".json":
        return read_json(path)
    form = _form(host)
    return _fitting(path, target, form.names) or form.examples


def choose_for(model: Manifest, path: Path | None, target: str | None) -> list[Instance]:
    """The same for a model by its manifest, which gives more rows than the examples where it knows how."""
    if path is not None and path.suffix == ".json":
        return read_json(path)
    return _fitting(path, target, frozenset(model.columns)) or model.rows()


def _fitting(path: Path | None, target: str | None, names: frozenset[str]) -> list[Instance]:
    """The rows of a CSV file, by name where all its names are known; without one Sonar's, or none if not its names."""
    header, found = read_csv(SONAR, SONAR_TARGET) if path is None else read_csv(path, target)
    if path is None and names != set(header):
        return []
    return [dict(zip(header, row, strict=True)) for row in found] if names >= set(header) else list(found)


def read_json(path: Path) -> list[Instance]:
    """The instances of a JSON file; RowsError where there are none."""
    try:
        content = json.loads(_text(path))
    except ValueError as error:
        raise RowsError(f"{path}: not JSON ({error})") from error
    instances = content.get("instances") if isinstance(content, dict) else content
    if not isinstance(instances, list):
        raise RowsError(f'{path}: wanted a list of instances, or {{"instances": [...]}}')
    if not instances:
        raise RowsError(f"{path}: no rows; wanted at least one")
    return instances


def read_csv(path: Path, target: str | None) -> tuple[list[str], list[list[float | str]]]:
    """Names of a CSV file's columns and its rows, both without the target; RowsError where there are none."""
    try:
        header, *lines = list(csv.reader(_text(path).splitlines())) or [[]]
    except csv.Error as error:
        raise RowsError(f"{path}: not CSV ({error}); wanted a header and rows of values") from error
    if target is not None and target not in header:
        raise RowsError(f"{path}: no column {target!r}; its columns are {', '.join(header) or 'none'}")
    if not lines:
        raise RowsError(f"{path}: no rows; wanted a header and at least one row")
    for number, line in enumerate(lines, start=2):
        if len(line) != len(header):
            raise RowsError(f"{path}: line {number} has {len(line)} cells, wanted {len(header)} as in the header")
    kept = [index for index, name in enumerate(header) if name != target]
    return [header[index] for index in kept], [[_cell(line[index]) for index in kept] for line in lines]


def _text(path: Path) -> str:
    wanted = "wanted a CSV or JSON file of rows"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RowsError(f"{path}: cannot be read ({error.strerror}); {wanted}") from error
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{content[error.start]:02x} in line {line}"
        raise RowsError(f"{path}: not UTF-8 text ({found}); {wanted} saved as UTF-8") from error


def _cell(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def _form(host: str) -> Form:
    url = f"{host}/openapi.json"
    try:
        operation = httpx.get(url, timeout=30).raise_for_status().json()["paths"]["/predict"]["post"]
        content = operation["requestBody"]["content"]["application/json"]
        examples = content["example"]["instances"]
        rows = content["schema"]["properties"]["instances"]
        forms = [form["items"] for form in rows.get("anyOf", [rows])]
        names = frozenset(name for form in forms for name in form.get("properties", ()))
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise RowsError(f"{url}: no description of /predict ({error!r}); wanted a dropserve server") from error
    if not examples:
        raise RowsError(f"{url}: no example of a row; give the rows with --rows FILE")
    return Form(examples, names)
