"""Many small networks of one architecture, trained in one graph: folds x rates x repeats, stacked on a leading axis.

Each replica has its own rows, shuffles, dropout rates, learning rate, momentum, bound on the norms and number of
epochs, and comes out as if Keras had trained it alone with the same initial weights, batches and masks. A step of one
small net is mostly overhead; a step of a hundred of them is a batched matrix product. Networks are dense, or have
convolutions before their dense layers (`training.convolutions`).

XLA fuses the masks and the updates, long chains of elementwise work. Given everything it is five times slower on a CPU
than TensorFlow's own kernels, since its batched products are.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, pairwise
from typing import Any, Literal

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from training.convolutions import (
    Convolution,
    convolutions,
    convolved,
    input_gradients,
    kernel_gradients,
    pooled,
    unpooled,
)
from training.recipes import Recipe
from training.threefry import threefry

# What a random word is for: the second half of its key. MASK and DRAW are followed by their dropout site.
SHUFFLE, MASK, DRAW = 0, 1 << 16, 2 << 16
# Keras's own constants of Adam and MaxNorm.
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-7
# Replicas trained at once: fewer leave the products small, more push weights and gradients out of the caches.
STACK = 100
# The same of networks with convolutions: each has operations of its own in the graph. And floats of one activation.
CONVOLUTIONAL_STACK, TRAIN_FLOATS = 25, 2**24
# Floats of one activation while predicting.
PREDICT_FLOATS = 2**22
# Epochs between two looks from outside: progress, curves, time limits.
BLOCK_EPOCHS = 25

Head = Literal["sigmoid", "softmax", "linear"]


class NotStackable(Exception):
    """Replicas of one stack must share architecture, widths, optimizer and batch size."""


@dataclass(frozen=True)
class Replica:
    """One network to train."""

    recipe: Recipe
    # Rows of the data that train it, int64 [n].
    train_rows: NDArray[np.int64]
    # Which encoding of the rows it sees: an index into the leading axis of `Rows.x`.
    group: int = 0
    # Of its initial weights, shuffles and masks: 0 .. 2**32 - 1.
    seed: int = 0
    # Rows whose loss, dropout off, stops it early; None for none.
    stop_rows: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Rows:
    """The data in as many encodings as there are groups: each fitted on other training rows."""

    # float32 [groups, N, F].
    x: NDArray[np.float32]
    # float32 [groups, N]: class indices, or a target in units of each group's own training rows.
    y: NDArray[np.float32]
    head: Head
    # Units of the output layer.
    outputs: int = 1
    # Height, width and channels where rows are images: F is their product.
    image: tuple[int, int, int] | None = None
    # Of each group: its own features, which come first; those behind them are zeros in every row. None: all F.
    features: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _Net:
    """What fixes the graph."""

    replicas: int
    convolutions: tuple[Convolution, ...]
    # Units of each site, and of the output: what a convolution gives counts as a layer's units.
    widths: tuple[int, ...]
    head: Head
    optimizer: Literal["sgd", "adam"]
    batch_size: int
    steps: int
    # For each dropout site, visible first: whether any replica uses it.
    sites: tuple[bool, ...]
    # Whether replicas differ in their own features.
    ragged: bool
    bounded: bool
    # Epochs without improvement that stop a replica; None: no replica is watched.
    patience: int | None

    @property
    def units(self) -> tuple[int, ...]:
        """Units of each site: the inputs, the convolutions behind their pooling, the hidden layers."""
        return self.widths[:-1]


@dataclass(frozen=True)
class Trained:
    """The stack after training."""

    rows: Rows
    replicas: tuple[Replica, ...]
    # Alternately kernels [R, in, out] and biases [R, 1, out]; `in` of a convolution is [3, 3, channels], flat.
    weights: list[NDArray[np.float32]]
    # Mean training loss of each epoch, dropout on: [R, epochs]; NaN after a replica's last.
    losses: NDArray[np.float32]
    # Epochs that each replica trained, [R].
    epochs: NDArray[np.int64]

    def keras_weights(self, replica: int) -> list[NDArray[np.float32]]:
        """Kernel, bias, kernel, bias, ... of one replica, as Keras's Conv2D and Dense layers hold them."""
        own = [value[replica, 0] if bias else value[replica] for value, bias in zip(self.weights, cycle([False, True]))]
        for number, layer in enumerate(self._convolutions):
            own[2 * number] = own[2 * number].reshape(layer.kernel_shape)
        if not self._convolutions:
            own[0] = own[0][: _features(self.rows, self.replicas)[replica]]
        return own

    @property
    def _convolutions(self) -> tuple[Convolution, ...]:
        return _convolutions(self.rows, self.replicas[0].recipe)

    def predict(self, rows: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        """Dropout off. For each replica's rows [n]: [n, outputs], after the head's activation."""
        return [answer[0] for answer in self._answers(rows, None)]

    def loss(self, rows: Sequence[NDArray[np.int64]]) -> list[float]:
        """Mean loss of each replica on its rows, dropout off."""
        index = _flat_rows(self.rows, self.replicas, rows)
        y = self.rows.y.reshape(-1)[index]
        logits = self._logits(index, None)[:, 0]
        losses = _loss(tf.constant(logits), tf.constant(y), self.rows.head)[0].numpy()
        return [float(values[: len(own)].mean()) for values, own in zip(losses, rows, strict=True)]

    def draws(self, rows: Sequence[NDArray[np.int64]], num_samples: int) -> list[NDArray[np.float32]]:
        """Monte Carlo dropout: [num_samples, n, outputs] for each replica. A draw's masks are the same for all rows."""
        return self._answers(rows, num_samples)

    def _answers(self, rows: Sequence[NDArray[np.int64]], num_samples: int | None) -> list[NDArray[np.float32]]:
        logits = self._logits(_flat_rows(self.rows, self.replicas, rows), num_samples)
        activation = {"sigmoid": tf.sigmoid, "softmax": tf.nn.softmax, "linear": tf.identity}[self.rows.head]
        answer = activation(logits).numpy()
        return [values[:, : len(own)] for values, own in zip(answer, rows, strict=True)]

    def _logits(self, index: NDArray[np.int32], num_samples: int | None) -> NDArray[np.float32]:
        """Row numbers [R, n] of all groups' rows. Returns [R, draws, n, outputs]; dropout off is one draw.

        In pieces: a few operations on much at once, whose shapes change from call to call.
        """
        features = tf.constant(self.rows.x.reshape(-1, self.rows.x.shape[-1]))
        weights = [tf.constant(value) for value in self.weights]
        layers = self._convolutions
        units = _widths(self.rows, self.replicas[0].recipe)[:-1]
        rates, seeds = tf.constant(_rates(self.replicas, layers)), tf.constant(_seeds(self.replicas))
        words = _words(self.rows, self.replicas) if _is_ragged(self.rows, self.replicas) else None
        floats = len(self.replicas) * max(*units, self.rows.outputs, *(layer.activations for layer in layers))
        at_once = max(1, min(index.shape[1], PREDICT_FLOATS // floats))
        step = max(1, PREDICT_FLOATS // (floats * at_once))
        draws = 1 if num_samples is None else num_samples
        logits = np.empty((*index.shape[:1], draws, index.shape[1], self.rows.outputs), np.float32)
        for first in range(0, draws, step):
            count = min(step, draws - first)
            masks = None if num_samples is None else _draw_masks(seeds, rates, tf.constant(first), count, units, words)
            for row in range(0, index.shape[1], at_once):
                x = tf.gather(features, index[:, None, row : row + at_once])
                own = _logits(x, weights, masks, layers)
                logits[:, first : first + count, row : row + at_once] = own.numpy()
        return logits


# Called after each block of epochs with the epochs done and the stack so far; answering False ends the training.
OnBlock = Callable[[int, Callable[[], Trained]], bool | None]


def train_stack(
    rows: Rows,
    replicas: Sequence[Replica],
    *,
    weights: list[NDArray[np.float32]] | None = None,
    patience: int | None = None,
    on_block: OnBlock | None = None,
    block_epochs: int = BLOCK_EPOCHS,
) -> Trained:
    """Train all replicas at once. Raises NotStackable.

    weights: initial ones as in `Trained.weights`; default: Keras's own (Glorot uniform, zero biases) by each seed.
    patience: early stopping of the replicas that have `stop_rows`, with the best epoch's weights restored, as Keras's
    `EarlyStopping(patience=patience, restore_best_weights=True)` on the loss of those rows.
    """
    replicas = tuple(replicas)
    net = _net(rows, replicas, patience)
    constants = _constants(rows, replicas, net)
    if weights is None:
        seeds = [replica.seed for replica in replicas]
        weights = initial_weights(net.widths, seeds, net.convolutions, _features(rows, replicas))
    state = _initial_state(net, weights)
    longest = max(replica.recipe.epochs for replica in replicas)
    with _ONE_GRAPH:
        run = _runner(net)
    losses: list[NDArray[np.float32]] = []

    def trained() -> Trained:
        final = state["best"] if net.patience is not None else state["weights"]
        return Trained(
            rows,
            replicas,
            [value.numpy() for value in final],
            np.concatenate(losses).T if losses else np.zeros((len(replicas), 0), np.float32),
            state["epochs"].numpy().astype(np.int64),
        )

    done = 0
    while done < longest:
        count = min(block_epochs, longest - done)
        state, block = run(state, constants, tf.constant(done), tf.constant(count))
        losses.append(block.numpy())
        done += count
        if on_block is not None and on_block(done, trained) is False:
            break
        if net.patience is not None and not bool(tf.reduce_any(state["running"])):
            break
    return trained()


def initial_weights(
    widths: Sequence[int],
    seeds: Sequence[int],
    layers: Sequence[Convolution] = (),
    features: Sequence[int] | None = None,
) -> list[NDArray[np.float32]]:
    """Glorot uniform kernels and zero biases for each seed: what Keras's Conv2D and Dense begin with.

    widths: units of the inputs and of every layer, of which the first ones are the convolutions `layers`.
    features: of each seed's inputs those that are its own; no weight stands behind the others.
    """
    generators = [np.random.default_rng(seed) for seed in seeds]
    weights: list[NDArray[np.float32]] = []
    for number, (inputs, units) in enumerate(pairwise(widths)):
        shape, fan_out = (inputs, units), units
        if number < len(layers):
            layer = layers[number]
            shape, fan_out = (layer.fan_in, layer.filters), layer.fan_out
        kernels = np.zeros((len(seeds), *shape), np.float32)
        for place, generator in enumerate(generators):
            fan_in = shape[0] if number or features is None or layers else features[place]
            limit = math.sqrt(6 / (fan_in + fan_out))
            kernels[place, :fan_in] = generator.uniform(-limit, limit, (fan_in, shape[1]))
        weights += [kernels, np.zeros((len(seeds), 1, shape[1]), np.float32)]
    return weights


def most_at_once(recipe: Recipe, image: tuple[int, ...] | None) -> int:
    """Replicas that are best trained in one stack; 0 where even one has activations that are too large, or a variance
    head.

    image: height, width, channels of the rows; None where they are no images.
    """
    if recipe.heteroscedastic:
        return 0
    if recipe.architecture == "dense" or image is None:
        return STACK
    height, width, channels = image
    widest = max(layer.activations for layer in convolutions((height, width, channels)))
    return min(CONVOLUTIONAL_STACK, TRAIN_FLOATS // (recipe.batch_size * widest))


# What a replica meets in training, for whoever wants to follow it: its batches and its masks.


def orders(seeds: tf.Tensor, epoch: tf.Tensor, counts: tf.Tensor, width: int) -> tf.Tensor:
    """The order in which each replica's rows are used: int32 [R, width].

    Places 0 .. counts - 1 hold a permutation of the same numbers, the rest is padding. seeds uint32 [R], counts [R].
    """
    places = tf.range(width)
    words, _ = threefry((seeds[:, None], tf.constant(SHUFFLE, tf.uint32)), (_word(places)[None], _word(epoch)))
    keys = tf.cast(tf.bitwise.right_shift(words, tf.constant(1, tf.uint32)), tf.int32)
    keys = tf.where(places[None] < counts[:, None], keys, tf.int32.max)
    return tf.argsort(keys, axis=1, stable=True)


def mask_bits(
    seeds: tf.Tensor, site: int, steps: tf.Tensor, rows: int, units: int, words: tf.Tensor | None = None
) -> tf.Tensor:
    """Uniform 16-bit numbers, uint16 [R, rows, units], for one dropout site in one step of training.

    site: 0 for the visible layer, then the hidden ones. steps [R]: each replica's own steps before this one.
    words: as `_half_words` takes them.
    """
    return _half_words(seeds, MASK + site, steps[:, None], rows, units, words)[:, 0]


def thresholds(rates: tf.Tensor) -> tf.Tensor:
    """A unit is dropped where its 16-bit number is below this: int32."""
    return tf.cast(tf.round(rates * 65536.0), tf.int32)


def _half_words(
    seeds: tf.Tensor, purpose: int, numbers: tf.Tensor, places: int, units: int, words: tf.Tensor | None = None
) -> tf.Tensor:
    """Uniform 16-bit numbers, uint16 [R, M, places, units], fixed by each number. numbers [R or 1, M].

    words: int32 [R], the pairs of words that the replica's own units of a place take, `_pairs` of them, where some have
    fewer than `units`: their numbers are then what they are without the others, and those behind them mean nothing.
    """
    most = _pairs(units)
    if words is None:
        indices = tf.range(places * most)[None, None]
        key = (seeds[:, None, None], tf.constant(purpose, tf.uint32))
        pair = threefry(key, (_word(indices), _word(numbers)[..., None]))
        shape = (-1, numbers.shape[1], places, most)
        both = tf.concat([tf.reshape(word, shape) for word in pair], axis=3)
    else:
        # A place has the first words of its pairs, and then the second ones.
        at, own = tf.range(2 * most), words[:, None, None, None]
        is_second = at >= own
        indices = tf.range(places)[:, None] * own + tf.where(is_second, at - own, at)
        key = (seeds[:, None, None, None], tf.constant(purpose, tf.uint32))
        pair = threefry(key, (_word(indices), _word(numbers)[..., None, None]))
        both = tf.where(is_second, pair[1], pair[0])
    return tf.reshape(tf.bitcast(both, tf.uint16), (-1, numbers.shape[1], places, 4 * most))[..., :units]


def _pairs(units: int) -> int:
    """Pairs of words for so many 16-bit numbers."""
    return -(-units // 4)


def _word(value: tf.Tensor) -> tf.Tensor:
    return tf.cast(value, tf.uint32)


# The arrays of a stack.


def _net(rows: Rows, replicas: Sequence[Replica], patience: int | None) -> _Net:
    shared = {
        (one.recipe.architecture, one.recipe.hidden_units, one.recipe.optimizer, one.recipe.batch_size)
        for one in replicas
    }
    if len(shared) != 1:
        raise NotStackable(f"{len(shared)} kinds of networks in one stack; wanted one")
    [(architecture, hidden_units, optimizer, batch_size)] = shared
    if architecture == "convolutional" and rows.image is None:
        raise NotStackable("convolutional networks on rows that are no images")
    layers = _convolutions(rows, replicas[0].recipe)
    rates = _rates(replicas, layers)
    return _Net(
        replicas=len(replicas),
        convolutions=layers,
        widths=_widths(rows, replicas[0].recipe),
        head=rows.head,
        optimizer=optimizer,
        batch_size=batch_size,
        steps=max(-(-len(one.train_rows) // batch_size) for one in replicas),
        sites=tuple(bool(used) for used in np.any(rates > 0, axis=0).tolist()),
        ragged=_is_ragged(rows, replicas),
        bounded=bool(hidden_units) and any(one.recipe.max_norm is not None for one in replicas),
        patience=patience if any(one.stop_rows is not None for one in replicas) else None,
    )


def _convolutions(rows: Rows, recipe: Recipe) -> tuple[Convolution, ...]:
    return convolutions(rows.image) if recipe.architecture == "convolutional" and rows.image is not None else ()


def _widths(rows: Rows, recipe: Recipe) -> tuple[int, ...]:
    layers = _convolutions(rows, recipe)
    return (rows.x.shape[-1], *(layer.outputs for layer in layers), *recipe.hidden_units, rows.outputs)


def _features(rows: Rows, replicas: Sequence[Replica]) -> list[int]:
    """Each replica's own features."""
    return [rows.x.shape[-1] if rows.features is None else rows.features[one.group] for one in replicas]


def _is_ragged(rows: Rows, replicas: Sequence[Replica]) -> bool:
    return set(_features(rows, replicas)) != {rows.x.shape[-1]}


def _words(rows: Rows, replicas: Sequence[Replica]) -> tf.Tensor:
    """Of the visible layer's masks, as `_half_words` takes them."""
    return tf.constant([_pairs(own) for own in _features(rows, replicas)], tf.int32)


def _rates(replicas: Sequence[Replica], layers: Sequence[Convolution]) -> NDArray[np.float32]:
    """[R, sites]: the visible layer, then each convolution and hidden layer."""
    return np.array(
        [
            (one.recipe.visible_dropout, *[one.recipe.hidden_dropout] * (len(layers) + len(one.recipe.hidden_units)))
            for one in replicas
        ],
        np.float32,
    )


def _seeds(replicas: Sequence[Replica]) -> NDArray[np.uint32]:
    return np.array([one.seed for one in replicas], np.uint32)


def _flat_rows(rows: Rows, replicas: Sequence[Replica], own: Sequence[NDArray[np.int64] | None]) -> NDArray[np.int32]:
    """Row numbers of `Rows.x` with its groups end to end: [R, the most], padded by each replica's first row of all."""
    width = max(1, *(0 if index is None else len(index) for index in own))
    flat = np.zeros((len(replicas), width), np.int32)
    for number, index in enumerate(own):
        if index is not None:
            flat[number, : len(index)] = index
    groups = np.array([replica.group for replica in replicas], np.int32)
    return flat + groups[:, None] * rows.x.shape[1]


def _constants(rows: Rows, replicas: Sequence[Replica], net: _Net) -> dict[str, Any]:
    def column(values: Sequence[float] | NDArray[np.float32]) -> tf.Tensor:
        return tf.constant(np.array(values, np.float32)[:, None, None])

    train = _flat_rows(rows, replicas, [one.train_rows for one in replicas])
    train = np.pad(train, ((0, 0), (0, net.steps * net.batch_size - train.shape[1])))
    stop = [one.stop_rows for one in replicas]
    rates = _rates(replicas, net.convolutions)
    return {
        "x": tf.constant(rows.x.reshape(-1, rows.x.shape[-1])),
        "y": tf.constant(rows.y.reshape(-1)),
        "train": tf.constant(train),
        "counts": tf.constant([len(one.train_rows) for one in replicas], tf.int32),
        "stop": tf.constant(_flat_rows(rows, replicas, stop)),
        "stop_counts": tf.constant([0 if index is None else len(index) for index in stop], tf.int32),
        "seeds": tf.constant(_seeds(replicas)),
        "words": _words(rows, replicas),
        "epochs": tf.constant([one.recipe.epochs for one in replicas], tf.int32),
        "learning_rate": column([one.recipe.learning_rate for one in replicas]),
        "momentum": column([one.recipe.momentum for one in replicas]),
        "max_norm": column([math.inf if one.recipe.max_norm is None else one.recipe.max_norm for one in replicas]),
        # For each site [R, 1, 1].
        "thresholds": [thresholds(column(own)) for own in rates.T],
        "scales": [column(1 / (1 - own)) for own in rates.T],
    }


def _initial_state(net: _Net, weights: list[NDArray[np.float32]]) -> dict[str, Any]:
    tensors = [tf.constant(value) for value in weights]
    count = len(weights[0])
    zeros = [tf.zeros_like(value) for value in tensors]
    return {
        "weights": tensors,
        "slots": [zeros, zeros] if net.optimizer == "adam" else [zeros],
        "updates": tf.zeros((count, 1, 1)),
        "epochs": tf.zeros(count, tf.int32),
        "running": tf.ones(count, tf.bool),
        "best": tensors if net.patience is not None else [],
        "best_loss": tf.fill([count], math.inf),
        "wait": tf.zeros(count, tf.int32),
    }


# The graph.

# Stacks that begin at once share one: `lru_cache` alone would make one for each of them.
_ONE_GRAPH = threading.Lock()


@lru_cache(maxsize=64)
def _runner(net: _Net) -> Callable[..., tuple[dict[str, Any], tf.Tensor]]:
    """A function (state, constants, first epoch, epochs) -> (state, losses [epochs, R])."""
    fused = tf.function(jit_compile=True)
    layers, first_dense = len(net.widths) - 1, len(net.convolutions)

    @fused
    def step_masks(
        seeds: tf.Tensor, words: tf.Tensor, steps: tf.Tensor, limits: Any, scales: Any
    ) -> list[tf.Tensor | None]:
        bits = [
            mask_bits(seeds, site, steps, net.batch_size, units, words if net.ragged and site == 0 else None)
            if on
            else None
            for site, (units, on) in enumerate(zip(net.units, net.sites, strict=True))
        ]
        return [
            None if own is None else tf.where(tf.cast(own, tf.int32) >= limit, scale, 0.0)
            for own, limit, scale in zip(bits, limits, scales, strict=True)
        ]

    def hidden(products: tf.Tensor, bias: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
        active = tf.nn.relu(products + bias)
        return active if mask is None else active * mask

    def pool(products: tf.Tensor, bias: tf.Tensor, mask: tf.Tensor | None, layer: Convolution) -> tf.Tensor:
        """The rectifier behind the pooling, where there is a quarter to rectify: the largest stays the largest."""
        active = tf.nn.relu(pooled(products, layer) + bias)
        active = tf.reshape(active, [net.replicas, net.batch_size, layer.outputs])
        return active if mask is None else active * mask

    def output(products: tf.Tensor, bias: tf.Tensor, y: tf.Tensor, valid: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        losses, gradient = _loss(products + bias, y, net.head)
        count = tf.maximum(tf.reduce_sum(valid, axis=1), 1.0)
        return gradient * (valid / count[:, None])[..., None], tf.reduce_sum(losses * valid, axis=1)

    def behind(gradient: tf.Tensor, active: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
        """Back through dropout and the rectifier: both pass only where the unit's activity is above 0."""
        return tf.where(active > 0, gradient if mask is None else gradient * mask, 0.0)

    @fused
    def unpool(products: tf.Tensor, gradient: tf.Tensor, number: int) -> tf.Tensor:
        return unpooled(products, gradient, net.convolutions[number])

    def of_weights(layer: int, active: tf.Tensor, gradient: tf.Tensor, products: tf.Tensor | None) -> Any:
        """Gradients of a layer's kernel and bias, and that by its products where it is a convolution."""
        if layer >= first_dense:
            kernel = tf.matmul(active, gradient, transpose_a=True)
            return kernel, tf.reduce_sum(gradient, axis=1, keepdims=True), gradient
        own = net.convolutions[layer]
        bias = tf.reduce_sum(tf.reshape(gradient, [net.replicas, -1, own.filters]), axis=1, keepdims=True)
        gradient = unpool(products, gradient, layer)
        return kernel_gradients(active, gradient, own), bias, gradient

    def of_inputs(layer: int, kernels: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
        if layer >= first_dense:
            return tf.matmul(gradient, kernels, transpose_b=True)
        return input_gradients(kernels, gradient, net.convolutions[layer])

    @fused
    def sgd(
        weights: list[tf.Tensor], slots: Any, gradients: list[tf.Tensor], rate: tf.Tensor, momentum: tf.Tensor, on: Any
    ) -> Any:
        [velocities] = slots
        moved = [
            momentum * velocity - rate * gradient for velocity, gradient in zip(velocities, gradients, strict=True)
        ]
        new = [tf.where(on, value + move, value) for value, move in zip(weights, moved, strict=True)]
        return new, [_where(on, moved, velocities)]

    @fused
    def adam(
        weights: list[tf.Tensor], slots: Any, gradients: list[tf.Tensor], rate: tf.Tensor, updates: tf.Tensor, on: Any
    ) -> Any:
        rate = rate * tf.sqrt(1 - tf.pow(BETA_2, updates)) / (1 - tf.pow(BETA_1, updates))
        first = [old + (g - old) * (1 - BETA_1) for old, g in zip(slots[0], gradients, strict=True)]
        second = [old + (tf.square(g) - old) * (1 - BETA_2) for old, g in zip(slots[1], gradients, strict=True)]
        moved = [value - m * rate / (tf.sqrt(v) + EPSILON) for value, m, v in zip(weights, first, second, strict=True)]
        return _where(on, moved, weights), [_where(on, first, slots[0]), _where(on, second, slots[1])]

    @fused
    def shrink(kernels: list[tf.Tensor], squares: list[tf.Tensor], bound: tf.Tensor, on: tf.Tensor) -> list[tf.Tensor]:
        """Keras's MaxNorm."""
        norms = [tf.sqrt(value) for value in squares]
        factors = [tf.where(on & tf.math.is_finite(bound), tf.minimum(n, bound) / (EPSILON + n), 1.0) for n in norms]
        return [kernel * factor for kernel, factor in zip(kernels, factors, strict=True)]

    def step(state: dict[str, Any], c: dict[str, Any], index: tf.Tensor, valid: tf.Tensor, number: tf.Tensor) -> Any:
        weights = state["weights"]
        masks: list[tf.Tensor | None] = [None] * layers
        if any(net.sites):
            masks = step_masks(c["seeds"], c["words"], number, c["thresholds"], c["scales"])
        values = tf.gather(c["x"], index)
        active = [values if masks[0] is None else values * masks[0]]
        products: list[tf.Tensor | None] = [None] * layers
        for layer, (kernels, bias) in enumerate(zip(weights[0:-2:2], weights[1:-2:2], strict=True)):
            if layer < first_dense:
                own = net.convolutions[layer]
                products[layer] = convolved(active[-1], kernels, own)
                active.append(pool(products[layer], bias, masks[layer + 1], own))
            else:
                active.append(hidden(active[-1] @ kernels, bias, masks[layer + 1]))
        gradient, loss = output(active[-1] @ weights[-2], weights[-1], tf.gather(c["y"], index), valid)
        gradients: list[tf.Tensor] = []
        for layer in reversed(range(layers)):
            kernel, bias, gradient = of_weights(layer, active[layer], gradient, products[layer])
            gradients = [kernel, bias, *gradients]
            if layer:
                gradient = behind(of_inputs(layer, weights[2 * layer], gradient), active[layer], masks[layer])
        on = (tf.reduce_any(valid > 0, axis=1) & state["running"])[:, None, None]
        updates = state["updates"] + tf.cast(on, tf.float32)
        if net.optimizer == "sgd":
            new, slots = sgd(weights, state["slots"], gradients, c["learning_rate"], c["momentum"], on)
        else:
            new, slots = adam(weights, state["slots"], gradients, c["learning_rate"], updates, on)
        if net.bounded:
            hidden_kernels = new[2 * first_dense : -2 : 2]
            squares = [tf.reduce_sum(tf.square(kernel), axis=1, keepdims=True) for kernel in hidden_kernels]
            new[2 * first_dense : -2 : 2] = shrink(hidden_kernels, squares, c["max_norm"], on)
        return state | {"weights": new, "slots": slots, "updates": updates}, loss

    def stop_early(state: dict[str, Any], c: dict[str, tf.Tensor]) -> dict[str, Any]:
        """Keras's EarlyStopping, for the replicas that have rows for it; the others keep their last weights."""
        valid = tf.cast(tf.range(c["stop"].shape[1])[None] < c["stop_counts"][:, None], tf.float32)
        answer = _logits(tf.gather(c["x"], c["stop"])[:, None], state["weights"], None, net.convolutions)[:, 0]
        losses, _ = _loss(answer, tf.gather(c["y"], c["stop"]), net.head)
        watched = c["stop_counts"] > 0
        loss = tf.math.divide_no_nan(tf.reduce_sum(losses * valid, axis=1), tf.reduce_sum(valid, axis=1))
        better = state["running"] & ((loss < state["best_loss"]) | ~watched)
        wait = tf.where(better, 0, state["wait"] + 1)
        return state | {
            "best": [
                tf.where(better[:, None, None], new, old)
                for new, old in zip(state["weights"], state["best"], strict=True)
            ],
            "best_loss": tf.where(better, loss, state["best_loss"]),
            "wait": wait,
            "running": state["running"] & (~watched | (wait < net.patience)),
        }

    @tf.function(reduce_retracing=True)
    def run(state: dict[str, Any], c: dict[str, tf.Tensor], first: tf.Tensor, count: tf.Tensor) -> Any:
        replicas, width = net.replicas, net.steps * net.batch_size
        own_steps = -(-c["counts"] // net.batch_size)
        places = tf.range(net.batch_size)[None]

        def epoch(number: tf.Tensor, state: dict[str, Any], losses: tf.TensorArray) -> Any:
            state = state | {"running": state["running"] & (number < c["epochs"])}
            rows = tf.gather(c["train"], orders(c["seeds"], number, c["counts"], width), batch_dims=1)

            def one(at: tf.Tensor, state: dict[str, Any], total: tf.Tensor) -> Any:
                index = tf.slice(rows, [0, at * net.batch_size], [replicas, net.batch_size])
                valid = tf.cast(at * net.batch_size + places < c["counts"][:, None], tf.float32)
                state, loss = step(state, c, index, valid, number * own_steps + at)
                return at + 1, state, total + loss

            _, state, total = tf.while_loop(
                lambda at, *_: at < net.steps, one, (0, state, tf.zeros(replicas)), parallel_iterations=1
            )
            mean = tf.where(state["running"], total / tf.cast(c["counts"], tf.float32), math.nan)
            state = state | {"epochs": state["epochs"] + tf.cast(state["running"], tf.int32)}
            if net.patience is not None:
                state = stop_early(state, c)
            return number + 1, state, losses.write(number - first, mean)

        _, state, losses = tf.while_loop(
            lambda number, *_: number < first + count,
            epoch,
            (first, state, tf.TensorArray(tf.float32, count, element_shape=[replicas])),
            parallel_iterations=1,
        )
        return state, losses.stack()

    return run


def _where(condition: tf.Tensor, values: list[tf.Tensor], others: list[tf.Tensor]) -> list[tf.Tensor]:
    return [tf.where(condition, value, other) for value, other in zip(values, others, strict=True)]


def _loss(logits: tf.Tensor, y: tf.Tensor, head: str) -> tuple[tf.Tensor, tf.Tensor]:
    """Loss of each row, and its gradient by the logits. logits [R, rows, outputs], y [R, rows]."""
    if head == "sigmoid":
        z = logits[..., 0]
        losses = tf.nn.relu(z) - z * y + tf.math.log1p(tf.exp(-tf.abs(z)))
        return losses, tf.sigmoid(logits) - y[..., None]
    if head == "softmax":
        one_hot = tf.one_hot(tf.cast(y, tf.int32), logits.shape[-1])
        logs = tf.nn.log_softmax(logits)
        return -tf.reduce_sum(one_hot * logs, axis=-1), tf.exp(logs) - one_hot
    error = logits - y[..., None]
    return tf.square(error[..., 0]), 2 * error


def _logits(
    x: tf.Tensor, weights: Sequence[tf.Tensor], masks: Sequence[tf.Tensor] | None, layers: Sequence[Convolution]
) -> tf.Tensor:
    """x [R, 1, rows, F], masks [R, draws, units] for each site. Returns [R, draws, rows, outputs]."""
    for number, (kernels, bias) in enumerate(zip(weights[::2], weights[1::2], strict=True)):
        if masks is not None:
            x = x * masks[number][:, :, None, :]
        if number < len(layers):
            layer, (replicas, draws) = layers[number], x.shape[:2]
            products = convolved(tf.reshape(x, [replicas, -1, layer.inputs]), kernels, layer)
            x = tf.reshape(pooled(products, layer) + bias, [replicas, draws, -1, layer.outputs])
        else:
            x = x @ kernels[:, None] + bias[:, None]
        if number < len(weights) // 2 - 1:
            x = tf.nn.relu(x)
    return x


def _draw_masks(
    seeds: tf.Tensor, rates: tf.Tensor, first: tf.Tensor, count: int, units: tuple[int, ...], words: tf.Tensor | None
) -> list[tf.Tensor]:
    """Masks of draws first .. first + count - 1, [R, count, units] for each site. words: of the visible layer."""
    masks = []
    for site, width in enumerate(units):
        own = words if site == 0 else None
        bits = _half_words(seeds, DRAW + site, (first + tf.range(count))[None], 1, width, own)[:, :, 0]
        rate = rates[:, site, None, None]
        masks.append(tf.where(tf.cast(bits, tf.int32) >= thresholds(rate), 1 / (1 - rate), 0.0))
    return masks
