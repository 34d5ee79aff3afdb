"""Whether a promised share of wrong answers (`--max-error`) is kept, over 500 packagings of one trained network.

    .venv/bin/python -m benchmarks.selective [--splits N] [--json]

A small part of digits or breast_cancer trains; the rest is split at random, again and again: one half calibrates, as
packaging does it (the temperature, then the threshold), the other half is answered.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from models import abstention, temperature
from training.datasets import load
from training.fit import fit
from training.recipes import recipe

Array = NDArray[Any]

DRAWS = 20
# Training rows: so few that the network makes more errors than are promised.
TRAINING_ROWS = {"breast_cancer": 60, "digits": 250}
EPOCHS = 20
# The error, and the probability, that are promised.
PROMISES = ((0.02, 0.9), (0.05, 0.9), (0.05, 0.95))


def main(
    splits: Annotated[int, typer.Option(min=1, help="Random halves of the rows that did not train.")] = 500,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    found = {name: kept(name, splits) for name in TRAINING_ROWS}
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console = Console()
    for name, rows in found.items():
        table = Table(title=f"{name}, {splits} splits", title_justify="left")
        for heading in rows[0]:
            table.add_column(heading.replace("_", " "), justify="right")
        for row in rows:
            table.add_row(*[f"{value:.3g}" for value in row.values()])
        console.print(table)


def kept(name: str, splits: int) -> list[dict[str, float]]:
    """Of each promise: in which share of the splits it was kept, and at what price.

    kept: the error, at the threshold, of all rows but the training ones, which is what the halves are drawn from;
    kept_by_the_rest: of those answered only, whose number of errors has its own chance on top.
    """
    draws, y = drawn(name)
    random, each = np.random.default_rng(0), []
    for _ in range(splits):
        order = random.permutation(len(y))
        first, rest = order[: len(y) // 2], order[len(y) // 2 :]
        fitted, _ = temperature.fit(draws[first], y[first])
        p = temperature.answers(temperature.logarithms(draws), fitted.value).astype(np.float32)
        confidence, right = p.max(axis=1), p.argmax(axis=1) == y
        for max_error, level in PROMISES:
            rule, _ = abstention.of_max_error(confidence[first], right[first], max_error, level)
            given = confidence >= np.float32(rule.threshold)
            each.append((error(right, given), error(right[rest], given[rest]), given[rest].mean(), error(right)))
    # [splits, promises, 4].
    all_figures = np.array(each).reshape(splits, len(PROMISES), -1)
    found = []
    for number, (max_error, level) in enumerate(PROMISES):
        everywhere, other, answered, without = all_figures[:, number].T
        found.append(
            {
                "max_error": max_error,
                "confidence": level,
                "kept": float((everywhere <= max_error).mean()),
                "kept_by_the_rest": float((other <= max_error).mean()),
                "answered_share": float(answered.mean()),
                "mean_error": float(other.mean()),
                "error_without": float(without.mean()),
            }
        )
    return found


def drawn(name: str) -> tuple[Array, Array]:
    """Draws [N, T, K] of a network for all rows but those that trained it, and their classes."""
    data = load(name)
    order = np.random.default_rng(0).permutation(len(data.y))
    train, pool = np.sort(order[: TRAINING_ROWS[name]]), np.sort(order[TRAINING_ROWS[name] :])
    model = fit(data, train, recipe(name, epochs=EPOCHS), seed=0).model
    draws = np.stack([np.asarray(model(data.network_input(pool), training=True)) for _ in range(DRAWS)], axis=1)
    return np.concatenate([1 - draws, draws], axis=-1) if draws.shape[-1] == 1 else draws, data.y[pool]


def error(right: Array, given: Array | None = None) -> float:
    """The share of wrong answers among those given; 0 where none are."""
    chosen = right if given is None else right[given]
    return float(1 - chosen.mean()) if len(chosen) else 0.0


if __name__ == "__main__":
    typer.run(main)
