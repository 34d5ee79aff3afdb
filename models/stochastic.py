"""Stochastic Keras layers: finding them, refusing what cannot be honoured, and drawing their noise.

`attach(model)` turns the stochastic layers of a model (a private copy) into *drawn* layers: outside a `Draws` context
they are exactly Keras's layers in inference mode; inside one they apply noise that depends on (seed, layer, draw) and
on nothing else. One row of noise serves every row of data.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from models import random_stream
from models.contract import ArtifactError, StochasticLayer

# SELU's constants, as in Keras's AlphaDropout (Klambauer et al. 2017).
_ALPHA_PRIME = -1.6732632423543772848170429916717 * 1.0507009873554804934193349852946

# Stream number = layer << 24 | call << 8 | part: a shared layer has fresh noise at each of its calls, as in Keras.
_LAYER_SHIFT, _CALL_SHIFT = 24, 8
_RECURRENT_PART = 128

Size: TypeAlias = "int | tf.Tensor"


@dataclass(frozen=True)
class Noise:
    """One array of noise, drawn anew for each draw: what it is, not its values."""

    stream: int
    kind: str  # "keep": 0 or `scale`; "normal": standard normal
    rate: float
    scale: float
    shape: tuple[Size, ...]  # of one draw
    # Of the last axis with zeros behind, for a layer whose units are padded; None without.
    width: int | None = None

    @property
    def layer(self) -> int:
        """The number of the layer that draws it."""
        return self.stream >> _LAYER_SHIFT

    @property
    def is_static(self) -> bool:
        return all(isinstance(size, int) for size in self.shape)

    @property
    def size(self) -> Size:
        if self.is_static:
            return math.prod(self.shape)
        return tf.reduce_prod(tf.stack([tf.cast(size, tf.int32) for size in self.shape]))

    @property
    def padded_shape(self) -> tuple[Size, ...]:
        return self.shape if self.width is None else (*self.shape[:-1], self.width)

    def draw(self, seed: tf.Tensor, first_draw: tf.Tensor, num_draws: tf.Tensor) -> tf.Tensor:
        """The noise of draws first_draw .. first_draw + num_draws - 1: float32 [num_draws, *padded_shape]."""
        size = tf.convert_to_tensor(self.size, tf.int32)
        if self.kind == "normal":
            flat = random_stream.normals(seed, self.stream, first_draw, num_draws, size)
        else:
            kept = random_stream.coins(seed, self.stream, first_draw, num_draws, size, self.rate)
            flat = tf.cast(kept, tf.float32)
            if self.scale != 1.0:
                flat = flat * self.scale
        return self._padded(tf.reshape(flat, tf.stack([num_draws, *self.shape])))

    def _padded(self, values: tf.Tensor) -> tf.Tensor:
        if self.width is None:
            return values
        return tf.pad(values, [[0, 0]] * len(self.shape) + [[0, self.width - self.shape[-1]]])

    def balanced(self, seed: int, num_draws: int) -> tf.Tensor:
        """Masks [num_draws, *padded_shape] in which each unit is dropped in exactly its rate's share of the draws.

        Where rate * num_draws is no whole number, each unit's share is rounded up or down at random, so that its rate
        is right on average. Which draws drop a unit is permuted for each unit on its own. Only for kind "keep".
        """
        size = tf.constant(self.size)
        seed_tensor, zero = tf.constant(seed, tf.int64), tf.constant(0)
        order = random_stream.words(seed_tensor, self.stream, zero, tf.constant(num_draws + 1), size).numpy()
        rounding = order[-1] / 2.0**32
        dropped = np.floor(self.rate * num_draws + rounding)
        rank = order[:-1].argsort(axis=0, kind="stable").argsort(axis=0, kind="stable")
        kept = np.where(rank >= dropped, np.float32(self.scale), np.float32(0))
        return self._padded(tf.constant(kept.reshape(num_draws, *self.shape), tf.float32))


class Draws:
    """A run of draws while the stochastic part of a network is traced.

    Tensors inside are *folded*: [rows * draws, ...], row by row. A layer called with `unfolded` set gets [rows, ...].
    """

    def __init__(self, num_draws: tf.Tensor, source: Callable[[Noise], tf.Tensor]) -> None:
        self.num_draws = num_draws
        self.unfolded = False
        self.noises: list[Noise] = []
        self._source = source
        self._calls: dict[int, int] = {}
        # The units of the layer's input and their number with those added, see `padded`.
        self._units: tuple[int, int] | None = None
        self._graph = tf.compat.v1.get_default_graph()
        self.refusal: ArtifactError | None = None

    def refuse(self, reason: str) -> NoReturn:
        """Raise ArtifactError, from within a layer: Keras puts its own words into what passes through its layers."""
        self.refusal = ArtifactError(reason)
        raise self.refusal

    def refuse_loops(self, layer: str) -> None:
        """Raise ArtifactError where the layer is called in a loop: its body is traced once, for all steps."""
        graph: Any = tf.compat.v1.get_default_graph()
        while graph is not None and graph is not self._graph:
            if type(graph).__name__ == "WhileBodyFuncGraph":
                self.refuse(
                    f"layer {layer!r}: it drops anew at each step of a loop (an RNN's, say, whose cell holds it), and "
                    "one mask would serve them all; wanted RNN(..., unroll=True), or the layer outside the loop"
                )
            graph = getattr(graph, "outer_graph", None)

    @contextlib.contextmanager
    def padded(self, units: int, width: int) -> Iterator[None]:
        """Within this context a layer is called whose input has `width` units, of which only the first count."""
        self._units = (units, width) if width != units else None
        try:
            yield
        finally:
            self._units = None

    def sizes(self, x: tf.Tensor) -> list[Size]:
        """Sizes of the layer's input x without the rows' axis and without added units."""
        sizes = row_sizes(x)
        return sizes if self._units is None else [*sizes[:-1], self._units[0]]

    def begin_call(self, layer: int) -> int:
        """Number of this call of the layer within one pass through the network."""
        call = self._calls.get(layer, 0)
        self._calls[layer] = call + 1
        return call

    def noise(
        self, layer: int, call: int, part: int, kind: str, rate: float, scale: float, shape: Sequence[Size]
    ) -> tf.Tensor:
        """Noise of one call of one layer: float32 [draws, *shape], with zeros for the units that were added."""
        stream = layer << _LAYER_SHIFT | call << _CALL_SHIFT | part
        units, width = self._units or (None, None)
        spec = Noise(stream, kind, rate, scale, tuple(shape), width if shape and shape[-1] == units else None)
        self.noises.append(spec)
        return self._source(spec)

    def combine(self, x: tf.Tensor, noise: tf.Tensor, operation: Callable[[Any, Any], Any]) -> tf.Tensor:
        """operation(x, noise), folded; the noise [draws, *shape] is shared over rows, x is as `unfolded` says."""
        per_row, sizes = x.shape[1:], row_sizes(x)
        noise = tf.cast(noise, x.dtype)
        if not self.unfolded:
            apart = tf.reshape(x, tf.stack([-1, self.num_draws, *sizes]))
            result = operation(apart, noise)
        elif noise.shape[1:] == per_row and per_row.is_fully_defined():
            # Copied for each draw first: a product that broadcasts over an inner axis is slower than both.
            result = operation(tf.tile(_flat(x), tf.stack([1, self.num_draws])), tf.reshape(noise, [1, -1]))
        else:
            result = operation(x[:, None], noise)
        folded = tf.reshape(result, tf.stack([-1, *sizes]))
        folded.set_shape([None, *per_row])
        return folded

    def spread(self, noise: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
        """Noise [draws, *shape] as an array of folded x's rows, [rows * draws, *shape], in x's dtype."""
        rows = tf.shape(x)[0] // self.num_draws
        tiled = tf.tile(tf.cast(noise, x.dtype), tf.stack([rows, *[1] * (len(noise.shape) - 1)]))
        tiled.set_shape([None, *x.shape[1:]])
        return tiled


def _flat(x: tf.Tensor) -> tf.Tensor:
    """[rows, ...] of fixed sizes -> [rows, size]."""
    return x if x.shape.rank == 2 else tf.reshape(x, [-1, math.prod(x.shape[1:])])


_active: ContextVar[Draws | None] = ContextVar("draws", default=None)


@contextlib.contextmanager
def drawing(draws: Draws) -> Iterator[Draws]:
    """Within this context the drawn layers apply the noise of `draws`."""
    token = _active.set(draws)
    try:
        yield draws
    except Exception:
        if draws.refusal is not None:
            raise draws.refusal from None
        raise
    finally:
        _active.reset(token)


def row_sizes(x: tf.Tensor) -> list[Size]:
    """Sizes of x without the rows' axis: ints where they are static."""
    dynamic = tf.shape(x)
    return [size if size is not None else dynamic[axis] for axis, size in enumerate(x.shape[1:], start=1)]


