"""Networks of every kind, tiny, with fixed random weights: `ZOO` by name."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from models.contract import Manifest
from tests.models.networks import scatter

SEQUENCE = (5, 4)


@dataclass(frozen=True)
class Exhibit:
    build: Callable[[], keras.Model]
    # Values of integer inputs lie below it.
    vocabulary: int = 4
    words: tuple[str, ...] = ("red", "green", "blue", "no such word")
    # Of what `publish` is told.
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-5
    # Whether Keras's own training mode has the same distribution: not with BatchNormalization or augmentation in it.
    same_as_training: bool = True


ZOO: dict[str, Exhibit] = {}


def exhibit(**settings: Any) -> Callable[[Callable[[], keras.Model]], Callable[[], keras.Model]]:
    def enter(build: Callable[[], keras.Model]) -> Callable[[], keras.Model]:
        ZOO[build.__name__] = Exhibit(lambda: scatter(build(), scale=1.5), **settings)
        return build

    return enter


def stack(shape: tuple[int | None, ...], *parts: Any, units: int = 3, **options: Any) -> keras.Model:
    return keras.Sequential(
        [keras.Input(shape, **options), *parts, layers.Dense(units, activation="softmax", name="answer")]
    )


# Elementwise noise.


@exhibit()
def dropout():
    return stack((6,), layers.Dropout(0.3), layers.Dense(8, activation="relu"), layers.Dropout(0.5))


@exhibit()
def noise_shapes():
    return stack(
        SEQUENCE,
        layers.Dropout(0.4, noise_shape=(None, 1, 4)),
        layers.Dense(6, activation="selu"),
        layers.AlphaDropout(0.3, noise_shape=(None, 1, 6)),
        layers.Flatten(),
        layers.Dropout(0.005),
    )


@exhibit(same_as_training=False)
def noise_shape_of_fewer_axes():
    """Broadcast, as in Keras, where it is one mask for a whole batch."""
    return stack(SEQUENCE, layers.Dropout(0.4, noise_shape=(4,)), layers.Flatten())


@exhibit()
def spatial_dropout_1d():
    return stack(SEQUENCE, layers.Conv1D(6, 2), layers.SpatialDropout1D(0.4), layers.Flatten())


@exhibit()
def spatial_dropout_2d():
    return stack((5, 5, 2), layers.Conv2D(6, 2), layers.SpatialDropout2D(0.4), layers.Conv2D(3, 2), layers.Flatten())


@exhibit()
def spatial_dropout_3d():
    return stack((3, 3, 3, 2), layers.Conv3D(6, 2), layers.SpatialDropout3D(0.4), layers.Flatten())


@exhibit()
def channels_first():
    x = inputs = keras.Input((3, 4, 4), name="image")
    x = layers.SpatialDropout2D(0.4, data_format="channels_first")(x)
    x = layers.Permute((2, 3, 1))(x)
    x = layers.Conv2D(4, 2)(x)
    x = layers.Permute((3, 1, 2))(x)
    x = layers.GlobalAveragePooling2D(data_format="channels_first")(x)
    return keras.Model(inputs, layers.Dense(2, activation="softmax")(x))


@exhibit()
def gaussian_noise():
    return stack(
        (6,),
        layers.GaussianNoise(0.5),
        layers.Dense(8, activation="tanh"),
        layers.GaussianDropout(0.3),
        layers.Dense(8, activation="tanh"),
        layers.GaussianNoise(1.0),
    )


@exhibit()
def alpha_dropout():
    return stack((6,), layers.Dense(8, activation="selu"), layers.AlphaDropout(0.2), layers.Dense(6, activation="selu"))


@exhibit()
def noise_is_the_last_layer():
    x = inputs = keras.Input((4,), name="x")
    return keras.Model(inputs, layers.Dropout(0.3)(layers.Dense(2)(x)))


# Recurrent.


@exhibit()
def lstm_of_four_products():
    return stack(SEQUENCE, layers.LSTM(3, dropout=0.3, recurrent_dropout=0.2, implementation=1))


@exhibit()
def lstm_of_one_product_of_any_length():
    return stack(
        (None, 4), layers.LSTM(3, dropout=0.3, implementation=2, return_sequences=True), layers.GlobalMaxPooling1D()
    )


@exhibit()
def gru_reset_after():
    return stack(SEQUENCE, layers.GRU(3, dropout=0.3, recurrent_dropout=0.2, implementation=1, reset_after=True))


@exhibit()
def gru_reset_before():
    return stack(SEQUENCE, layers.GRU(3, dropout=0.3, recurrent_dropout=0.2, implementation=1, reset_after=False))


@exhibit()
def gru_of_one_product():
    x = inputs = keras.Input(SEQUENCE, name="series")
    after = layers.GRU(3, dropout=0.3, implementation=2, reset_after=True)(x)
    before = layers.GRU(3, dropout=0.3, implementation=2, reset_after=False, unroll=True)(x)
    return keras.Model(inputs, layers.Dense(1)(layers.Concatenate()([after, before])))


@exhibit()
def simple_rnn():
    return stack(SEQUENCE, layers.SimpleRNN(3, dropout=0.3, recurrent_dropout=0.2))


@exhibit()
def rnn_of_a_cell():
    return stack(SEQUENCE, layers.RNN(layers.GRUCell(3, dropout=0.3, recurrent_dropout=0.2), go_backwards=True))


@exhibit()
def stacked_cells():
    cells = [layers.LSTMCell(3, dropout=0.3), layers.GRUCell(4, recurrent_dropout=0.3), layers.SimpleRNNCell(3)]
    return stack(SEQUENCE, layers.RNN(layers.StackedRNNCells(cells)))


@exhibit()
def stacked_lstms():
    return stack(
        SEQUENCE,
        layers.LSTM(3, dropout=0.2, return_sequences=True),
        layers.LSTM(3, recurrent_dropout=0.2, return_sequences=True),
        layers.Dropout(0.2),
        layers.LSTM(3),
    )


@exhibit()
def bidirectional_lstm():
    return stack(SEQUENCE, layers.Bidirectional(layers.LSTM(3, dropout=0.3, recurrent_dropout=0.2)))


@exhibit()
def bidirectional_gru_summed():
    return stack(
        SEQUENCE,
        layers.Dropout(0.1),
        layers.Bidirectional(layers.GRU(3, dropout=0.3, return_sequences=True), merge_mode="sum"),
        layers.Flatten(),
    )


@exhibit()
def conv_lstm_2d():
    return stack((3, 4, 4, 2), layers.ConvLSTM2D(3, 2, dropout=0.3, recurrent_dropout=0.2), layers.Flatten())


@exhibit()
def embedding_with_mask_dropout_and_lstm():
    return stack(
        (6,), layers.Embedding(4, 5, mask_zero=True), layers.Dropout(0.3), layers.LSTM(3, dropout=0.3), dtype="int32"
    )


@exhibit()
def mask_into_a_nested_network():
    inner = keras.Sequential([keras.Input((6, 4)), layers.Dropout(0.2), layers.GRU(3, dropout=0.3)], name="inner")
    return stack((6,), layers.Embedding(4, 4, mask_zero=True), inner, dtype="int32")


@exhibit()
def masking_and_gru():
    return stack(
        SEQUENCE,
        layers.ReLU(),
        layers.Dense(4, activation="relu"),
        layers.Masking(0.0),
        layers.SpatialDropout1D(0.4),
        layers.GRU(3, recurrent_dropout=0.3),
    )


@exhibit()
def states_as_outputs():
    x = inputs = keras.Input(SEQUENCE, name="series")
    _, hidden, carry = layers.LSTM(3, dropout=0.4, return_state=True, unroll=True)(x)
    return keras.Model(inputs, [hidden, carry])


@exhibit()
def encoder_and_decoder():
    source, target = keras.Input(SEQUENCE, name="source"), keras.Input((3, 2), name="target")
    _, *state = layers.LSTM(3, dropout=0.3, return_state=True)(source)
    x = layers.LSTM(3, recurrent_dropout=0.3, return_sequences=True)(target, initial_state=state)
    return keras.Model([source, target], layers.Dense(2, activation="softmax")(x))


# Attention.


@exhibit()
def multi_head_attention():
    x = inputs = keras.Input(SEQUENCE, name="tokens")
    x = layers.Dense(4)(x)
    x = layers.Add()([x, layers.MultiHeadAttention(2, 3, dropout=0.3)(x, x)])
    x = layers.LayerNormalization()(x)
    return keras.Model(inputs, layers.Dense(3, activation="softmax")(layers.GlobalAveragePooling1D()(x)))


@exhibit()
def causal_attention_to_another_sequence():
    first, second = keras.Input(SEQUENCE, name="first"), keras.Input((3, 4), name="second")
    x = layers.MultiHeadAttention(2, 3, dropout=0.3)(layers.Dropout(0.2)(first), second)
    x = layers.MultiHeadAttention(2, 3, dropout=0.3)(x, x, use_causal_mask=True)
    return keras.Model([first, second], layers.Dense(1)(layers.Flatten()(x)))


@exhibit()
def attention_over_masked_tokens():
    x = inputs = keras.Input((6,), dtype="int32", name="tokens")
    x = layers.Embedding(4, 4, mask_zero=True)(x)
    x = layers.MultiHeadAttention(2, 3, dropout=0.3)(x, x)
    return keras.Model(inputs, layers.Dense(3, activation="softmax")(layers.GlobalAveragePooling1D()(x)))


@exhibit()
def grouped_query_attention():
    x = inputs = keras.Input(SEQUENCE, name="tokens")
    x = layers.GroupQueryAttention(3, 4, 2, dropout=0.3)(x, x)
    return keras.Model(inputs, layers.Dense(3, activation="softmax")(layers.Flatten()(x)))


@exhibit()
def dot_attention():
    query, value = keras.Input(SEQUENCE, name="query"), keras.Input((3, 4), name="value")
    x = layers.Attention(dropout=0.3)([layers.Dense(4)(query), value])
    return keras.Model([query, value], layers.Dense(3, activation="softmax")(layers.Flatten()(x)))


@exhibit()
def additive_attention():
    x = inputs = keras.Input(SEQUENCE, name="tokens")
    x = layers.AdditiveAttention(dropout=0.3, use_scale=False)([x, layers.Dropout(0.2)(x)])
    return keras.Model(inputs, layers.Dense(3, activation="softmax")(layers.Flatten()(x)))


@exhibit()
def positions_added_to_tokens():
    """A branch without a rows' axis: the same positions for every row and every draw."""
    x = inputs = keras.Input((6,), dtype="int32", name="tokens")
    x = layers.Embedding(4, 5)(x)
    positions = layers.Embedding(6, 5)(ops.arange(6))
    x = layers.Dropout(0.3)(x + positions)
    x = layers.Add()([x, positions[None] * 0.5])
    return keras.Model(inputs, layers.Dense(3, activation="softmax")(layers.Flatten()(x)))


