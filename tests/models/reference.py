"""The slow reference: a copy of the network with masks set by hand, run eagerly, one draw and one row at a time.

Every stochastic layer is replaced by one that takes its mask from the NumPy
oracle; the rest is Keras, in inference mode.
"""

import math
import re
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from models.contract import Manifest
from tests.models import oracle

ALPHA_PRIME = -1.7580993408473766


class Hand:
    """Which draw the hand-set layers are at. One for each reference network."""

    def __init__(self, manifest: Manifest) -> None:
        self.paths = {layer.path: layer.index for layer in manifest.stochastic_layers}
        self.seed = self.draw = 0
        self.calls: dict[int, int] = {}

    def index(self, path: str) -> int | None:
        """Number of the layer whose path ends so; None if it is idle."""
        found = [index for known, index in self.paths.items() if f"/{known}".endswith(f"/{path}")]
        assert len(found) < 2, f"{path} is ambiguous"
        return found[0] if found else None

    def begin_call(self, index: int) -> int:
        call = self.calls.get(index, 0)
        self.calls[index] = call + 1
        return call

    def kept(self, index: int, call: int, part: int, shape: Any, rate: float) -> np.ndarray:
        stream = oracle.stream(index, call, part)
        return oracle.kept(self.seed, stream, [self.draw], shape, rate)[0].astype(np.float32)

    def normal(self, index: int, call: int, shape: Any) -> np.ndarray:
        numbers = oracle.normals(self.seed, oracle.stream(index, call), [self.draw], math.prod(shape))
        return numbers[0].reshape(shape)


class HandNoise(layers.Layer):
    """Dropout, SpatialDropout, AlphaDropout, GaussianDropout or GaussianNoise, by its own definition."""

    def __init__(self, original: layers.Layer, hand: Hand, path: str) -> None:
        super().__init__(name=original.name, dtype=original.dtype_policy)
        self.original, self.hand, self.number = original, hand, hand.index(path)
        self.supports_masking = True

    def call(self, x):
        if self.number is None:
            return x
        shape = list(x.shape[1:])
        call = self.hand.begin_call(self.number)
        match self.original:
            case layers.GaussianNoise(stddev=stddev):
                return x + ops.cast(stddev * self.hand.normal(self.number, call, shape), x.dtype)
            case layers.GaussianDropout(rate=rate):
                noise = 1 + math.sqrt(rate / (1 - rate)) * self.hand.normal(self.number, call, shape)
                return x * ops.cast(noise, x.dtype)
            case layers.SpatialDropout1D():
                noise_shape = [1, shape[1]]
            case layers.SpatialDropout2D() | layers.SpatialDropout3D():
                first = self.original.data_format == "channels_first"
                noise_shape = [
                    size if (axis == 0) == first and axis in (0, len(shape) - 1) else 1
                    for axis, size in enumerate(shape)
                ]
            case _ if self.original.noise_shape is not None:
                # A shorter one is broadcast.
                padded = [*[1] * len(shape), *self.original.noise_shape][-len(shape) :]
                pairs = zip(shape, padded, strict=True)
                noise_shape = [size if wanted is None else wanted for size, wanted in pairs]
            case _:
                noise_shape = shape
        rate = self.original.rate
        keep = ops.cast(self.hand.kept(self.number, call, 0, noise_shape, rate), x.dtype)
        if isinstance(self.original, layers.AlphaDropout):
            a = 1 / math.sqrt((1 - rate) * (1 + rate * ALPHA_PRIME**2))
            return a * (x * keep + ALPHA_PRIME * (1 - keep)) - a * ALPHA_PRIME * rate
        return x * keep / (1 - rate)

    def compute_output_shape(self, shape):
        return shape