class _DrawnElementwise:
    """A layer that applies one array of noise to its input. Also takes an unfolded input (`Draws.unfolded`)."""

    draw_index: int
    name: str

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        draws = _active.get()
        if draws is None:
            return inputs
        draws.refuse_loops(self.name)
        if not inputs.dtype.is_floating:
            draws.refuse(
                f"layer {self.name!r}: its noise falls on numbers of type {inputs.dtype.name}, which Keras does not "
                "train either; wanted floating-point numbers: a cast before it"
            )
        if inputs.shape.rank == 0 or inputs.shape[:1].is_fully_defined():
            draws.refuse(
                f"layer {self.name!r}: its noise falls on a tensor of shape {tuple(inputs.shape)}, without a "
                "rows' axis (weights, say, or each row by itself in vectorized_map); wanted noise on tensors with the "
                "rows first"
            )
        return self.draw(draws, draws.begin_call(self.draw_index), inputs)

    def draw(self, draws: Draws, call: int, x: tf.Tensor) -> tf.Tensor:
        raise NotImplementedError


class _DrawnDropout(_DrawnElementwise):
    rate: float
    noise_shape: tuple[int | None, ...] | None

    def draw(self, draws: Draws, call: int, x: tf.Tensor) -> tf.Tensor:
        noise = draws.noise(
            self.draw_index, call, 0, "keep", self.rate, 1 / (1 - self.rate), self.noise_sizes(draws, x)
        )
        return draws.combine(x, noise, lambda values, keep: values * keep)

    def noise_sizes(self, draws: Draws, x: tf.Tensor) -> list[Size]:
        sizes = draws.sizes(x)
        if self.noise_shape is None:
            return sizes
        # A shorter one is broadcast, as in Keras.
        missing = x.shape.rank - len(self.noise_shape)
        shape = [*[1] * missing, *self.noise_shape][1:]
        return [size if wanted is None else wanted for size, wanted in zip(sizes, shape, strict=True)]