# Shapes of networks.


@exhibit()
def nested_two_levels():
    inner = keras.Sequential([keras.Input((5,)), layers.Dense(6, activation="relu"), layers.Dropout(0.3)], name="inner")
    x = inputs = keras.Input((5,))
    outer = keras.Model(inputs, layers.Dense(4)(inner(layers.Dense(5)(x))), name="outer")
    return stack((5,), layers.Dense(5, activation="relu"), outer, layers.Dropout(0.2))


@exhibit()
def nested_with_two_inputs_and_outputs():
    a, b = keras.Input((3,)), keras.Input((3,))
    block = keras.Model([a, b], [layers.Dense(4)(a), layers.Dropout(0.5)(layers.Dense(4)(b))], name="block")
    first, second = keras.Input((3,), name="first"), keras.Input((3,), name="second")
    left, right = block([first, second])
    return keras.Model([first, second], layers.Dense(2, activation="softmax")(layers.Multiply()([left, right])))


@exhibit()
def nested_called_by_names():
    """In another order than its own: Keras matches a dict by name."""
    b, a = keras.Input((3,), name="b"), keras.Input((3,), name="a")
    block = keras.Model([b, a], layers.Dropout(0.4)(layers.Concatenate()([b * 5.0, a])), name="block")
    first, second = keras.Input((3,), name="first"), keras.Input((3,), name="second")
    return keras.Model([first, second], layers.Dense(1)(block({"b": first, "a": second})))


