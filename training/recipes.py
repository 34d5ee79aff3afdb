"""Hyperparameters: each data set's defaults, with the reason beside each. No Keras: bad values are refused at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from training.datasets import Dataset
from training.errors import InputError


class RateError(InputError):
    def __init__(self, which: str, rate: float) -> None:
        super().__init__(f"{which} dropout rate {rate}: wanted a number from 0 up to, but not including, 1")


@dataclass(frozen=True)
class Recipe:
    """How one network is built and trained."""

    architecture: Literal["dense", "convolutional"]
    # Widths of the hidden dense layers.
    hidden_units: tuple[int, ...]
    # Share of the inputs that a draw drops.
    visible_dropout: float
    # Share of each hidden layer's units that a draw drops.
    hidden_dropout: float
    # Largest L2 norm of the weights into one hidden unit; None for no limit.
    max_norm: float | None
    optimizer: Literal["sgd", "adam"]
    learning_rate: float
    # Of SGD; Adam keeps its own.
    momentum: float
    epochs: int
    # Rows a step.
    batch_size: int
    # Regression: whether the net learns each row's noise beside its mean.
    heteroscedastic: bool = False

    def __post_init__(self) -> None:
        for which, rate in (("visible", self.visible_dropout), ("hidden", self.hidden_dropout)):
            if not (math.isfinite(rate) and 0 <= rate < 1):
                raise RateError(which, rate)

    @property
    def is_stochastic(self) -> bool:
        return self.visible_dropout > 0 or self.hidden_dropout > 0


# Brownlee's tutorial "Dropout Regularization in Deep Learning Models with Keras": its nets for Sonar, unchanged.
SONAR = Recipe(
    architecture="dense",
    # 60 inputs - 60 - 30 - 1.
    hidden_units=(60, 30),
    # One input in five: Srivastava et al. 2014 keep 0.8 of the visible units.
    visible_dropout=0.2,
    # Few units to spare: with the 0.5 of wide layers every fold of a cross-validation stayed at a constant answer.
    hidden_dropout=0.2,
    # Srivastava et al. 2014, section 5.1: a bound on the norms is what allows the high learning rate.
    max_norm=3.0,
    optimizer="sgd",
    # Ten times the baseline's, and more momentum: dropout's gradients are noisy and partly cancel (same paper, A.2).
    learning_rate=0.1,
    momentum=0.9,
    # About eight steps an epoch: the loss is flat by then.
    epochs=300,
    batch_size=16,
)

# The tutorial's net without dropout: no noise to average out, so a tenth of the learning rate, and no bound.
SONAR_BASELINE = replace(
    SONAR, visible_dropout=0.0, hidden_dropout=0.0, max_norm=None, learning_rate=0.01, momentum=0.8
)

# Figures below are means of a stratified 5-fold cross-validation within the training rows, seed 0.
DEFAULTS: dict[str, Recipe] = {
    "sonar": SONAR,
    "breast_cancer": Recipe(
        architecture="dense",
        # Nearly linear classes: one hidden layer is enough.
        hidden_units=(32,),
        # Thirty columns in three groups of ten that repeat each other: a dropped one is covered by its neighbours.
        visible_dropout=0.2,
        hidden_dropout=0.2,
        max_norm=None,
        # No tutorial to follow: Adam at its usual rate needs no search.
        optimizer="adam",
        learning_rate=1e-3,
        momentum=0.0,
        # Where the held-out loss of the answer without dropout turns. At 50 the draws are too modest: their negative
        # log-likelihood is 0.079 there, 0.074 here and at 150 (means of eight seeds, 4-fold, within the training and
        # calibration rows).
        epochs=100,
        batch_size=16,
    ),
    "wine": Recipe(
        architecture="dense",
        hidden_units=(32,),
        # Thirteen columns with little redundancy: fewer may be dropped.
        visible_dropout=0.1,
        hidden_dropout=0.2,
        max_norm=None,
        optimizer="adam",
        learning_rate=1e-3,
        momentum=0.0,
        # Seven steps an epoch: a quarter of the held-out loss of 50 epochs.
        epochs=150,
        batch_size=16,
    ),
    "digits": Recipe(
        architecture="convolutional",
        hidden_units=(64,),
        # Pixels of an 8x8 image carry too much each to drop them; the feature maps behind them are redundant.
        visible_dropout=0.0,
        hidden_dropout=0.25,
        max_norm=None,
        optimizer="adam",
        # In a third of the steps to where 1e-3 gets.
        learning_rate=3e-3,
        momentum=0.0,
        # For the draws, which are too modest in a net that still learns. 40 epochs at 1e-3: negative log-likelihood of
        # the draws 0.084 (dropout off 0.057), now 0.046 (0.047), in a 4-fold cross-validation within the training and
        # calibration rows.
        epochs=100,
        batch_size=32,
    ),
    "diabetes": Recipe(
        architecture="dense",
        # 266 training rows with much noise: twice the units did no better.
        hidden_units=(32,),
        # Held-out RMSE 55.2, against 57.1 without it and 58.2 without any dropout, standard error 1.2 each.
        visible_dropout=0.1,
        hidden_dropout=0.2,
        max_norm=None,
        optimizer="adam",
        learning_rate=1e-3,
        momentum=0.0,
        epochs=100,
        batch_size=16,
    ),
}


# Steps that a table of one's own is trained for, about: Adam's loss on tables of this size is flat by then.
STEPS = 3000
MIN_EPOCHS, MAX_EPOCHS = 10, 100
MIN_BATCH, MAX_BATCH = 16, 1024


def recipe_of(data: Dataset) -> Recipe:
    """The default recipe of a data set: one by its size where it is not of those with a recipe of their own.

    A table of one's own has had no search: enough units for most tables, and rates that cost little where dropout does
    not help. `--visible-dropout` and `--hidden-dropout` change them.
    """
    if data.name in DEFAULTS:
        return DEFAULTS[data.name]
    rows = max(1, round(0.6 * len(data.x)))
    # As many rows a step as give forty steps an epoch, a power of two.
    batch = 2 ** round(math.log2(min(max(rows / 40, MIN_BATCH), MAX_BATCH)))
    epochs = min(max(round(STEPS * batch / rows), MIN_EPOCHS), MAX_EPOCHS)
    is_table = bool(data.columns)
    return Recipe(
        architecture="dense" if is_table else "convolutional",
        hidden_units=(64,),
        visible_dropout=0.1 if is_table and len(data.columns) > 1 else 0.0,
        hidden_dropout=0.2 if is_table else 0.25,
        max_norm=None,
        optimizer="adam",
        learning_rate=1e-3,
        momentum=0.0,
        epochs=epochs,
        batch_size=batch,
    )


def recipe(
    dataset: str,
    *,
    visible_dropout: float | None = None,
    hidden_dropout: float | None = None,
    epochs: int | None = None,
) -> Recipe:
    """The recipe of a data set that has one, with the given values in place of its own: see `changed`."""
    return changed(DEFAULTS[dataset], visible_dropout=visible_dropout, hidden_dropout=hidden_dropout, epochs=epochs)


def changed(
    default: Recipe,
    *,
    visible_dropout: float | None = None,
    hidden_dropout: float | None = None,
    epochs: int | None = None,
) -> Recipe:
    """The recipe with the given values in place of its own.

    Without any dropout it is the baseline's: for Sonar's that changes the optimizer too.
    Raises RateError.
    """
    chosen = replace(
        default,
        visible_dropout=default.visible_dropout if visible_dropout is None else visible_dropout,
        hidden_dropout=default.hidden_dropout if hidden_dropout is None else hidden_dropout,
        epochs=default.epochs if epochs is None else epochs,
    )
    without = replace(SONAR, visible_dropout=0.0, hidden_dropout=0.0, epochs=chosen.epochs)
    if chosen == without:
        return replace(SONAR_BASELINE, epochs=chosen.epochs)
    return chosen
