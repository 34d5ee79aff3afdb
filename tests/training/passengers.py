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


def namesakes(rows: int = 60) -> Dataset:
    """A regression whose columns are called as layers are, or as what layers of another column might be."""
    random = np.random.default_rng(5)
    texts = ["product", "product_category", "product_known"]
    numbers = ["price", "price_column", "visible_dropout", "hidden_1", "hidden_1_dropout", "output", "member_1", "unit"]
    numbers += ["mean", "noise", "least_noise", "target_scaling", "encoded", "numbers", "scaling"]
    numbers += ["nan_to_num", "take", "isnan", "cast"]
    x = np.zeros(rows, [(name, "O") for name in texts] + [(name, "f4") for name in numbers])
    for name in texts:
        x[name] = random.choice(["a", "b", "c"], rows)
    for name in numbers:
        x[name] = np.where(random.random(rows) < 0.2, np.nan, random.normal(0, 1e-9 if name == "unit" else 1, rows))
    return Dataset(
        name="namesakes",
        task="regression",
        x=x,
        y=random.normal(5, 2, rows).astype(np.float32),
        target="worth",
        attribution="made up",
        columns=(*texts, *numbers),
        kinds=tuple((name, "categorical") for name in texts),
        nullable=tuple(numbers),
    )