@exhibit()
def time_distributed_dropout():
    return stack(
        SEQUENCE,
        layers.TimeDistributed(layers.Dense(4, activation="relu")),
        layers.TimeDistributed(layers.Dropout(0.4, name="drop")),
        layers.Flatten(),
    )


@exhibit()
def time_distributed_network():
    step = keras.Sequential(
        [keras.Input((4,)), layers.Dense(5, activation="relu"), layers.Dropout(0.4), layers.Dense(2)]
    )
    return stack(SEQUENCE, layers.TimeDistributed(step), layers.Flatten())


@exhibit()
def time_distributed_over_any_length():
    x = inputs = keras.Input((None,), dtype="int32", name="tokens")
    x = layers.Dropout(0.2)(layers.Embedding(4, 5, mask_zero=True)(x))
    x = layers.TimeDistributed(layers.Dense(4, activation="relu"))(x)
    x = layers.LSTM(3, return_sequences=True)(x)
    return keras.Model(inputs, layers.TimeDistributed(layers.Dense(2, activation="softmax"))(x))


@exhibit()
def layers_called_as_keras_allows():
    """TensorFlow takes such names within another's scope only."""
    x = inputs = keras.Input((4,), name="x")
    x = layers.Dropout(0.3, name="_drop")(layers.Dense(4, activation="relu", name="-first")(x))
    return keras.Model(inputs, layers.Dense(2, activation="softmax", name="_answer")(x))