class _DrawnSpatialDropout(_DrawnDropout):
    def noise_sizes(self, draws: Draws, x: tf.Tensor) -> list[Size]:
        return list(self._get_noise_shape(x)[1:])  # type: ignore[attr-defined]


class _DrawnGaussianDropout(_DrawnElementwise):
    rate: float

    def draw(self, draws: Draws, call: int, x: tf.Tensor) -> tf.Tensor:
        stddev = math.sqrt(self.rate / (1 - self.rate))
        noise = draws.noise(self.draw_index, call, 0, "normal", 0.0, 1.0, draws.sizes(x))
        return draws.combine(x, noise, lambda values, normal: values * (1 + stddev * normal))


class _DrawnGaussianNoise(_DrawnElementwise):
    stddev: float

    def draw(self, draws: Draws, call: int, x: tf.Tensor) -> tf.Tensor:
        noise = draws.noise(self.draw_index, call, 0, "normal", 0.0, 1.0, draws.sizes(x))
        return draws.combine(x, noise, lambda values, normal: values + self.stddev * normal)


class _DrawnAlphaDropout(_DrawnDropout):
    def draw(self, draws: Draws, call: int, x: tf.Tensor) -> tf.Tensor:
        # Keeps mean and variance of SELU activations: dropped units become alpha', then an affine correction.
        a = ((1 - self.rate) * (1 + self.rate * _ALPHA_PRIME**2)) ** -0.5
        b = -a * _ALPHA_PRIME * self.rate
        noise = draws.noise(self.draw_index, call, 0, "keep", self.rate, 1.0, self.noise_sizes(draws, x))
        return draws.combine(x, noise, lambda values, keep: values * (a * keep) + (a * _ALPHA_PRIME * (1 - keep) + b))


