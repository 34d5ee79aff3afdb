"""Deep ensembles of networks with dropout (Lakshminarayanan, Pritzel & Blundell 2017; Gal & Ghahramani 2016).

Members have one recipe, the same training rows, and other seeds: other initial weights, shuffles and masks. Dense
networks are trained all at once, as a stack; others one after another. The result is one Keras model whose answer is
the members' mean, and that `models.members` takes apart again for the draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import keras
import numpy as np
from numpy.typing import NDArray

from models.members import member_symbols
from training import replicas
from training.datasets import Dataset
from training.fit import MOST_ENCODED_BYTES, WATCHED_ROWS, Fitted, OnEpoch, fit, targets
from training.folds import encode
from training.networks import answer, in_target_units, model
from training.preprocessing import Preprocessor
from training.recipes import Recipe


def member_seeds(seed: int, members: int) -> list[int]:
    """Training seeds of the members: the first one's is the seed itself."""
    return [(seed + number) % 2**32 for number in range(members)]


def fit_members(
    data: Dataset,
    train_rows: NDArray[np.int64],
    recipe: Recipe,
    members: int,
    *,
    seed: int,
    on_epoch: OnEpoch | None = None,
    watch: NDArray[np.int64] | None = None,
    most_encoded_bytes: int = MOST_ENCODED_BYTES,
) -> Fitted:
    """Fit the members on `train_rows` of the data, as `training.fit` fits one network; losses are their means.

    on_epoch: with epochs counted over all members where they are trained one after another.
    """
    ensemble = _Ensemble(data, train_rows, recipe, members)
    if recipe.architecture == "dense" and ensemble.encoded_bytes <= most_encoded_bytes:
        losses, watched = _together(ensemble, seed, on_epoch, watch)
    else:
        losses, watched = _one_by_one(ensemble, seed, on_epoch, watch)
    return Fitted(ensemble.model, losses, watched)


def single_networks(model: keras.Model, members: int) -> list[keras.Model]:
    """Each member of an ensemble's model on its own, on the ensemble's inputs."""
    return [keras.Model(model.input, symbol) for symbol in member_symbols(model, members)]


class _Ensemble:
    """The untrained ensemble: preprocessing, the members behind it, and their mean."""

    def __init__(self, data: Dataset, train_rows: NDArray[np.int64], recipe: Recipe, members: int) -> None:
        self.data, self.train_rows, self.recipe = data, train_rows, recipe
        preprocessor = Preprocessor.fit(data, train_rows)
        inputs = preprocessor.inputs()
        encoded = preprocessor.layers(inputs)
        # Of all rows of the data.
        self.encoded_bytes = math.prod(encoded.shape[1:]) * 4 * len(data.x)
        self.members = [self._member(encoded.shape[1:], f"member_{number + 1}") for number in range(members)]
        mean = keras.layers.Average(name="output")([member(encoded) for member in self.members])
        self.model = model(inputs, mean, data)

    def _member(self, shape: tuple[int, ...], name: str) -> keras.Model:
        encoded = keras.Input(shape, name="encoded")
        network = keras.Model(encoded, answer(encoded, self.data, self.recipe), name=name)
        if self.data.task == "classification":
            return network
        _, mean, scale = targets(self.data, self.train_rows)
        return in_target_units(network, mean, scale)


def _together(
    ensemble: _Ensemble, seed: int, on_epoch: OnEpoch | None, watch: NDArray[np.int64] | None
) -> tuple[list[float], list[float]]:
    data, train_rows, recipe = ensemble.data, ensemble.train_rows, ensemble.recipe
    seeds = member_seeds(seed, len(ensemble.members))
    rows, _, groups = encode(data, [train_rows for _ in seeds])
    stack = [replicas.Replica(recipe, train_rows, group, own) for own, group in zip(seeds, groups, strict=True)]
    watched: list[float] = []

    def look(done: int, now: Callable[[], replicas.Trained]) -> None:
        trained = now()
        if watch is not None:
            watched.append(float(np.mean(trained.loss([watch[:WATCHED_ROWS]] * len(stack)))))
        if on_epoch is not None:
            on_epoch(done, float(trained.losses[:, -1].mean()))

    trained = replicas.train_stack(rows, stack, on_block=look, block_epochs=1)
    for number, member in enumerate(ensemble.members):
        member.set_weights(trained.keras_weights(number))
    return trained.losses.mean(axis=0).tolist(), watched


def _one_by_one(
    ensemble: _Ensemble, seed: int, on_epoch: OnEpoch | None, watch: NDArray[np.int64] | None
) -> tuple[list[float], list[float]]:
    recipe, fits = ensemble.recipe, []
    for number, own in enumerate(member_seeds(seed, len(ensemble.members))):

        def report(epoch: int, loss: float, before: int = number * recipe.epochs) -> None:
            if on_epoch is not None:
                on_epoch(before + epoch, loss)

        fitted = fit(ensemble.data, ensemble.train_rows, recipe, seed=own, on_epoch=report, watch=watch)
        for layer in ensemble.members[number].layers:
            # Layers without weights may be preprocessing's namesakes.
            if layer.weights:
                layer.set_weights(fitted.model.get_layer(layer.name).get_weights())
        fits.append(fitted)
    losses = np.mean([fitted.losses for fitted in fits], axis=0).tolist()
    return losses, np.mean([fitted.watched_losses for fitted in fits], axis=0).tolist()
