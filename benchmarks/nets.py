"""The five networks that are timed, and their computation as a list of steps that any framework can follow.

(a) 60-60-30-1 on a table; (b) 784-512-512-10; (c) a small CNN; (d) an attention block; (e) a MobileNetV2 trunk with
dropout only in its head. Weights are random (He or Glorot): speed does not depend on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

WEIGHTS_SEED = 20_26
INPUTS_SEED = 7


@dataclass(frozen=True)
class Step:
    """One operation on tensors by name. Images and sequences are channels-last.

    kind: dense, conv, depthwise, zero_pad, max_pool, mean_pool, flatten, add, layer_norm, dropout, relu, relu6,
    softmax, sigmoid; for attention, split_heads (a dense layer to [length, heads, width]), scores (the softmax of two
    of those, [heads, length, length]), attend (scores and values to [length, heads, width]) and merge_heads (a dense
    layer back).
    """

    kind: str
    inputs: tuple[str, ...]
    output: str
    # Shape of one row of the output.
    shape: tuple[int, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Net:
    """A network as steps; the first reads `input`, the last one's output is the answer."""

    name: str
    input_shape: tuple[int, ...]
    steps: list[Step]

    def noisy(self) -> set[str]:
        """Names of the tensors that the dropout reaches."""
        reached: set[str] = set()
        for step in self.steps:
            if step.kind == "dropout" or reached & set(step.inputs):
                reached.add(step.output)
        return reached

    def split(self) -> tuple[list[Step], list[Step], list[str]]:
        """Steps that no dropout reaches, the others, and the names that the others read of the former or the input."""
        noisy = self.noisy()
        prefix = [step for step in self.steps if step.output not in noisy]
        suffix = [step for step in self.steps if step.output in noisy]
        border = dict.fromkeys(name for step in suffix for name in step.inputs if name not in noisy)
        return prefix, suffix, list(border)

    def widest(self, only: set[str] | None = None) -> int:
        """Floats of one row of the widest tensor (of those named)."""
        return max(math.prod(step.shape) for step in self.steps if only is None or step.output in only)

    def flops(self) -> tuple[float, float]:
        """Useful operations, two a multiply-add of products and convolutions: (once a row, once a row and draw)."""
        noisy = self.noisy()
        shapes = {"input": self.input_shape} | {step.output: step.shape for step in self.steps}
        once = each = 0.0
        for step in self.steps:
            flops = 2.0 * _multiply_adds(step, shapes[step.inputs[0]])
            if step.output in noisy:
                each += flops
            else:
                once += flops
        return once, each


def _multiply_adds(step: Step, source: tuple[int, ...]) -> float:
    if step.kind == "dense":
        return math.prod(source) * step.shape[-1]
    if step.kind == "conv":
        return math.prod(step.shape) * math.prod(step.weights["kernel"].shape[:3])
    if step.kind == "depthwise":
        return math.prod(step.shape) * math.prod(step.weights["kernel"].shape[:2])
    if step.kind in ("split_heads", "merge_heads"):
        return source[0] * math.prod(step.weights["kernel"].shape)
    if step.kind in ("scores", "attend"):
        return math.prod(step.shape) * source[-1]
    return 0.0


def inputs(net_shape: tuple[int, ...], rows: int) -> np.ndarray:
    """Rows to answer, float32 [rows, ...]: noise of a strength and with an offset that differ between rows."""
    rng = np.random.default_rng(INPUTS_SEED)
    inner = [1] * (len(net_shape) - 1)
    strength = rng.uniform(0.3, 1.5, (rows, *inner, 1))
    offset = rng.standard_normal((rows, *inner, net_shape[-1]))
    return (rng.standard_normal((rows, *net_shape)) * strength + offset).astype(np.float32)


# The Keras models. Keras is imported inside: the peers' workers read steps only.


def table_network() -> Any:
    """(a) The Sonar tutorial's network."""
    from keras import Input, Sequential, layers

    return Sequential(
        [
            Input((60,)),
            layers.Dropout(0.2),
            layers.Dense(60, activation="relu"),
            layers.Dropout(0.2),
            layers.Dense(30, activation="relu"),
            layers.Dropout(0.2),
            layers.Dense(1, activation="sigmoid"),
        ]
    )