def _hand_cell(cell: layers.Layer, hand: Hand, path: str) -> layers.Layer:
    """A recurrent cell with the same masks at all steps of a sequence."""

    class HandCell(type(cell)):  # type: ignore[misc]
        masks: dict[str, Any] | None = None

        def call(self, inputs, states, training=False):
            return super().call(inputs, states, training=True)

        def get_dropout_mask(self, step_input):
            return self.mask("input", step_input, self.dropout, 0)

        def get_recurrent_dropout_mask(self, step_input):
            return self.mask("recurrent", step_input, self.recurrent_dropout, 128)

        def reset_dropout_mask(self):
            self.masks = None

        reset_recurrent_dropout_mask = reset_dropout_mask

        def mask(self, which, step_input, rate, part):
            number = hand.index(path)
            gates = getattr(self, "dropout_mask_count", None)
            if rate == 0 or number is None:
                return None
            if not isinstance(step_input.shape[0], int):
                # The network is only being put together.
                return [1.0] * gates if gates else 1.0
            if self.masks is None:
                self.masks = {"call": hand.begin_call(number)}
            if which not in self.masks:
                shape, dtype = step_input.shape[1:], step_input.dtype
                found = [
                    ops.cast(hand.kept(number, self.masks["call"], part + gate, shape, rate) / (1 - rate), dtype)[None]
                    for gate in range(gates or 1)
                ]
                self.masks[which] = found if gates else found[0]
            return self.masks[which]

    config = cell.get_config()
    if type(cell).__name__ == "ConvLSTMCell":
        # Keras leaves it out: only the layer around the cell is ever saved.
        config["rank"] = cell.rank
    return HandCell.from_config(config)


class HandAttention(layers.Layer):
    """Attention and AdditiveAttention without weights, by their formulas; no masks over the sequence."""

    def __init__(self, original: layers.Attention, hand: Hand) -> None:
        super().__init__(name=original.name)
        self.original, self.hand, self.number = original, hand, hand.paths[original.name]

    def call(self, inputs):
        query, value, *rest = inputs
        key = rest[0] if rest else value
        if isinstance(self.original, layers.AdditiveAttention):
            scores = ops.sum(ops.tanh(query[:, :, None] + key[:, None]), axis=-1)
        else:
            scores = ops.matmul(query, ops.transpose(key, (0, 2, 1)))
        weights = ops.softmax(scores)
        keep = self.hand.kept(
            self.number, self.hand.begin_call(self.number), 0, weights.shape[1:], self.original.dropout
        )
        return ops.matmul(weights * keep / (1 - self.original.dropout), value)


class HandSides(layers.Layer):
    """Bidirectional: both directions of a sequence, merged."""

    def __init__(self, original: layers.Bidirectional, sides: list[layers.Layer]) -> None:
        super().__init__(name=original.name)
        self.merge_mode, self.returns_sequences = original.merge_mode, original.return_sequences
        self.forward, self.backward = sides
        self.supports_masking = True

    def build(self, shape):
        self.forward.build(shape)
        self.backward.build(shape)

    def compute_mask(self, inputs, mask=None):
        return mask if self.returns_sequences else None

    def call(self, x, mask=None):
        one, other = self.forward(x, mask=mask), self.backward(x, mask=mask)
        if self.returns_sequences:
            other = ops.flip(other, axis=1)
        return one + other if self.merge_mode == "sum" else ops.concatenate([one, other], axis=-1)


