"""Small dropout networks for regression, many at once: lines of data x dropout rates x precisions, in NumPy.

A line is one set of training rows with its own shuffles and random numbers. Within a line every network sees the same
batches, and its masks come from the same random numbers: at one rate the masks are the same. By itself each network is
trained as Keras would train it, and the comparisons between them carry less noise.

Why not `training/replicas.py`: here a step is taken ten thousand times as often, and its masks, drawn for each network
anew, take longer than all of this step. One step of 128 rows and 50 units is 13 µs a network on one core this way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Head = Literal["mean", "gaussian"]

# Keras's own constants of Adam.
LEARNING_RATE, BETA_1, BETA_2, EPSILON = 1e-3, 0.9, 0.999, 1e-7
BATCH_SIZE = 128
# Weight of each row's loss under a learned variance: that variance to this power (Seitzer 2022, beta-NLL).
BETA_NLL = 0.5
# Floats of one layer's activations while predicting: what stays in the second-level cache.
DRAW_FLOATS = 2**17


class Stream:
    """The random numbers of one line: initial weights, then for each epoch an order, for each step bits of masks."""

    def __init__(self, seed: Sequence[int]) -> None:
        self._bits = np.random.SFC64(np.random.SeedSequence(list(seed)))
        self._generator = np.random.Generator(self._bits)

    def glorot(self, inputs: int, units: int) -> Floats:
        """Keras's initial kernel [inputs, units]."""
        limit = math.sqrt(6 / (inputs + units))
        return self._generator.uniform(-limit, limit, (inputs, units)).astype(np.float32)

    def order(self, rows: int) -> NDArray[np.int64]:
        return self._generator.permutation(rows)

    def bits(self, count: int) -> NDArray[np.uint16]:
        """Uniform 16-bit numbers, [count]."""
        return self._bits.random_raw(-(-count // 4)).view(np.uint16)[:count]


def thresholds(rates: NDArray[np.float64]) -> NDArray[np.uint16]:
    """A unit is dropped where its 16-bit number is below this."""
    return np.round(rates * 65536).astype(np.uint16)


@dataclass
class _Workspace:
    """Arrays of one step of `rows` rows, kept from step to step: S lines, P rates, K precisions."""

    bits: NDArray[np.uint16]
    # Inputs after dropout, features first, the last of them always 1 for the bias: [S, P, 1, F + 1, rows].
    inputs: Floats
    # For each hidden layer: masks [S, P, 1, rows, units]; the rest [S, P, K, rows, units].
    masks: list[Floats]
    positive: list[NDArray[np.bool_]]
    gates: list[Floats]
    active: list[Floats]
    behind: list[Floats]
    output: Floats


class Stack:
    """Networks in training.

    x: float32 [S, N, F], y: float32 [S, N]: each line's training rows, standardised.
    rates: [S, P], for every dropout site of a network, the inputs too.
    decay: [S, P, K], factor of the sum of squares of the kernels in the loss.
    hidden: units of each hidden layer. seeds: one for each line.
    head: "mean", trained on the squared error; "gaussian", mean and log variance, trained on beta-NLL.
    falls_over: steps over which the learning rate falls to 0 in a straight line; None: it stays.
    """

    def __init__(
        self,
        x: Floats,
        y: Floats,
        *,
        rates: NDArray[np.float64],
        decay: NDArray[np.float64],
        hidden: Sequence[int],
        seeds: Sequence[Sequence[int]],
        head: Head = "mean",
        batch_size: int = BATCH_SIZE,
        learning_rate: float = LEARNING_RATE,
        falls_over: int | None = None,
    ) -> None:
        self.lines, self.rows, self.features = x.shape
        self.shape = decay.shape
        self.head = head
        self.batch_size, self.learning_rate, self.falls_over = batch_size, learning_rate, falls_over
        self.widths = (self.features, *hidden, 1 if head == "mean" else 2)
        # Features first: what is done for each row then runs along the rows.
        self._x = np.concatenate([x.transpose(0, 2, 1), np.ones((self.lines, 1, self.rows), np.float32)], axis=1)
        self._y = y
        self.rates = rates
        self._limits = thresholds(rates)[:, :, None, None]
        self._scales = (1 / (1 - rates)).astype(np.float32)[:, :, None, None]
        self._streams = [Stream(seed) for seed in seeds]
        sizes = [(inputs + 1) * units for inputs, units in pairwise(self.widths)]
        self._ends = np.cumsum([0, *sizes])
        # All weights of a network end to end, for Adam; `_layers` are views of them.
        self.weights = np.zeros((*self.shape, self._ends[-1]), np.float32)
        self._gradients = np.zeros_like(self.weights)
        self._slots = [np.zeros_like(self.weights) for _ in range(4)]
        self._decay = np.zeros_like(self.weights)
        self.updates = 0
        for line, stream in enumerate(self._streams):
            for kernel, _ in self.layers(self.weights):
                kernel[line] = stream.glorot(*kernel.shape[-2:])
        for kernel, _ in self.layers(self._decay):
            kernel[...] = 2 * decay[..., None, None]
        self._layers, self._gradient_layers = self.layers(self.weights), self.layers(self._gradients)
        self._workspaces: dict[int, _Workspace] = {}

    def layers(self, flat: Floats) -> list[tuple[Floats, Floats]]:
        """Views of flat weights [..., all]: for each layer its kernel [..., inputs, units] and bias [..., 1, units]."""
        views = []
        for (inputs, units), (start, end) in zip(pairwise(self.widths), pairwise(self._ends), strict=True):
            both = flat[..., start:end].reshape(*flat.shape[:-1], inputs + 1, units)
            views.append((both[..., :inputs, :], both[..., inputs:, :]))
        return views

    def train(self, epochs: int) -> None:
        """Train all networks for so many epochs more."""
        for _ in range(epochs):
            orders = [stream.order(self.rows) for stream in self._streams]
            x = np.stack([own[:, order] for own, order in zip(self._x, orders, strict=True)])
            y = np.stack([own[order] for own, order in zip(self._y, orders, strict=True)])
            for start in range(0, self.rows, self.batch_size):
                self._step(x[:, :, start : start + self.batch_size], y[:, start : start + self.batch_size])

    def _step(self, x: Floats, y: Floats) -> None:
        rows = y.shape[1]
        space = self._workspaces.get(rows) or self._workspaces.setdefault(rows, self._workspace(rows))
        self._draw_masks(space, x)
        first = self._first(self.weights)
        hidden: Floats = space.inputs.swapaxes(-1, -2)
        for layer, active in enumerate(space.active):
            if layer:
                np.matmul(hidden, self._layers[layer][0], out=active)
                np.add(active, self._layers[layer][1], out=active)
            else:
                np.matmul(hidden, first, out=active)
            # NumPy's maximum is three times slower than a comparison, a conversion and a product.
            np.greater(active, 0, out=space.positive[layer])
            np.copyto(space.gates[layer], space.positive[layer])
            np.multiply(space.gates[layer], space.masks[layer], out=space.gates[layer])
            hidden = np.multiply(active, space.gates[layer], out=active)
        np.matmul(hidden, self._layers[-1][0], out=space.output)
        space.output += self._layers[-1][1]
        delta = self._output_gradient(space.output, y[:, None, None])
        for layer in range(len(self._layers) - 1, 0, -1):
            kernel, bias = self._gradient_layers[layer]
            np.matmul(space.active[layer - 1].swapaxes(-1, -2), delta, out=kernel)
            np.sum(delta, axis=-2, keepdims=True, out=bias)
            back = self._layers[layer][0].swapaxes(-1, -2)
            if delta.shape[-1] == 1:
                # OpenBLAS takes ten times longer for products over one column than over two.
                delta, back = (
                    np.concatenate([delta, delta], axis=-1),
                    np.concatenate([back, np.zeros_like(back)], axis=-2),
                )
            # Contiguous: a third faster.
            delta = np.matmul(delta, np.ascontiguousarray(back), out=space.behind[layer - 1])
            delta *= space.gates[layer - 1]
        np.matmul(space.inputs, delta, out=self._first(self._gradients))
        self._adam()

    def _first(self, flat: Floats) -> Floats:
        """Kernel and bias of the first layer as one matrix, for the inputs have a column of ones."""
        return flat[..., : self._ends[1]].reshape(*self.shape, self.features + 1, self.widths[1])

    def _draw_masks(self, space: _Workspace, x: Floats) -> None:
        for own, stream in zip(space.bits, self._streams, strict=True):
            own[:] = stream.bits(len(own))
        rows, end = x.shape[-1], self.features * x.shape[-1]
        visible = space.bits[:, :end].reshape(self.lines, 1, self.features, rows)
        kept = space.inputs[:, :, 0, :-1]
        np.copyto(kept, visible >= self._limits)
        kept *= self._scales
        kept *= x[:, None, :-1]
        for mask in space.masks:
            start, end = end, end + rows * mask.shape[-1]
            hidden = space.bits[:, start:end].reshape(self.lines, 1, rows, -1)
            np.copyto(mask[:, :, 0], hidden >= self._limits)
            mask[:, :, 0] *= self._scales

    def _output_gradient(self, output: Floats, y: Floats) -> Floats:
        """Gradient of the mean loss by the outputs. output [S, P, K, rows, outputs], y [S, 1, 1, rows]."""
        error = output[..., 0] - y
        if self.head == "mean":
            return (error * np.float32(2 / y.shape[-1]))[..., None]
        variance = np.exp(output[..., 1])
        weight = variance**BETA_NLL / np.float32(y.shape[-1])
        return np.stack([weight * error / variance, weight * (1 - np.square(error) / variance) / 2], axis=-1)

    def _adam(self) -> None:
        first, second, some, other = self._slots
        gradients = self._gradients
        self.updates += 1
        rate = self.learning_rate * (1 - (self.updates - 1) / self.falls_over if self.falls_over else 1)
        rate *= math.sqrt(1 - BETA_2**self.updates) / (1 - BETA_1**self.updates)
        np.multiply(self.weights, self._decay, out=some)
        gradients += some
        np.subtract(gradients, first, out=some)
        some *= 1 - BETA_1
        first += some
        np.square(gradients, out=some)
        some -= second
        some *= 1 - BETA_2
        second += some
        np.sqrt(second, out=some)
        some += EPSILON
        np.divide(first, some, out=other)
        other *= rate
        self.weights -= other

    def _workspace(self, rows: int) -> _Workspace:
        lines, rates, precisions = self.shape
        hidden = self.widths[1:-1]

        def arrays(count: int, kind: type = np.float32) -> list[NDArray]:
            return [np.empty((lines, rates, count, rows, units), kind) for units in hidden]

        return _Workspace(
            bits=np.empty((lines, rows * sum(self.widths[:-1])), np.uint16),
            inputs=np.ones((lines, rates, 1, self.features + 1, rows), np.float32),
            masks=arrays(1),
            positive=arrays(precisions, np.bool_),
            gates=arrays(precisions),
            active=arrays(precisions),
            behind=arrays(precisions),
            output=np.empty((*self.shape, rows, self.widths[-1]), np.float32),
        )

    def draws(self, at: tuple[int, int, int], x: Floats, num_samples: int, seed: Sequence[int]) -> Iterator[Floats]:
        """Monte Carlo dropout of the network at (line, rate, precision), in chunks [draws, n, outputs].

        x: float32 [n, F]. A draw's masks are the same for all rows, so that they are applied to the weights; each row
        by itself has independent draws.
        """
        line, rate, _ = at
        stream = Stream(seed)
        limit, scale = self._limits[line, rate, 0, 0], self._scales[line, rate, 0, 0]
        chunk = max(1, DRAW_FLOATS // (len(x) * max(self.widths)))
        for start in range(0, num_samples, chunk):
            count = min(chunk, num_samples - start)
            hidden = x
            for layer, (kernel, bias) in enumerate(self.layers(self.weights[at])):
                if layer:
                    # Against an array, not a number: three times faster.
                    np.maximum(hidden, np.zeros_like(hidden[:1]), out=hidden)
                kept = stream.bits(count * len(kernel)).reshape(count, -1, 1) >= limit
                hidden = hidden @ (kernel * (kept * scale))
                hidden += bias
            yield hidden