class _AnyLength:
    """TimeDistributed over an axis of any length. Keras 3.15 makes as many steps in a graph as there are rows."""

    layer: keras.Layer
    name: str

    def call(self, inputs: tf.Tensor, training: bool = False, mask: tf.Tensor | None = None) -> tf.Tensor:
        if inputs.shape[1] is not None:
            return super().call(inputs, training=training, mask=mask)  # type: ignore[misc]
        draws = _active.get()
        if draws is not None and has_drawn(self.layer):
            draws.refuse(
                f"layer {self.name!r}: what drops inside it would drop anew at each step of a free number of steps; "
                "wanted a fixed number, or the dropout outside TimeDistributed, where it drops of every step as well"
            )
        # Without noise every step is as a row of its own.
        options = {"training": False} if self.layer._call_has_training_arg else {}
        if mask is not None and self.layer._call_has_mask_arg:
            options["mask"] = tf.reshape(mask, tf.concat([[-1], tf.shape(mask)[2:]], axis=0))
        steps = tf.reshape(inputs, tf.stack([-1, *row_sizes(inputs)[1:]]))
        steps.set_shape([None, *inputs.shape[2:]])
        outputs = self.layer.call(steps, **options)
        apart = tf.reshape(outputs, tf.stack([-1, tf.shape(inputs)[1], *row_sizes(outputs)]))
        apart.set_shape([None, None, *outputs.shape[1:]])
        return apart


class _MaskedByRow:
    """Softmax with a sequence mask: each row's mask is its own, as Keras has it of a row alone.

    Of several rows Keras 3.15 puts the mask's axes to the last ones of the input: the rows' to that of the units.
    """

    def call(self, inputs: tf.Tensor, mask: tf.Tensor | None = None) -> tf.Tensor:
        missing = 0 if mask is None else inputs.shape.rank - mask.shape.rank
        if mask is not None and missing > 0:
            mask = tf.reshape(mask, tf.stack([tf.shape(mask)[0], *[1] * missing, *row_sizes(mask)]))
        return super().call(inputs, mask=mask)  # type: ignore[misc]


class _DrawnCell:
    """A recurrent cell: masks drawn once a sequence, constant over its steps."""

    draw_index: int
    dropout: float
    recurrent_dropout: float
    _draw_owner: Draws | None = None

    def call(self, inputs: tf.Tensor, states: Any, training: bool = False) -> Any:
        return super().call(inputs, states, training=_active.get() is not None)  # type: ignore[misc]

    def get_dropout_mask(self, step_input: tf.Tensor) -> Any:
        return self._drawn("input", step_input, self.dropout, 0)

    def get_recurrent_dropout_mask(self, step_input: tf.Tensor) -> Any:
        return self._drawn("recurrent", step_input, self.recurrent_dropout, _RECURRENT_PART)

    def reset_dropout_mask(self) -> None:
        self._draw_owner = None

    def reset_recurrent_dropout_mask(self) -> None:
        self._draw_owner = None

    def _drawn(self, which: str, step_input: tf.Tensor, rate: float, part: int) -> Any:
        draws = _active.get()
        if draws is None or not 0 < rate < 1:
            return None
        if self._draw_owner is not draws:
            self._draw_owner = draws
            self._draw_call = draws.begin_call(self.draw_index)
            self._draw_masks: dict[str, Any] = {}
        if which not in self._draw_masks:
            gates = getattr(self, "dropout_mask_count", None)
            masks = [
                draws.spread(
                    draws.noise(
                        self.draw_index,
                        self._draw_call,
                        part + gate,
                        "keep",
                        rate,
                        1 / (1 - rate),
                        row_sizes(step_input),
                    ),
                    step_input,
                )
                for gate in range(gates or 1)
            ]
            self._draw_masks[which] = masks if gates else masks[0]
        return self._draw_masks[which]


class _DrawnAttention:
    """Attention and AdditiveAttention: dropout on the attention weights."""

    draw_index: int
    name: str
    dropout: float

    def _apply_scores(self, scores: Any, value: Any, scores_mask: Any = None, training: bool = False) -> Any:
        draws = _active.get()
        _, weights = super()._apply_scores(scores, value, scores_mask=scores_mask, training=False)  # type: ignore[misc]
        if draws is not None:
            draws.refuse_loops(self.name)
            call = draws.begin_call(self.draw_index)
            rate = self.dropout
            noise = draws.noise(self.draw_index, call, 0, "keep", rate, 1 / (1 - rate), row_sizes(weights))
            weights = draws.combine(weights, noise, lambda values, keep: values * keep)
        return keras.ops.matmul(weights, value), weights