@exhibit()
def rows_on_the_second_axis_for_a_while():
    x = inputs = keras.Input(SEQUENCE, name="series")
    certain = ops.cumsum(ops.transpose(x, (1, 0, 2)), axis=0)
    x = ops.transpose(layers.Dropout(0.3)(x), (1, 0, 2)) * certain
    x = layers.Flatten()(ops.transpose(x, (1, 0, 2)))
    return keras.Model(inputs, layers.Dense(2, activation="softmax")(x))


@exhibit()
def one_dropout_layer_twice():
    """Masks of its own at each call, as in Keras."""
    x = inputs = keras.Input((6,), name="x")
    drop = layers.Dropout(0.4)
    x = drop(layers.Dense(6, activation="relu")(drop(x)))
    return keras.Model(inputs, layers.Dense(2, activation="softmax")(x))


@exhibit()
def siamese():
    x = inputs = keras.Input((4,))
    twin = keras.Model(inputs, layers.Dropout(0.4)(layers.Dense(6, activation="relu")(x)), name="twin")
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    distance = layers.Subtract()([twin(left), twin(right)])
    return keras.Model([left, right], layers.Dense(1, activation="sigmoid")(distance))


@exhibit()
def several_inputs_one_certain():
    image, facts = keras.Input((4, 4, 1), name="image"), keras.Input((3,), name="facts")
    seen = layers.Flatten()(layers.Conv2D(3, 2, activation="relu")(image))
    x = layers.Concatenate()([seen, layers.Dropout(0.4)(facts)])
    return keras.Model([image, facts], layers.Dense(1)(x))


@exhibit()
def several_outputs():
    x = inputs = keras.Input((5,), name="x")
    x = layers.Dropout(0.4)(layers.Dense(6, activation="relu")(x))
    outputs = [
        layers.Dense(3, activation="softmax", name="kind")(x),
        layers.Dense(1, activation="sigmoid", name="alarm")(x),
        layers.Dense(2, name="place")(layers.Dropout(0.2)(x)),
    ]
    return keras.Model(inputs, outputs)


@exhibit()
def inputs_and_outputs_by_name():
    inputs = {"b": keras.Input((3,), name="b"), "a": keras.Input((2,), name="a")}
    x = layers.Dropout(0.4)(layers.Concatenate()([inputs["a"], inputs["b"]]))
    return keras.Model(inputs, {"y": layers.Dense(1)(x), "p": layers.Dense(2, activation="softmax")(x)})