class Reference:
    """The network `model` with the masks of `manifest`'s layers set by hand."""

    def __init__(self, model: keras.Model, manifest: Manifest) -> None:
        self.hand = Hand(manifest)
        self.names = [item.name for item in manifest.inputs]
        # By the original's id: the original, so that the id stays taken, and its replacement.
        self._replaced: dict[int, tuple[layers.Layer, layers.Layer]] = {}
        if getattr(model, "inputs", None):
            self.network = keras.models.clone_model(model, clone_function=self._replacement)
        else:
            self.network = type(model).from_config(model.get_config())
            for name, layer in vars(model).items():
                if isinstance(layer, layers.Dropout):
                    setattr(self.network, name, HandNoise(layer, self.hand, layer.name))
            self.network(np.zeros([1, *model.get_build_config()["input_shape"][1:]], np.float32))
            self.network.set_weights(model.get_weights())
        for original, replacement in self._replaced.values():
            if isinstance(original, layers.Layer) and not isinstance(original, keras.Model):
                replacement.set_weights(original.get_weights())

    def draws(self, inputs: dict[str, np.ndarray], num_samples: int, seed: int) -> list[np.ndarray]:
        """Flat outputs [rows, draws, ...] by position."""
        rows = len(next(iter(inputs.values())))
        self.hand.seed = seed
        answers = []
        for row in range(rows):
            one = {name: ops.convert_to_tensor(values[row : row + 1]) for name, values in inputs.items()}
            for draw in range(num_samples):
                self.hand.draw, self.hand.calls = draw, {}
                outputs = self.network(packed(self.network, self.names, one), training=False)
                answers.append(
                    [ops.convert_to_numpy(ops.cast(item, "float32"))[0] for item in keras.tree.flatten(outputs)]
                )
        return [
            np.stack([answer[position] for answer in answers]).reshape(rows, num_samples, *answers[0][position].shape)
            for position in range(len(answers[0]))
        ]

    def _replacement(self, layer: layers.Layer) -> layers.Layer:
        if id(layer) not in self._replaced:
            self._replaced[id(layer)] = layer, self._new(layer, layer.name)
        return self._replaced[id(layer)][1]

    def _new(self, layer: layers.Layer, path: str) -> layers.Layer:
        noisy = layers.Dropout | layers.AlphaDropout | layers.GaussianDropout | layers.GaussianNoise
        if isinstance(layer, noisy):
            return HandNoise(layer, self.hand, path)
        if isinstance(layer, layers.Attention):
            return HandAttention(layer, self.hand)
        if isinstance(layer, keras.Sequential | keras.Model):
            return keras.models.clone_model(layer, clone_function=self._replacement)
        if isinstance(layer, layers.TimeDistributed):
            inner = self._new(layer.layer, f"{path}/{layer.layer.name}")
            return layers.TimeDistributed(inner, name=layer.name)
        if isinstance(layer, layers.Bidirectional):
            sides = layer.forward_layer, layer.backward_layer
            return HandSides(layer, [self._new(side, f"{path}/{side.name}") for side in sides])
        if isinstance(layer, layers.RNN):
            return self._recurrent(layer, path)
        if isinstance(layer, layers.MultiHeadAttention | layers.GroupQueryAttention):
            return self._attention(layer)
        return type(layer).from_config(layer.get_config())

    def _recurrent(self, layer: layers.RNN, path: str) -> layers.Layer:
        config = layer.get_config()
        config.pop("cell", None)
        kind = type(layer) if "ConvLSTM" in type(layer).__name__ else layers.RNN
        if kind is not layers.RNN:
            copy = kind.from_config(config)
            copy.cell = self._cell(layer.cell, path)
            return copy
        kept = ("return_sequences", "return_state", "go_backwards", "unroll", "zero_output_for_mask", "name", "dtype")
        return layers.RNN(self._cell(layer.cell, path), **{name: config[name] for name in kept if name in config})

    def _cell(self, cell: layers.Layer, path: str) -> layers.Layer:
        # Where Keras names it, its count of the process is in no path of a manifest.
        path = f"{path}/{re.sub(r'_[0-9]+$', '', cell.name)}"
        if isinstance(cell, layers.StackedRNNCells):
            return layers.StackedRNNCells([self._cell(inner, path) for inner in cell.cells])
        return _hand_cell(cell, self.hand, path)

    def _attention(self, layer: layers.Layer) -> layers.Layer:
        hand, path = self.hand, f"{layer.name}/dropout"

        class HandHeads(type(layer)):  # type: ignore[misc]
            def build(self, query_shape, value_shape, key_shape=None):
                super().build(query_shape, value_shape, key_shape)
                # Both kinds keep the dropout of their weights in a layer of their own.
                self._dropout_layer: layers.Layer = HandNoise(self._dropout_layer, hand, path)

        return HandHeads.from_config(layer.get_config())


def packed(model: keras.Model, names: list[str], inputs: dict[str, Any]) -> Any:
    """Inputs by name in the structure that the model was built with."""
    structure = getattr(model, "_inputs_struct", None)
    if isinstance(structure, dict):
        return dict(inputs)
    return inputs[names[0]] if len(names) == 1 else [inputs[name] for name in names]
