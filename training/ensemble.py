"""Deep ensembles of networks with dropout (Lakshminarayanan, Pritzel & Blundell 2017; Gal & Ghahramani 2016).

Members have one recipe, the same training rows, and other seeds: other initial weights, shuffles and masks. They are
trained as stacks of replicas; with a variance head, or where rows or activations are too large for that, one after
another. The result is one Keras model whose answer is the members' mean, and that `models.members` takes apart again
for the draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import keras
import numpy as np
from numpy.typing import NDArray

from models.members import member_symbols
from models.sampling import some
from training import replicas
from training.datasets import Dataset, layer_name
from training.fit import MOST_ENCODED_BYTES, WATCHED_ROWS, Fitted, OnEpoch, fit, targets
from training.folds import encode, image_shape
from training.networks import answer, in_target_units, model
from training.preprocessing import Preprocessor
from training.recipes import Recipe


def member_seeds(seed: int, members: int) -> list[int]:
    """Training seeds of the members: the first one's is the seed itself."""
    return [(seed + number) % 2**32 for number in range(members)]


def turns(data: Dataset, recipe: Recipe, members: int) -> int:
    """How many stacks, or networks, are trained one after another."""
    return -(-members // max(1, replicas.most_at_once(recipe, image_shape(data))))


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

    on_epoch: with epochs counted over all `turns`.
    """
    ensemble = _Ensemble(data, train_rows, recipe, members)
    at_once = replicas.most_at_once(recipe, image_shape(data))
    if at_once and ensemble.encoded_bytes <= most_encoded_bytes:
        losses, watched = _together(ensemble, at_once, seed, on_epoch, watch)
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
        names = [item.name for item in data.inputs]
        self.members = [
            self._member(encoded.shape[1:], layer_name(f"member_{number + 1}", names)) for number in range(members)
        ]
        mean = keras.layers.Average(name=layer_name("output", names))([member(encoded) for member in self.members])
        self.model = model(inputs, mean, data)

    def _member(self, shape: tuple[int, ...], name: str) -> keras.Model:
        encoded = keras.Input(shape, name="encoded")
        network = keras.Model(encoded, answer(encoded, self.data, self.recipe), name=name)
        if self.data.task == "classification":
            return network
        _, mean, scale = targets(self.data, self.train_rows)
        return in_target_units(network, mean, scale)


def _together(
    ensemble: _Ensemble, at_once: int, seed: int, on_epoch: OnEpoch | None, watch: NDArray[np.int64] | None
) -> tuple[list[float], list[float]]:
    data, train_rows, recipe = ensemble.data, ensemble.train_rows, ensemble.recipe
    seeds = member_seeds(seed, len(ensemble.members))
    rows, _, groups = encode(data, [train_rows for _ in seeds])
    stack = [replicas.Replica(recipe, train_rows, group, own) for own, group in zip(seeds, groups, strict=True)]
    # [members, epochs], of stack after stack.
    losses: list[NDArray[np.float32]] = []
    watched: list[list[float]] = []
    for turn, first in enumerate(range(0, len(stack), at_once)):
        own = stack[first : first + at_once]
        seen: list[list[float]] = []

        def look(
            done: int,
            now: Callable[[], replicas.Trained],
            before: int = turn * recipe.epochs,
            seen: list[list[float]] = seen,
        ) -> None:
            trained = now()
            if watch is not None:
                seen.append(trained.loss([some(watch, WATCHED_ROWS)] * len(trained.replicas)))
            if on_epoch is not None:
                on_epoch(before + done, float(trained.losses[:, -1].mean()))

        trained = replicas.train_stack(rows, own, on_block=look, block_epochs=1)
        for number, member in enumerate(ensemble.members[first : first + at_once]):
            member.set_weights(trained.keras_weights(number))
        losses.append(trained.losses)
        watched += np.transpose(seen).tolist()
    return np.concatenate(losses).mean(axis=0).tolist(), np.mean(watched, axis=0).tolist() if watched else []


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
