"""The draws' own forms of Dense layers, padded and merged, and `mc_predict` in its forms: what takes them, and that no
answer is another for it.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from models import engine as engine_module
from models.artifact import publish
from models.engine import Engine
from models.merging import MERGED_BYTES, MERGED_ROWS
from models.network import Network
from models.padding import PADDED_BYTES
from tests.models.artifacts import Artifact
from tests.models.networks import scatter
from tests.models.reference import Reference

RANDOM = np.random.default_rng(4)
DRAWS = 20


def chain(*parts: layers.Layer, inputs: int = 13, units: int = 3, activation: str = "softmax") -> keras.Model:
    answer = layers.Dense(units, activation=activation, name="answer")
    return scatter(keras.Sequential([keras.Input((inputs,), name="row"), *parts, answer]), scale=1.5)


def plain() -> keras.Model:
    return chain(
        layers.Dropout(0.2, name="visible"),
        layers.Dense(24, activation="relu", name="first"),
        layers.Dropout(0.4, name="hidden"),
        layers.Dense(30, activation="tanh", use_bias=False, name="second"),
        layers.Dropout(0.3),
        units=1,
        activation="sigmoid",
    )


def normalized() -> keras.Model:
    return chain(
        layers.Dropout(0.2, name="visible"),
        layers.Dense(27, name="first"),
        layers.BatchNormalization(),
        layers.LeakyReLU(0.2),
        layers.Dropout(0.4, name="hidden"),
        layers.Dense(14, use_bias=False, name="second"),
        layers.BatchNormalization(),
        layers.Activation("elu"),
        layers.GaussianDropout(0.3),
    )


def bent() -> keras.Model:
    """Behind tanh no mask can be moved before it."""
    return chain(
        layers.Dropout(0.2, name="visible"),
        layers.Dense(60, activation="tanh", use_bias=False, name="first"),
        layers.AlphaDropout(0.3),
        layers.Dense(44, activation="gelu", name="second"),
        layers.GaussianNoise(0.3),
        layers.Dense(12, activation="selu", name="third"),
        layers.Dropout(0.3, noise_shape=(None, 1)),
    )


def over_units() -> keras.Model:
    """Softmax is of all units of one draw."""
    return chain(
        layers.Dropout(0.2, name="visible"),
        layers.Dense(60, activation="softmax", name="first"),
        layers.Dropout(0.3),
        layers.Dense(44, activation="relu", name="second"),
        layers.Dropout(0.3),
    )


def deep_in() -> keras.Model:
    """Layers before the first dropout, a nested model behind it, a branch around it."""
    parts = [keras.Input((28,)), layers.Dropout(0.3), layers.Dense(15, activation="relu", name="inside")]
    inner = keras.Sequential(parts, name="inner")
    row = keras.Input((13,), name="row")
    x = layers.Dense(30, activation="relu", name="before")(layers.Normalization(mean=0.1, variance=2.0)(row))
    x = layers.Dense(28, activation="relu", name="first")(layers.Dropout(0.3, name="visible")(x))
    y = layers.Dense(12, activation="relu", name="joined")(layers.Dropout(0.2, name="other")(row))
    x = layers.Concatenate()([inner(x), y])
    return scatter(keras.Model(row, layers.Dense(2, name="answer")(x)), scale=1.5)


def shared() -> keras.Model:
    """One dropout layer, called twice: each call has masks of its own."""
    drop = layers.Dropout(0.3, name="shared")
    row = keras.Input((13,), name="row")
    x = layers.Dense(30, activation="relu", name="first")(drop(row))
    return scatter(keras.Model(row, layers.Dense(1, name="answer")(drop(x))), scale=1.5)


# By network: the layers whose products are padded on either side, and the kernels that can hold masks, with these.
EXPECTED = {
    plain: ({"first", "second", "answer"}, {"first": ["visible", "hidden"]}),
    normalized: ({"first", "second", "answer"}, {"first": ["visible", "hidden"]}),
    bent: ({"first", "second", "third", "answer"}, {"first": ["visible"]}),
    over_units: ({"second", "answer"}, {}),
    deep_in: (set(), {"first": ["visible"], "joined": ["other"]}),
    shared: ({"first", "answer"}, {}),
}


def network_of(model: keras.Model) -> Network:
    return Network(keras.models.clone_model(model))


def padded_names(network: Network) -> set[str]:
    return {layer.layer.name for layer in network.padded.values()}


@pytest.mark.parametrize("build", EXPECTED)
def test_what_is_padded_and_merged(build):
    network = network_of(build())
    padded, merged = EXPECTED[build]
    assert padded_names(network) == padded
    for layer in network.padded.values():
        inputs, units = layer.kernel.shape
        # The first layer reads the rows as they are, the last one gives the answer as it is.
        assert inputs % 16 == 0 or layer.layer.name in ("first", "second")
        assert units % 16 == 0 or layer.layer.name == "answer"
    found = {
        site.dense.operation.name: [node.operation.name for node in (site.before, site.behind) if node is not None]
        for site in network.merge_sites()
    }
    assert found == merged


@pytest.fixture(scope="module", params=EXPECTED, ids=lambda build: build.__name__)
def published(request, tmp_path_factory) -> tuple[keras.Model, Artifact]:
    model = request.param()
    folder = tmp_path_factory.mktemp(request.param.__name__)
    return model, Artifact(publish(model, name=model.name.replace("_", "-"), repository=folder, num_samples=DRAWS))


def rows_of(count: int) -> np.ndarray:
    return RANDOM.normal(size=(count, 13)).astype("float32")


def test_draws_of_these_forms_are_those_of_masks_set_by_hand(published):
    model, artifact = published
    rows = rows_of(3)
    for seed in (0, 7):
        [expected] = Reference(model, artifact.manifest).draws({"row": rows}, 6, seed=seed)
        found = artifact.draws(rows, 6, seed=seed)
        assert np.ptp(expected, axis=1).max() > 1e-2
        if found.size == 2 * expected.size and artifact.manifest.outputs[0].task == "classification":
            expected = np.concatenate([1 - expected, expected], axis=-1)
        expected = expected.reshape(found.shape)
        np.testing.assert_allclose(found, expected, atol=2e-6, rtol=2e-5)


def test_each_form_gives_the_answers_of_the_signature(published):
    _, artifact = published
    forms = artifact.forms
    ends = sorted(forms)
    # From one row on, without a gap.
    assert [least for least, _ in ends] == [1, *(most + 1 for _, most in ends[:-1])]
    merges = bool(EXPECTED[next(build for build in EXPECTED if build.__name__ in str(artifact.folder))][1])
    assert [least for least, _ in ends] == ([1, MERGED_ROWS] if merges else [1])
    for (least, most), function in forms.items():
        for count in (least, min(least + 5, most)):
            rows = rows_of(count)
            expected = artifact.answer("mc_predict", rows)
            found = {name: value.numpy() for name, value in function(**artifact.tensors(rows)).items()}
            assert found.keys() == expected.keys()
            for name, values in expected.items():
                np.testing.assert_allclose(found[name], values, atol=5e-6, rtol=2e-5, err_msg=name)


def test_answers_of_the_merged_form_are_the_statistics_of_masks_set_by_hand(repository):
    model = normalized()
    artifact = Artifact(publish(model, name="merged", repository=repository, num_samples=DRAWS))
    rows = rows_of(MERGED_ROWS)
    function = artifact.forms[max(artifact.forms)]
    found = function(**artifact.tensors(rows))
    [draws] = Reference(model, artifact.manifest).draws({"row": rows}, DRAWS, seed=0)
    np.testing.assert_allclose(found["probabilities"], draws.mean(axis=1), atol=5e-6)
    np.testing.assert_allclose(found["std"], draws.std(axis=1, ddof=1), atol=5e-6)


def test_layers_that_others_read_or_that_gain_nothing_are_not_padded():
    row = keras.Input((13,), name="row")
    x = layers.Dropout(0.2)(row)
    read_twice = layers.Dense(30, activation="relu", name="also_added")(x)
    whole = layers.Dense(48, activation="relu", name="whole_vectors")(read_twice)
    little = layers.Dense(17, activation="relu", name="nearly_double")(whole)
    summed = layers.Dense(30, activation="softmax", name="over_all_units")(little)
    answer = layers.Dense(2, name="answer")(layers.Add()([read_twice, layers.Dense(30, name="added")(summed)]))
    assert padded_names(network_of(keras.Model(row, answer))) == set()


def test_kernels_are_padded_and_merged_for_as_long_as_there_is_room():
    def wide(units: int) -> keras.Model:
        return chain(
            layers.Dropout(0.2), layers.Dense(units, activation="relu", name="first"), layers.Dropout(0.2), inputs=units
        )

    def merges(units: int) -> bool:
        specs = [tf.TensorSpec([None, units])]
        return Engine(network_of(wide(units)), specs, num_samples=DRAWS).merged is not None

    most = int(np.sqrt(MERGED_BYTES / 4 / DRAWS)) // 16 * 16
    assert merges(most)
    assert not merges(most + 16)
    most = int(np.sqrt(PADDED_BYTES / 4)) // 16 * 16
    assert padded_names(network_of(wide(most - 20))) == {"first", "answer"}
    assert padded_names(network_of(wide(most + 12))) == set()


def test_layers_of_another_precision_before_and_between_are_honoured(repository):
    """Their outputs are of 16 bits; none of them is moved into a kernel of 32."""
    parts = [
        layers.Dropout(0.2, name="visible", dtype="bfloat16"),
        layers.Dense(30, activation="relu", name="first"),
        layers.Dropout(0.4, name="hidden", dtype="bfloat16"),
        layers.Dense(14, activation="relu", name="second"),
        layers.Dropout(0.2),
    ]
    model = chain(*parts)
    network = network_of(model)
    assert padded_names(network) == {"first", "second", "answer"}
    assert network.merge_sites() == []
    artifact = Artifact(publish(model, name="mixed", repository=repository, num_samples=DRAWS))
    rows = rows_of(3)
    [expected] = Reference(model, artifact.manifest).draws({"row": rows}, 6, seed=1)
    np.testing.assert_allclose(artifact.draws(rows, 6, seed=1), expected, atol=1e-2)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16"])
def test_draws_of_16_bits_are_as_near_those_of_32_as_keras_has_them(repository, policy):
    """What they are off masks set by hand is rounding, which differs with the order of products."""

    def model(dtype: str) -> keras.Model:
        row = keras.Input((13,), name="row")
        x = layers.Dropout(0.3, dtype=dtype)(row)
        for number, noise in enumerate([layers.Dropout, layers.AlphaDropout, layers.GaussianDropout]):
            x = layers.Dense(30, activation="tanh", name=f"dense_{number}", dtype=dtype)(x)
            x = noise(0.3, dtype=dtype)(x)
        return scatter(keras.Model(row, layers.Dense(2, name="answer", dtype=dtype)(x)), scale=1.5)

    rows = rows_of(8)
    half = model(policy)
    artifact = Artifact(publish(half, name=policy.replace("_", "-"), repository=repository, num_samples=DRAWS))
    # Its layers have the paths that the half one's have.
    [exact] = Reference(model("float32"), artifact.manifest).draws({"row": rows}, 20, seed=3)
    [of_keras] = Reference(half, artifact.manifest).draws({"row": rows}, 20, seed=3)
    found = artifact.draws(rows, 20, seed=3)
    spread = np.sqrt(np.mean((of_keras - exact) ** 2))
    assert spread > 1e-4
    assert np.sqrt(np.mean((found - exact) ** 2)) < 1.2 * spread
    summary = artifact.sample(rows, 20, seed=3)
    # Statistics are of 32 bits.
    np.testing.assert_allclose(summary["mean"], found.mean(axis=1), atol=2e-6)
    np.testing.assert_allclose(summary["epistemic_std"], found.std(axis=1, ddof=1), atol=2e-6)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_inputs_of_another_precision_are_merged_as_the_dropout_would_have_cast_them(repository, dtype):
    parts = [layers.Dropout(0.2), layers.Dense(16, activation="relu"), layers.Dropout(0.4)]
    row = keras.Input((13,), dtype=dtype, name="row")
    hidden = row
    for part in parts:
        hidden = part(hidden)
    model = keras.Model(row, layers.Dense(3, activation="softmax", name="answer")(hidden))
    artifact = Artifact(publish(model, name=dtype, repository=repository, num_samples=DRAWS))
    rows = rows_of(MERGED_ROWS).astype(dtype)
    expected = artifact.answer("mc_predict", rows)
    found = artifact.forms[max(artifact.forms)](row=tf.constant(rows))
    np.testing.assert_allclose(found["std"], expected["std"], atol=2e-6)
    [draws] = Reference(model, artifact.manifest).draws({"row": rows}, 6, seed=1)
    np.testing.assert_allclose(artifact.draws(rows, 6, seed=1), draws, atol=2e-6)


def test_layers_that_hand_a_mask_on_are_neither_padded_nor_merged(repository):
    """Keras hands the mask on with the rows, so that it runs these layers itself."""
    model = chain(
        layers.Dense(20),
        layers.Masking(),
        layers.Dropout(0.3),
        layers.Dense(30, activation="relu", name="first"),
        layers.Dropout(0.4),
        layers.Dense(30, activation="relu", name="second"),
        layers.Dropout(0.4),
    )
    network = network_of(model)
    assert padded_names(network) == set()
    assert network.merge_sites() == []
    artifact = Artifact(publish(model, name="handed-on", repository=repository, num_samples=DRAWS))
    rows = rows_of(3)
    [expected] = Reference(model, artifact.manifest).draws({"row": rows}, 6, seed=1)
    np.testing.assert_allclose(artifact.draws(rows, 6, seed=1), expected, atol=2e-6)


@pytest.mark.parametrize("masks", ["independent", "balanced"])
def test_masks_of_either_kind_are_merged(repository, masks):
    model = plain()
    artifact = Artifact(publish(model, name=f"of-{masks}", repository=repository, num_samples=DRAWS, masks=masks))
    rows = rows_of(MERGED_ROWS)
    expected = artifact.answer("mc_predict", rows)
    found = artifact.forms[max(artifact.forms)](**artifact.tensors(rows))
    np.testing.assert_allclose(found["probabilities"], expected["probabilities"], atol=2e-6)
    np.testing.assert_allclose(found["std"], expected["std"], atol=2e-6)


def test_nothing_is_merged_where_masks_are_not_kept_or_precision_is_half(repository, monkeypatch):
    half = publish(plain(), name="half", repository=repository, num_samples=DRAWS, precision="bfloat16")
    assert [least for least, _ in Artifact(half).forms] == [1]
    monkeypatch.setattr(engine_module, "KEPT_BYTES", 0)
    none_kept = publish(plain(), name="none-kept", repository=repository, num_samples=DRAWS)
    assert Artifact(none_kept).forms == {}


def test_few_draws_have_no_quantiles_and_no_forms(repository):
    assert Artifact(publish(plain(), name="few", repository=repository, num_samples=10)).forms == {}
