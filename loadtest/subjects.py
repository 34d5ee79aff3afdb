"""Which models are asked, by which kinds of users how often, and with which rows."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest import manifest, rows, tensors
from loadtest.errors import LoadTestError
from loadtest.manifest import Instance
from loadtest.profile import BY_NAME, NATIVE

# Who answers where no model is named.
DEFAULT = ""
# Of all requests the share of each kind of user to each model; of any sum.
Mix = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Source:
    """A file of rows, and the CSV file's column that is not a feature; none: what the server knows."""

    path: Path | None = None
    target: str | None = None


@dataclass(frozen=True)
class Subject:
    """One model's rows, by position the same in the form of `instances` and as numbers of the tensor protocols.

    table, vectors: where those protocols are spoken.
    """

    rows: list[Instance]
    table: tensors.Table | None = None
    vectors: Sequence[list[float]] = ()


def weights(given: Sequence[str]) -> dict[str, float]:
    """Weights by model from `NAME:WEIGHT`, or `NAME` for 1; LoadTestError where one is not so."""
    found: dict[str, float] = {}
    for text in given:
        name, colon, weight = text.partition(":")
        try:
            value = float(weight) if colon else 1.0
        except ValueError:
            value = math.nan
        if not name or not 0 < value < math.inf:
            raise LoadTestError(f"model {text!r}: wanted NAME:WEIGHT with a weight above 0, as sonar:3")
        if name in found:
            raise LoadTestError(f"model {name!r} is there twice, wanted each once")
        found[name] = value
    return found


def sources(files: Sequence[str], targets: Sequence[str], models: Collection[str]) -> dict[str, Source]:
    """Each model's source from `FILE` and `COLUMN`, or with several models from `NAME=FILE` and `NAME=COLUMN`.

    models: the names, or DEFAULT alone.
    """
    paths, columns = _by_model("--rows", files, models), _by_model("--target", targets, models)
    for model in columns.keys() - paths.keys():
        raise LoadTestError(f"--target {columns[model]}: no --rows that it is a column of")
    return {
        model: Source(Path(paths[model]) if model in paths else None, columns.get(model) or None) for model in models
    }


def _by_model(option: str, given: Sequence[str], models: Collection[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in filter(None, given):
        name, equals, value = text.partition("=")
        if not equals or name not in models:
            if len(models) > 1:
                raise LoadTestError(f"{option} {text}: wanted NAME=... with the name of one of {', '.join(models)}")
            name, value = next(iter(models)), text
        if name in found:
            raise LoadTestError(f"{option} {text}: is there twice, wanted once for each model")
        found[name] = value
    return found


def shares(kinds: Mapping[str, float], models: Mapping[str, float], default: str | None) -> Mix:
    """Who asks which model how often, so that each model gets its share of all requests.

    kinds: weights of the kinds of users; models: weights by name; default: who answers without a name. Only that one is
    asked by every kind: the native endpoints cannot say whom they mean. Where there are only these, the others are
    asked by the protocols of the same port that can.
    """
    if not models:
        return {kind: {DEFAULT: weight} for kind, weight in kinds.items()}
    found: Mix = {}
    by_name = {kind: weight for kind, weight in kinds.items() if kind not in NATIVE} or BY_NAME
    for model, weight in models.items():
        asking = kinds if model == default else by_name
        for kind, part in asking.items():
            found.setdefault(kind, {})[model] = weight * part / sum(asking.values())
    return found


def gather(host: str, mix: Mix, given: Mapping[str, Source]) -> dict[str, Subject]:
    """What is asked of each model; raises LoadTestError where a model or its rows cannot be had."""
    found: dict[str, Subject] = {}
    for model, source in given.items():
        with_tensors = any(model in models for kind, models in mix.items() if kind not in NATIVE)
        found[model] = _subject(host, model, source, with_tensors=with_tensors)
    return found


def _subject(host: str, model: str, source: Source, *, with_tensors: bool) -> Subject:
    table: tensors.Table | None = None
    chosen: list[Any]
    if model == DEFAULT:
        chosen = rows.choose(host, source.path, source.target)
        table = tensors.check(host, chosen) if with_tensors else None
    else:
        known = manifest.read(host, model)
        chosen = rows.choose_for(known, source.path, source.target)
        table = tensors.describe(known) if with_tensors else None
    return Subject(chosen) if table is None else Subject(chosen, table, [table.vector(row) for row in chosen])