@exhibit()
def skip_connections():
    x = inputs = keras.Input((6,), name="x")
    before = layers.Dense(6, activation="relu")(x)
    after = layers.Dropout(0.4)(before)
    deep = layers.Dense(6, activation="relu")(after)
    x = layers.Concatenate()([layers.Add()([before, deep]), after, inputs])
    return keras.Model(inputs, layers.Dense(2, activation="softmax")(x))


@exhibit()
def certain_branch_read_late():
    x = inputs = keras.Input((6,), name="x")
    certain = layers.Dense(5, activation="tanh")(layers.Dense(8, activation="relu")(x))
    gate = layers.Dense(5, activation="sigmoid")(layers.Dropout(0.5)(x))
    return keras.Model(inputs, layers.Dense(1)(layers.Multiply()([gate, certain])))


@exhibit()
def operations_between_layers():
    x = inputs = keras.Input((4, 4), name="x")
    x = layers.Dropout(0.3)(x)
    x = ops.concatenate([ops.mean(x, axis=1), ops.max(x, axis=2)], axis=-1) * 2.0 + 1.0
    x = ops.expand_dims(x, 1) / (1.0 + ops.sum(ops.square(x), axis=-1, keepdims=True)[:, None])
    return keras.Model(inputs, ops.softmax(layers.Dense(3)(layers.Flatten()(x))))


@exhibit(options={"labels": ["a", "b", "c"]})
def average_of_two_answers():
    """The graph does not say that an average of probabilities is one: it shows in the values."""
    x = inputs = keras.Input((4,), name="x")
    heads = [layers.Dense(3, activation="softmax")(layers.Dropout(0.4)(x)) for _ in range(2)]
    return keras.Model(inputs, layers.Average()(heads))


@exhibit()
def a_class_for_each_step():
    return stack(SEQUENCE, layers.Dropout(0.3), layers.Conv1D(4, 3, padding="same", activation="relu"))


@exhibit()
def a_class_for_each_pixel():
    return stack((None, None, 1), layers.Conv2D(3, 3, padding="same"), layers.Dropout(0.3), layers.Conv2D(2, 1))


@exhibit()
def a_class_for_each_pixel_of_a_map_that_shrinks_and_grows():
    return stack(
        (None, None, 1),
        layers.Conv2D(3, 3, padding="same", activation="relu"),
        layers.MaxPooling2D(),
        layers.SpatialDropout2D(0.3),
        layers.UpSampling2D(),
    )


