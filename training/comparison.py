"""The same net with dropout in other places, judged on the same rows: what dropout buys here, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras

from training.datasets import Dataset
from training.ensemble import fit_members, turns
from training.evaluation import evaluate
from training.fit import fit
from training.progress import Reporter
from training.recipes import Recipe, changed
from training.splits import Split


@dataclass(frozen=True)
class Variant:
    """One network, fitted."""

    name: str
    recipe: Recipe
    model: keras.Model
    # Mean training loss of each epoch, dropout on.
    losses: list[float]
    # Loss on the calibration rows after each epoch, dropout off: recorded, and without a say in the training.
    held_out_losses: list[float]
    # On the test rows, dropout off.
    metrics: dict[str, float]

    def summary(self) -> dict[str, Any]:
        rates = {"visible_dropout": self.recipe.visible_dropout, "hidden_dropout": self.recipe.hidden_dropout}
        return {"name": self.name, **rates, **self.metrics}


def fit_variant(
    name: str, recipe: Recipe, data: Dataset, rows: Split, seed: int, reporter: Reporter, members: int = 1
) -> Variant:
    """Fit on the training rows, judge on the test rows. members: of an ensemble; 1 for a single network."""
    epochs = recipe.epochs * turns(data, recipe, members)
    with reporter.epochs(f"{data.name}, {name}", epochs) as on_epoch:
        if members == 1:
            fitted = fit(data, rows.train, recipe, seed=seed, on_epoch=on_epoch, watch=rows.calibration)
        else:
            fitted = fit_members(
                data, rows.train, recipe, members, seed=seed, on_epoch=on_epoch, watch=rows.calibration
            )
    metrics = evaluate(fitted.model, data, rows.test)
    return Variant(name, recipe, fitted.model, fitted.losses, fitted.watched_losses, metrics)


def alternatives(chosen: Recipe) -> dict[str, Recipe]:
    """The chosen recipe without dropout, with it on the visible layer only, and on the hidden layers only.

    A recipe that would repeat another is left out: beside a net with dropout in one place stands the baseline alone.
    """
    places = {
        "baseline": (0.0, 0.0),
        "visible": (chosen.visible_dropout, 0.0),
        "hidden": (0.0, chosen.hidden_dropout),
    }
    seen = {chosen}
    others: dict[str, Recipe] = {}
    for name, (visible, hidden) in places.items():
        other = changed(chosen, visible_dropout=visible, hidden_dropout=hidden)
        if other not in seen:
            seen.add(other)
            others[name] = other
    return others


def place(recipe: Recipe) -> str:
    """Where a recipe's dropout is, in a word or three."""
    if recipe.visible_dropout and recipe.hidden_dropout:
        return "visible and hidden"
    return "visible" if recipe.visible_dropout else "hidden" if recipe.hidden_dropout else "baseline"