@dataclass(frozen=True)
class _Kind:
    layer: type
    mixin: type
    # Attributes that make the layer stochastic when one of them is positive; also what the manifest reports.
    levels: tuple[str, ...]
    reported: tuple[str, ...] = ()
    # Methods that the mixin replaces: a subclass that overrides one of them has a definition of its own.
    defining: tuple[str, ...] = ("call",)


_CELL_METHODS = ("call", "get_dropout_mask", "get_recurrent_dropout_mask")
_ATTENTION_METHODS = ("_apply_scores",)


@functools.cache
def _kinds() -> tuple[_Kind, ...]:
    # Keras exports no name for the cell of ConvLSTM1D, 2D and 3D.
    conv_lstm_cell = type(keras.layers.ConvLSTM1D(1, 1).cell)
    return (
        *(
            _Kind(layer, _DrawnSpatialDropout, ("rate",), (), ("call", "_get_noise_shape"))
            for layer in (keras.layers.SpatialDropout1D, keras.layers.SpatialDropout2D, keras.layers.SpatialDropout3D)
        ),
        _Kind(keras.layers.Dropout, _DrawnDropout, ("rate",), ("noise_shape",)),
        _Kind(keras.layers.AlphaDropout, _DrawnAlphaDropout, ("rate",), ("noise_shape",)),
        _Kind(keras.layers.GaussianDropout, _DrawnGaussianDropout, ("rate",)),
        _Kind(keras.layers.GaussianNoise, _DrawnGaussianNoise, ("stddev",)),
        *(
            _Kind(layer, _DrawnCell, ("dropout", "recurrent_dropout"), (), _CELL_METHODS)
            for layer in (
                keras.layers.LSTMCell,
                keras.layers.GRUCell,
                keras.layers.SimpleRNNCell,
                conv_lstm_cell,
            )
        ),
        _Kind(keras.layers.AdditiveAttention, _DrawnAttention, ("dropout",), (), _ATTENTION_METHODS),
        _Kind(keras.layers.Attention, _DrawnAttention, ("dropout",), (), _ATTENTION_METHODS),
    )


def _children(layer: keras.Layer) -> list[keras.Layer]:
    if isinstance(layer, keras.Sequential | keras.Model) and layer.layers:
        return list(layer.layers)
    return list(layer._flatten_layers(include_self=False, recursive=False))


def _stable_name(child: keras.Layer, parent: keras.Layer, made: Counter[str]) -> str:
    """The layer's name; where it is a part that its parent made for itself, numbered within the parent and not by
    Keras's process-wide counter.

    made: how many parts of each name the parent had before; counts this one.
    """
    usual = re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", type(child).__name__)).lower()
    if isinstance(parent, keras.Model) or not re.fullmatch(rf"{usual}(_\d+)?", child.name):
        return child.name
    made[usual] += 1
    return usual if made[usual] == 1 else f"{usual}_{made[usual] - 1}"


def walk(model: keras.Layer) -> Iterator[tuple[str, keras.Layer]]:
    """Every layer below `model` once, with its path of names; in an order that the architecture alone fixes."""
    seen: set[int] = set()

    def below(layer: keras.Layer, path: str) -> Iterator[tuple[str, keras.Layer]]:
        made: Counter[str] = Counter()
        for child in _children(layer):
            if id(child) in seen:
                continue
            seen.add(id(child))
            name = _stable_name(child, layer, made)
            child_path = f"{path}/{name}" if path else name
            yield child_path, child
            yield from below(child, child_path)

    return below(model, "")


def _kind_of(layer: keras.Layer, path: str) -> _Kind | None:
    for kind in _kinds():
        if isinstance(layer, kind.layer):
            own = [name for name in kind.defining if getattr(type(layer), name) is not getattr(kind.layer, name)]
            if own:
                raise ArtifactError(
                    f"layer {path!r}: {type(layer).__name__} changes {kind.layer.__name__}'s {own[0]}(); "
                    f"its randomness cannot be reproduced draw by draw: use {kind.layer.__name__} itself"
                )
            return kind
    return None