def wide_network() -> Any:
    """(b)"""
    from keras import Input, Sequential, layers

    return Sequential(
        [
            Input((784,)),
            layers.Dropout(0.2),
            layers.Dense(512, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(512, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(10, activation="softmax"),
        ]
    )


def convolutional_network() -> Any:
    """(c)"""
    from keras import Input, Sequential, layers

    return Sequential(
        [
            Input((28, 28, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Dropout(0.25),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(10, activation="softmax"),
        ]
    )


def attention_network() -> Any:
    """(d) One transformer encoder block over a sequence of 32 vectors of 64."""
    from keras import Input, Model, layers

    tokens = Input((32, 64))
    attended = layers.MultiHeadAttention(4, 16, dropout=0.1)(tokens, tokens)
    attended = layers.Dropout(0.1)(attended)
    x = layers.LayerNormalization()(layers.Add()([tokens, attended]))
    hidden = layers.Dense(128, activation="relu")(x)
    hidden = layers.Dropout(0.1)(layers.Dense(64)(hidden))
    x = layers.LayerNormalization()(layers.Add()([x, hidden]))
    return Model(tokens, layers.Dense(10, activation="softmax")(layers.GlobalAveragePooling1D()(x)))


def mobile_network() -> Any:
    """(e) Transfer learning's usual form: a frozen trunk, whose BatchNormalization thereby stays in inference mode."""
    from keras import Input, Model, applications, layers

    trunk = applications.MobileNetV2((96, 96, 3), alpha=0.35, include_top=False, weights=None, pooling="avg")
    trunk.trainable = False
    image = Input((96, 96, 3))
    features = trunk(image)
    return Model(image, layers.Dense(10, activation="softmax")(layers.Dropout(0.2)(features)))


@dataclass(frozen=True)
class Subject:
    """One of the five: its letter in the tables."""

    letter: str
    name: str
    title: str
    build: Callable[[], Any]


SUBJECTS = {
    subject.letter: subject
    for subject in (
        Subject("a", "table", "60-60-30-1", table_network),
        Subject("b", "wide", "784-512-512-10", wide_network),
        Subject("c", "cnn", "CNN 28x28", convolutional_network),
        Subject("d", "attention", "attention 32x64", attention_network),
        Subject("e", "mobilenet", "MobileNetV2 96x96", mobile_network),
    )
}


def build(subject: Subject) -> Any:
    """The Keras model with repeatable weights; its last layer is scaled so that rows and masks both matter."""
    import keras

    keras.utils.set_random_seed(WEIGHTS_SEED)
    model = subject.build()
    rng = np.random.default_rng(WEIGHTS_SEED)
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, keras.layers.BatchNormalization):
            _settle(layer, rng)
    last = model.layers[-1]
    features = keras.Model(model.inputs[0], last.input)(inputs(tuple(model.input_shape[1:]), 64), training=True)
    kernel, bias = last.get_weights()
    logits = np.asarray(features) @ kernel
    strength = 1.5 / (logits - logits.mean(axis=0)).std()
    last.set_weights([kernel * strength, bias - logits.mean(axis=0) * strength])
    return model


def _settle(normalization: Any, rng: np.random.Generator) -> None:
    """Batch statistics that are not the identity, so that leaving them out would show."""
    size = normalization.gamma.shape[0]
    normalization.set_weights(
        [
            rng.uniform(0.8, 1.6, size),
            rng.normal(0.0, 0.3, size),
            rng.normal(0.0, 0.1, size),
            rng.uniform(0.3, 0.8, size),
        ]
    )


def steps_of(subject: Subject, model: Any) -> Net:
    """The model's inference graph as steps: nested models flattened, BatchNormalization folded into convolutions."""
    steps = list(_translate(model, {id(model.inputs[0]): "input"}, ""))
    return Net(subject.name, tuple(model.input_shape[1:]), _fold_normalizations(steps))


def _translate(model: Any, names: dict[int, str], prefix: str) -> Iterator[Step]:
    import keras

    graph = model._functional if isinstance(model, keras.Sequential) else model
    for symbol, given in zip(graph.inputs, model.inputs, strict=True):
        names[id(symbol)] = names[id(given)]
    for operation in graph.operations:
        if isinstance(operation, keras.layers.InputLayer):
            continue
        node = operation._inbound_nodes[-1] if len(operation._inbound_nodes) == 1 else _node_in(operation, names)
        sources = tuple(dict.fromkeys(names[id(symbol)] for symbol in node.input_tensors))
        result = node.outputs[0]
        output = prefix + operation.name
        if isinstance(operation, keras.Model):
            names[id(operation.inputs[0])] = sources[0]
            inner = list(_translate(operation, names, output + "/"))
            yield from inner
            names[id(result)] = inner[-1].output
            continue
        *before, last = _steps_of_layer(operation, sources, output, tuple(result.shape[1:]))
        yield from before
        yield last
        names[id(result)] = last.output


def _node_in(operation: Any, names: dict[int, str]) -> Any:
    return next(node for node in operation._inbound_nodes if all(id(symbol) in names for symbol in node.input_tensors))


def _steps_of_layer(layer: Any, sources: tuple[str, ...], output: str, shape: tuple[int, ...]) -> list[Step]:
    from keras import layers

    weights = [np.asarray(value) for value in layer.get_weights()]
    name = getattr(getattr(layer, "activation", None), "__name__", "linear")
    after = [] if name == "linear" else [Step(name, (output,), f"{output}:{name}", shape)]

    def step(kind: str, settings: dict[str, Any] | None = None, **named: np.ndarray) -> Step:
        return Step(kind, sources, output, shape, settings or {}, named)

    if isinstance(layer, layers.Dense):
        return [step("dense", kernel=weights[0], bias=weights[1]), *after]
    if isinstance(layer, layers.DepthwiseConv2D):
        settings = {"strides": layer.strides[0], "padding": layer.padding}
        return [step("depthwise", settings, kernel=weights[0][..., 0], bias=_bias(layer, weights, shape[-1])), *after]
    if isinstance(layer, layers.Conv2D):
        settings = {"strides": layer.strides[0], "padding": layer.padding}
        return [step("conv", settings, kernel=weights[0], bias=_bias(layer, weights, shape[-1])), *after]
    if isinstance(layer, layers.BatchNormalization):
        gamma, beta, mean, variance = weights
        scale = gamma / np.sqrt(variance + layer.epsilon)
        return [step("normalization", scale=scale, shift=beta - mean * scale)]
    if isinstance(layer, layers.LayerNormalization):
        return [step("layer_norm", {"epsilon": layer.epsilon}, gamma=weights[0], beta=weights[1])]
    if isinstance(layer, layers.MultiHeadAttention):
        return _attention(layer, weights, sources[0], output, shape)
    if isinstance(layer, layers.ReLU):
        return [step("relu6" if layer.max_value == 6 else "relu")]
    if isinstance(layer, layers.Dropout):
        return [step("dropout", {"rate": layer.rate})]
    if isinstance(layer, layers.ZeroPadding2D):
        return [step("zero_pad", {"padding": layer.padding})]
    kinds = {
        layers.MaxPooling2D: "max_pool",
        layers.GlobalAveragePooling1D: "mean_pool",
        layers.GlobalAveragePooling2D: "mean_pool",
        layers.Flatten: "flatten",
        layers.Add: "add",
    }
    return [step(kinds[type(layer)])]


def _bias(layer: Any, weights: list[np.ndarray], outputs: int) -> np.ndarray:
    return weights[1] if layer.use_bias else np.zeros(outputs, np.float32)


def _attention(layer: Any, weights: list[np.ndarray], source: str, output: str, shape: tuple[int, ...]) -> list[Step]:
    """Self-attention; its dropout is on the scores."""
    _, heads, width = weights[0].shape
    parts = dict(zip(("query", "key", "value", "merged"), zip(weights[::2], weights[1::2], strict=True), strict=True))
    split, square = (shape[0], heads, width), (heads, shape[0], shape[0])

    def name(part: str) -> str:
        return f"{output}:{part}"

    def dense(kind: str, part: str, source: str, output: str, shape: tuple[int, ...]) -> Step:
        kernel, bias = parts[part]
        return Step(kind, (source,), output, shape, {}, {"kernel": kernel, "bias": bias})

    return [
        *(dense("split_heads", part, source, name(part), split) for part in ("query", "key", "value")),
        Step("scores", (name("query"), name("key")), name("scores"), square, {"scale": 1 / math.sqrt(width)}),
        Step("dropout", (name("scores"),), name("kept"), square, {"rate": layer.dropout}),
        Step("attend", (name("kept"), name("value")), name("attended"), split),
        dense("merge_heads", "merged", name("attended"), output, shape),
    ]


def _fold_normalizations(steps: list[Step]) -> list[Step]:
    """BatchNormalization in inference mode is an affine map: into the convolution before it."""
    folded: list[Step] = []
    renamed: dict[str, str] = {}
    for step in steps:
        sources = tuple(renamed.get(name, name) for name in step.inputs)
        if step.kind != "normalization":
            folded.append(replace(step, inputs=sources))
            continue
        place = next(number for number, earlier in enumerate(folded) if earlier.output == sources[0])
        convolution = folded[place]
        scale, shift = step.weights["scale"], step.weights["shift"]
        weights = {
            "kernel": (convolution.weights["kernel"] * scale).astype(np.float32),
            "bias": (convolution.weights["bias"] * scale + shift).astype(np.float32),
        }
        folded[place] = replace(convolution, weights=weights)
        renamed[step.output] = sources[0]
    return folded
