"""BatchNormalization folded into the layer before it: what is folded, and that no answer is another for it."""

import keras
import numpy as np
import pytest
from keras import layers

from models.artifact import publish
from models.folding import folds_of
from models.network import Network
from tests.models.artifacts import Artifact
from tests.models.networks import scatter
from tests.models.reference import Reference

RANDOM = np.random.default_rng(2)


def folded_names(model: keras.Model) -> set[str]:
    return {fold.node.operation.name for fold in Network(keras.models.clone_model(model)).folds.values()}


def images() -> keras.Model:
    """Plain, depthwise and pointwise convolutions, before and behind the first dropout, some in a nested trunk."""
    x = inside = keras.Input((6, 6, 4))
    x = layers.Conv2D(6, 3, padding="same", name="nested")(x)
    x = layers.BatchNormalization()(x)
    trunk = keras.Model(inside, layers.ReLU()(x), name="trunk")
    x = inputs = keras.Input((6, 6, 2), name="image")
    x = layers.Conv2D(4, 3, strides=2, padding="same", use_bias=False, name="strided")(layers.UpSampling2D(2)(x))
    x = layers.BatchNormalization(center=False)(x)
    x = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=1, name="depthwise")(layers.ReLU(6.0)(x))
    x = trunk(layers.BatchNormalization(scale=False)(x))
    x = layers.SpatialDropout2D(0.3, name="drop")(x)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="multiplied", dilation_rate=2)(x)
    x = layers.BatchNormalization(epsilon=0.1)(x)
    x = layers.Conv2D(3, 1, name="pointwise")(layers.ReLU()(x))
    x = layers.Flatten()(layers.BatchNormalization()(x))
    x = layers.BatchNormalization()(layers.Dense(5, name="dense")(x))
    return keras.Model(inputs, layers.Dense(3, activation="softmax", name="answer")(x), name="images")


def series() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((7, 3), name="series"),
            layers.Conv1D(4, 3, padding="causal", name="causal"),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.DepthwiseConv1D(2, padding="same", depth_multiplier=3, name="depthwise"),
            layers.BatchNormalization(),
            layers.Dense(4, name="each_step"),
            layers.BatchNormalization(axis=2),
            layers.Flatten(),
            layers.Dense(2),
        ],
        name="series",
    )


def volume() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((3, 3, 3, 2), name="volume"),
            layers.Conv3D(4, 2, name="solid"),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.Flatten(),
            layers.Dense(1),
        ],
        name="volume",
    )


EXPECTED = {
    images: {"strided", "depthwise", "nested", "multiplied", "pointwise", "dense"},
    series: {"causal", "depthwise", "each_step"},
    volume: {"solid"},
}


@pytest.mark.parametrize("build", EXPECTED)
def test_folded_draws_are_the_networks_own_and_the_deterministic_answer_is_bit_equal(build, repository):
    model = scatter(build(), scale=3.0)
    assert folded_names(model) == EXPECTED[build]
    artifact = Artifact(publish(model, name=f"folded-{build.__name__}", repository=repository))
    [given] = artifact.manifest.inputs
    rows = RANDOM.normal(size=(3, *(size or 0 for size in given.shape))).astype("float32")
    [expected] = Reference(model, artifact.manifest).draws({given.name: rows}, 4, seed=3)
    found = artifact.draws(rows, 4, seed=3)
    assert np.ptp(expected, axis=1).max() > 1e-2
    np.testing.assert_allclose(found, expected.reshape(found.shape), atol=1e-5, rtol=1e-5)

    [point] = artifact.answer("serving_default", rows).values()
    plain = keras.ops.convert_to_numpy(model(rows, training=False))
    np.testing.assert_array_equal(point, plain.reshape(point.shape))


@keras.saving.register_keras_serializable(package="folding")
class Doubled(layers.Conv2D):
    def call(self, inputs):
        return 2 * super().call(inputs)


def test_what_is_more_than_a_product_and_a_normalization_is_left_alone():
    x = inputs = keras.Input((5, 5, 2))
    x = layers.BatchNormalization()(layers.Conv2D(3, 2, activation="relu", name="activated")(x))
    skipped = layers.Conv2D(3, 2, padding="same", name="read_twice")(x)
    x = layers.Add()([skipped, layers.BatchNormalization()(skipped)])
    x = layers.BatchNormalization(axis=1)(layers.Conv2D(3, 2, padding="same", name="other_axis")(x))
    x = layers.BatchNormalization()(Doubled(3, 2, name="own_class")(x))
    shown = layers.Conv2D(3, 2, name="also_an_output")(layers.Dropout(0.2)(x))
    x = layers.BatchNormalization()(shown)
    assert folded_names(keras.Model(inputs, [shown, x])) == set()


def test_layer_of_half_precision_is_not_folded():
    model = images()
    network = Network(keras.models.clone_model(model), precision="bfloat16")
    assert all(fold.is_exact for fold in network.folds.values())
    with network._in_precision():
        assert not any(fold.is_exact for fold in network.folds.values())


def test_kernels_are_folded_for_as_long_as_there_is_room_those_that_save_most_first():
    graph = images()
    sizes = {fold.node.operation.name: fold.kernel.shape.num_elements() * 4 for fold in folds_of([graph])}
    some = [fold.node.operation.name for fold in folds_of([graph], most_bytes=sizes["depthwise"] + sizes["strided"])]
    assert some == ["depthwise", "strided"]
    assert folds_of([graph], most_bytes=0) == []


def test_broken_statistics_are_not_folded():
    model = scatter(volume())
    norm = model.layers[1]
    norm.moving_variance.assign(np.full(norm.moving_variance.shape, np.inf))
    norm.gamma.assign(np.full(norm.gamma.shape, np.inf))
    assert folded_names(model) == {"solid"}  # of a clone with fresh weights
    with np.errstate(all="ignore"):
        assert folds_of([model._functional]) == []