def _is_augmentation(layer: keras.Layer) -> bool:
    # Random only in training mode, and never part of a served answer.
    return type(layer).__module__.startswith("keras.") and ".preprocessing." in type(layer).__module__


def _without_state(augmentation: keras.Layer) -> None:
    """Some of them (RandomHue, say) draw numbers in inference mode too, where they use none: from a seed that stays."""
    for name, value in list(vars(augmentation).items()):
        if isinstance(value, keras.random.SeedGenerator):
            object.__setattr__(augmentation, name, 0)


def _check_honourable(layer: keras.Layer, path: str) -> None:
    if getattr(layer, "stateful", False):
        raise ArtifactError(
            f"layer {path!r}: {type(layer).__name__} is stateful; an answer would depend on earlier requests: "
            "build it with stateful=False"
        )
    owns_seed = any(isinstance(value, keras.random.SeedGenerator) for value in vars(layer).values())
    if owns_seed:
        raise ArtifactError(
            f"layer {path!r}: {type(layer).__name__} is stochastic (it owns a seed generator) but of no kind that is "
            "known; its draws could not be reproduced: use Keras's own stochastic layers"
        )


def _become(layer: keras.Layer, mixin: type) -> None:
    object.__setattr__(layer, "__class__", type(f"Drawn{type(layer).__name__}", (mixin, type(layer)), {}))


def attach(model: keras.Model) -> list[StochasticLayer]:
    """Turn the active stochastic layers of `model` into drawn layers, in place; return their description.

    `model` must be a private copy. Raises ArtifactError naming the first layer that cannot be honoured, or when no
    layer is active: such a model has no uncertainty to report.
    """
    found: list[StochasticLayer] = []
    idle: list[str] = []
    for path, layer in walk(model):
        if hasattr(layer, "use_cudnn"):
            # The exported graph must run on any device, and one step at a time is where the masks apply.
            layer.use_cudnn = False
        if type(layer) is keras.layers.TimeDistributed:
            _become(layer, _AnyLength)
        if type(layer) is keras.layers.Softmax:
            _become(layer, _MaskedByRow)
        if _is_augmentation(layer):
            _without_state(layer)
            continue
        kind = _kind_of(layer, path)
        if kind is None:
            _check_honourable(layer, path)
            continue
        levels = {name: float(getattr(layer, name) or 0.0) for name in kind.levels}
        if not any(levels.values()):
            idle.append(path)
            continue
        if kind.layer is not keras.layers.GaussianNoise and max(levels.values()) >= 1:
            raise ArtifactError(
                f"layer {path!r}: {type(layer).__name__} drops everything (rate 1); wanted a rate below 1"
            )
        index = len(found)
        layer.draw_index = index
        _become(layer, kind.mixin)
        settings = {
            **levels,
            **{name: getattr(layer, name) for name in kind.reported if getattr(layer, name) is not None},
        }
        found.append(StochasticLayer(index=index, path=path, kind=kind.layer.__name__, settings=settings))
    if not found:
        reason = f"all rates are 0 ({', '.join(idle)})" if idle else "no layer of the network is stochastic"
        raise ArtifactError(
            f"model {model.name!r}: {reason}; without an active dropout layer it has no uncertainty to report: "
            "train it with dropout, or serve it with another tool"
        )
    return found


def is_drawn(layer: Any) -> bool:
    """Whether the layer itself draws noise."""
    return isinstance(layer, _DrawnElementwise | _DrawnCell | _DrawnAttention)


def is_elementwise(layer: Any) -> bool:
    """Whether the layer is drawn and takes unfolded inputs."""
    return isinstance(layer, _DrawnElementwise)


def falls_on_units(layer: Any) -> bool:
    """Whether the layer is drawn and multiplies each number of a row by a mask's own, which is never negative."""
    plain = isinstance(layer, _DrawnDropout) and not isinstance(layer, _DrawnSpatialDropout | _DrawnAlphaDropout)
    return plain and layer.noise_shape is None


def has_drawn(layer: Any) -> bool:
    """Whether the layer, or a layer below it, draws noise."""
    if not isinstance(layer, keras.Layer):
        return False
    return is_drawn(layer) or any(is_drawn(child) for _, child in walk(layer))
