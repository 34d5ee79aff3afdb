"""A made-up table with a column of every kind."""

from __future__ import annotations

import numpy as np

from training.datasets import Dataset


def passengers(rows: int = 60) -> Dataset:
    """A table with a column of every kind, some values missing."""
    random = np.random.default_rng(3)
    fields = [("age", "f4"), ("fare", "f4"), ("alone", "?"), ("smoker", "f4"), ("port of call", "O")]
    x = np.zeros(rows, fields)
    x["age"] = np.where(random.random(rows) < 0.2, np.nan, random.normal(40, 12, rows))
    x["fare"] = random.gamma(2, 15, rows)
    x["alone"] = random.random(rows) < 0.6
    x["smoker"] = np.where(random.random(rows) < 0.1, np.nan, random.random(rows) < 0.3)
    x["port of call"] = random.choice(["Cherbourg", "Queenstown", "Southampton", ""], rows)
    return Dataset(
        name="passengers",
        task="classification",
        x=x,
        y=(random.random(rows) < 0.5).astype(np.int64),
        target="survived",
        attribution="made up",
        columns=tuple(name for name, _ in fields),
        labels=("false", "true"),
        kinds=(("alone", "boolean"), ("smoker", "boolean"), ("port of call", "categorical")),
        nullable=("age", "smoker", "port of call"),
    )