@exhibit()
def logits():
    model = keras.Sequential([keras.Input((5,), name="x"), layers.Dropout(0.4), layers.Dense(3)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


@exhibit(options={"task": "classification"})
def one_logit():
    return keras.Sequential([keras.Input((5,), name="x"), layers.Dropout(0.4), layers.Dense(1)])


@exhibit(options={"task": "regression"})
def several_yes_or_no_scores():
    return keras.Sequential([keras.Input((5,), name="x"), layers.Dropout(0.4), layers.Dense(4, activation="sigmoid")])


# What must stay in inference mode, preprocessing, precision, trunks.


@exhibit(same_as_training=False)
def batch_normalization():
    return stack(
        (4, 4, 2),
        layers.BatchNormalization(),
        layers.Conv2D(4, 2),
        layers.Dropout(0.3),
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.Flatten(),
    )


@exhibit(same_as_training=False)
def augmentation():
    return stack(
        (8, 8, 3),
        layers.RandomFlip(),
        layers.RandomRotation(0.2),
        layers.RandomContrast(0.2),
        layers.RandomHue(0.2, value_range=(0, 255)),
        layers.RandomSaturation(0.2, value_range=(0, 255)),
        layers.RandomSharpness(0.2, value_range=(0, 255)),
        layers.Rescaling(1 / 255),
        layers.Conv2D(3, 3),
        layers.Dropout(0.3),
        layers.Flatten(),
    )


@exhibit()
def words_and_numbers():
    word, code, size = (
        keras.Input((), dtype="string", name="word"),
        keras.Input((), dtype="int64", name="code"),
        keras.Input((1,), name="size"),
    )
    known = layers.StringLookup(vocabulary=["red", "green", "blue"], output_mode="one_hot")(word)
    listed = layers.IntegerLookup(vocabulary=[0, 2], output_mode="one_hot")(code)
    binned = layers.Discretization(bin_boundaries=[-0.5, 0.5], output_mode="one_hot")(size)
    hashed = layers.CategoryEncoding(num_tokens=4, output_mode="one_hot")(layers.Hashing(4)(word))
    x = layers.Dropout(0.3)(layers.Concatenate()([known, listed, binned, layers.Flatten()(hashed), size]))
    return keras.Model([word, code, size], layers.Dense(2, activation="softmax")(x))


@exhibit(words=("red and green", "blue", "", "the sky is not green"))
def text():
    x = inputs = keras.Input((), dtype="string", name="text")
    x = layers.TextVectorization(vocabulary=["red", "green", "blue", "sky"], output_sequence_length=5)(x)
    x = layers.Embedding(6, 4, mask_zero=True)(x)
    x = layers.Bidirectional(layers.GRU(3, dropout=0.3))(x)
    return keras.Model(inputs, layers.Dense(2, activation="softmax")(x))


def with_policy(policy: str, build: Callable[[], keras.Model]) -> keras.Model:
    usual = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        return build()
    finally:
        keras.config.set_dtype_policy(usual)


@exhibit(tolerance=4e-3)
def half_precision():
    return with_policy(
        "mixed_float16",
        lambda: stack((6,), layers.Dropout(0.3), layers.Dense(8, activation="relu"), layers.GaussianDropout(0.3)),
    )


@exhibit(tolerance=3e-2)
def brain_precision():
    return with_policy(
        "mixed_bfloat16",
        lambda: stack(SEQUENCE, layers.Dropout(0.3), layers.LSTM(4, dropout=0.3), layers.Dense(5, activation="relu")),
    )


@exhibit(tolerance=1e-5)
def double_precision():
    return with_policy("float64", lambda: stack((6,), layers.Dropout(0.3), layers.Dense(8, activation="relu")))


@exhibit(same_as_training=False)
def mobilenet_trunk():
    trunk = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, include_top=False, weights=None, pooling="avg")
    x = inputs = keras.Input((32, 32, 3), name="image")
    x = layers.Dropout(0.3)(trunk(x, training=False))
    return keras.Model(inputs, layers.Dense(3, activation="softmax")(x))


@exhibit(same_as_training=False, tolerance=1e-4)
def efficientnet_with_its_own_dropout():
    return keras.applications.EfficientNetB0(input_shape=(32, 32, 3), weights=None, classes=3)


@keras.saving.register_keras_serializable(package="zoo")
class Subclassed(keras.Model):
    def __init__(self, units: int = 6, **options: Any) -> None:
        super().__init__(**options)
        self.units = units
        self.visible, self.hidden = layers.Dropout(0.2, name="visible"), layers.Dropout(0.4, name="hidden_drop")
        self.first, self.second = layers.Dense(units, activation="relu"), layers.Dense(3, activation="softmax")

    def call(self, inputs, training=False):
        x = self.first(self.visible(inputs, training=training))
        if training:
            raise AssertionError("only the stochastic layers may run in training mode")
        return self.second(self.hidden(x, training=training))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@exhibit(options={"labels": ["a", "b", "c"]}, same_as_training=False)
def subclassed():
    model = Subclassed(name="subclassed")
    model(np.zeros((1, 4), np.float32))
    return model


def rows_of(manifest: Manifest, rows: int) -> dict[str, np.ndarray]:
    """Made-up rows by input name; free axes take 6."""
    chosen, random = ZOO[manifest.name], np.random.default_rng(3)

    def values(shape: tuple[int, ...], dtype: str) -> np.ndarray:
        if dtype == "string":
            return random.choice(np.array(chosen.words), shape)
        if dtype.startswith("int"):
            return random.integers(0, chosen.vocabulary, shape).astype(dtype)
        return random.normal(size=shape).astype(dtype)

    return {item.name: values((rows, *(size or 6 for size in item.shape)), item.dtype) for item in manifest.inputs}
