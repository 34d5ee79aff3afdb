"""The convolutional part of a recipe's network: its shapes, and its layers for a stack of replicas at once.

A layer is a 3 x 3 convolution, a rectifier, and the largest of each 2 x 2. Its maps stand in one row, as behind Keras's
Flatten: to masks and dense layers they are units like any others.

Each replica's convolution is an operation of its own, side by side in the graph; everything else is done for all at
once. On one core that took as long as one batched product of gathered patches for 8 x 8 images, two thirds of it for
28 x 28, and half as long as one grouped convolution with its gradients, and it needs no room for patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import tensorflow as tf

# Pixels a side of a kernel, and of the square of which pooling keeps the largest.
KERNEL, POOL = 3, 2
# Convolutions are added until a feature map has at most this many pixels a side.
SMALL_SIDE = 8
# Feature maps of the first convolution, and of those behind it.
FILTERS = (32, 64)


@dataclass(frozen=True)
class Convolution:
    """One layer: maps of height x width with so many channels in, half as high and wide and `filters` of them out."""

    height: int
    width: int
    channels: int
    filters: int

    @property
    def pooled(self) -> tuple[int, int, int]:
        """Height, width, channels of what comes out; a last odd row or column is left out."""
        return self.height // POOL, self.width // POOL, self.filters

    @property
    def inputs(self) -> int:
        return self.height * self.width * self.channels

    @property
    def outputs(self) -> int:
        height, width, filters = self.pooled
        return height * width * filters

    @property
    def fan_in(self) -> int:
        """Weights of one filter: rows of the kernel as a matrix [fan_in, filters]."""
        return KERNEL * KERNEL * self.channels

    @property
    def fan_out(self) -> int:
        return KERNEL * KERNEL * self.filters

    @property
    def kernel_shape(self) -> tuple[int, int, int, int]:
        """As Keras's Conv2D holds its kernel."""
        return KERNEL, KERNEL, self.channels, self.filters

    @property
    def activations(self) -> int:
        """Floats of one row before pooling: the most that the layer needs at once."""
        return self.height * self.width * self.filters


def convolutions(shape: tuple[int, int, int]) -> tuple[Convolution, ...]:
    """The layers for images of height, width, channels: until the maps are small."""
    layers: list[Convolution] = []
    while not layers or min(shape[:2]) > SMALL_SIDE:
        layers.append(Convolution(*shape, FILTERS[min(len(layers), len(FILTERS) - 1)]))
        shape = layers[-1].pooled
    return tuple(layers)


def convolved(x: tf.Tensor, kernels: tf.Tensor, layer: Convolution) -> tf.Tensor:
    """x [R, n, inputs], kernels [R, fan_in, filters]. Returns [R, n, height, width, filters], without the bias."""
    return tf.stack(
        [
            tf.nn.conv2d(_maps(own, layer), tf.reshape(kernel, layer.kernel_shape), strides=1, padding="SAME")
            for own, kernel in zip(tf.unstack(x), tf.unstack(kernels), strict=True)
        ]
    )


def pooled(products: tf.Tensor, layer: Convolution) -> tf.Tensor:
    """[R, n, height, width, filters] -> [R, n * height' * width', filters]."""
    maps = tf.reshape(products, [-1, layer.height, layer.width, layer.filters])
    largest = tf.nn.max_pool2d(maps, POOL, POOL, "VALID")
    return tf.reshape(largest, [products.shape[0], -1, layer.filters])


def unpooled(products: tf.Tensor, gradient: tf.Tensor, layer: Convolution) -> tf.Tensor:
    """The gradient [R, n, outputs] by what was pooled: each at the first of its square's largest, as TensorFlow has it.

    Meant to be fused: TensorFlow's own operation is ten times slower. Returns [R, n, height, width, filters].
    """
    replicas, rows = products.shape[:2]
    height, width, filters = layer.pooled
    even = products[:, :, : POOL * height, : POOL * width]
    squares = tf.reshape(even, [replicas, rows, height, POOL, width, POOL, filters])
    corners = [squares[:, :, :, i, :, j] for i in range(POOL) for j in range(POOL)]
    largest = tf.reduce_max(corners, axis=0)
    first = tf.fill(largest.shape, len(corners))
    for place in reversed(range(len(corners))):
        first = tf.where(corners[place] == largest, place, first)
    places = tf.reshape(tf.range(POOL * POOL), [1, 1, 1, POOL, 1, POOL, 1])
    own = tf.reshape(gradient, [replicas, rows, height, 1, width, 1, filters])
    spread = tf.where(first[:, :, :, None, :, None] == places, own, 0.0)
    spread = tf.reshape(spread, even.shape)
    missing = [[0, 0], [0, 0], [0, layer.height - POOL * height], [0, layer.width - POOL * width], [0, 0]]
    return tf.pad(spread, missing)


def kernel_gradients(x: tf.Tensor, gradient: tf.Tensor, layer: Convolution) -> tf.Tensor:
    """x [R, n, inputs], gradient [R, n, height, width, filters]. Returns [R, fan_in, filters]."""
    found = [
        tf.raw_ops.Conv2DBackpropFilter(
            input=_maps(own, layer),
            filter_sizes=layer.kernel_shape,
            out_backprop=behind,
            strides=[1, 1, 1, 1],
            padding="SAME",
        )
        for own, behind in zip(tf.unstack(x), tf.unstack(gradient), strict=True)
    ]
    return tf.reshape(tf.stack(found), [len(found), layer.fan_in, layer.filters])


def input_gradients(kernels: tf.Tensor, gradient: tf.Tensor, layer: Convolution) -> tf.Tensor:
    """kernels [R, fan_in, filters], gradient [R, n, height, width, filters]. Returns [R, n, inputs]."""
    replicas, rows = gradient.shape[:2]
    found = [
        tf.raw_ops.Conv2DBackpropInput(
            input_sizes=[rows, layer.height, layer.width, layer.channels],
            filter=tf.reshape(kernel, layer.kernel_shape),
            out_backprop=behind,
            strides=[1, 1, 1, 1],
            padding="SAME",
        )
        for kernel, behind in zip(tf.unstack(kernels), tf.unstack(gradient), strict=True)
    ]
    return tf.reshape(tf.stack(found), [replicas, rows, layer.inputs])


def _maps(rows: tf.Tensor, layer: Convolution) -> tf.Tensor:
    return tf.reshape(rows, [-1, layer.height, layer.width, layer.channels])
