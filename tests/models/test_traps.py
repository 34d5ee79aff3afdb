"""What Monte Carlo dropout is most often got wrong by: one test a trap, each by an oracle that shares no code with us.

Some stand in more detail elsewhere: test_invariants, test_layers, test_zoo, tests/training/test_scores.
"""

from __future__ import annotations

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from scipy.special import logsumexp
from scipy.stats import norm

from models.artifact import publish
from models.contract import ArtifactError
from models.holdout import KnownRows
from tests.models import networks
from tests.models.artifacts import Artifact
from tests.process import ROOT
from training import scores

RANDOM = np.random.default_rng(0)
ROWS = RANDOM.normal(size=(12, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Publishes a network of random weights; gives the artifact."""
    repository = tmp_path_factory.mktemp("traps")
    number = iter(range(100))

    def put(*stack, shape=(4,), scale=1.5, model=None, **options) -> Artifact:
        network = model or keras.Sequential([keras.Input(shape, name="x"), *stack])
        networks.scatter(network, scale=scale)
        return Artifact(publish(network, name=f"net-{next(number)}", repository=repository, **options))

    return put


def varies(draws: np.ndarray) -> bool:
    """Whether the draws [N, T, ...] of every row differ."""
    return bool((draws.std(axis=1) > 1e-4).reshape(len(draws), -1).any(axis=1).all())


def test_mask_does_not_depend_on_the_batch_position(tiny):
    rows = np.tile(ROWS[:1], (7, 1))
    draws = tiny.draws(rows, 20)
    np.testing.assert_allclose(draws, np.tile(draws[:1], (7, 1, 1)), atol=1e-6)
    assert varies(draws)


def test_batch_normalization_is_never_in_training_mode(norms):
    """In training mode an outlier in the batch moves its mates' answers."""
    images = RANDOM.uniform(size=(6, 8, 8, 1)).astype(np.float32)
    strange = images.copy()
    strange[-1] *= 1000
    np.testing.assert_allclose(norms.draws(images, 5)[:-1], norms.draws(strange, 5)[:-1], atol=1e-6)


def test_dropout_inside_a_nested_model_is_drawn(shelf):
    inner = keras.Sequential([keras.Input((4,)), layers.Dropout(0.5), layers.Dense(5, "relu")], name="inner")
    outer = keras.Sequential([keras.Input((4,)), inner, layers.Dense(4, "relu")], name="outer")
    artifact = shelf(outer, layers.Dense(3, "softmax"))
    assert varies(artifact.draws(ROWS, 30))
    [layer] = artifact.manifest.stochastic_layers
    assert layer.path.startswith("outer/inner/")


def test_dropout_inside_attention_is_drawn(shelf):
    x = keras.Input((5, 4), name="x")
    attended = layers.MultiHeadAttention(2, 3, dropout=0.5)(x, x)
    model = keras.Model(x, layers.Dense(3, "softmax")(layers.Flatten()(attended)))
    assert varies(shelf(model=model).draws(RANDOM.normal(size=(4, 5, 4)).astype(np.float32), 30))


def test_spatial_dropout_drops_whole_channels_though_it_subclasses_dropout(shelf):
    draws = shelf(layers.SpatialDropout1D(0.5), shape=(6, 3), task="regression").draws(
        np.ones((1, 6, 3), np.float32), 40
    )
    zero = draws[0] == 0
    assert np.all(zero.all(axis=1) == zero.any(axis=1))
    assert 0.2 < zero.mean() < 0.8


@pytest.mark.parametrize("cell", [layers.SimpleRNN, layers.GRU, layers.LSTM])
def test_recurrent_masks_are_one_a_sequence(shelf, cell):
    """A net that copies its input into its state, so that each step shows what the mask did to that step's input."""
    net = cell(3, activation="linear", return_sequences=True, dropout=0.5, use_bias=False, name="cell")
    artifact = shelf(net, shape=(6, 3), task="regression")
    network = keras.models.load_model(artifact.folder / "model.keras", compile=False)
    # No state from step to step: what differs between the steps of one draw is the mask.
    kernel, recurrent = network.get_layer("cell").get_weights()
    network.get_layer("cell").set_weights([kernel, np.zeros_like(recurrent)])
    sequence = np.ones((1, 6, 3), np.float32)
    bare = Artifact(publish(network, name="recurrent", repository=artifact.folder.parents[1], task="regression"))
    draws = bare.draws(sequence, 20)[0]
    if cell is layers.SimpleRNN:
        np.testing.assert_allclose(draws, np.tile(draws[:, :1], (1, 6, 1)), atol=1e-6)
    assert varies(draws[None])


@keras.saving.register_keras_serializable(package="traps")
class CellWithDropout(layers.Layer):
    """Its dropout is a layer, which draws anew at each step."""

    def __init__(self, **options):
        super().__init__(**options)
        self.state_size = 3
        self.drop = layers.Dropout(0.5, name="forget")

    def call(self, inputs, states, training=False):
        dropped = self.drop(inputs, training=training)
        return dropped, [dropped]


def test_one_mask_is_not_taken_for_all_steps_where_each_has_its_own(shelf):
    """The body of a loop is traced once, for all steps."""
    with pytest.raises(ArtifactError, match=r"^layer 'forget': it drops anew at each step of a loop[^\n]*$"):
        shelf(layers.RNN(CellWithDropout(), return_sequences=True), shape=(6, 3), task="regression")
    unrolled = layers.RNN(CellWithDropout(), return_sequences=True, unroll=True)
    draws = shelf(unrolled, shape=(6, 3), task="regression").draws(np.ones((1, 6, 3), np.float32), 40)[0]
    assert set(np.unique(draws)) == {0, 2}
    # Two steps agree in half of the places if their masks are independent.
    agreeing = (draws[:, 1:] == draws[:, :-1]).mean()
    assert 0.4 < agreeing < 0.6


@keras.saving.register_keras_serializable(package="traps")
class Mapped(layers.Layer):
    """Drops of each element along one axis of the input by itself, which is one mask for all of them in Keras."""

    def __init__(self, axis, **options):
        super().__init__(**options)
        self.axis = axis
        self.drop = layers.Dropout(0.5, name="forget")

    def build(self, shape):
        self.built = True

    def call(self, x, training=False):
        turned = keras.ops.moveaxis(x, self.axis, 0)
        dropped = keras.ops.vectorized_map(lambda part: self.drop(part, training=training), turned)
        return keras.ops.moveaxis(dropped, 0, self.axis)

    def compute_output_shape(self, shape):
        return shape

    def get_config(self):
        return {**super().get_config(), "axis": self.axis}


def test_a_vectorized_map_over_steps_has_one_mask_as_in_keras_and_over_rows_is_refused(shelf):
    steps = np.ones((2, 3, 4), np.float32)
    trained = Mapped(1)(steps, training=True).numpy()
    np.testing.assert_array_equal(trained, np.tile(trained[:, :1], (1, 3, 1)))
    draws = shelf(Mapped(1), shape=(3, 4), task="regression").draws(steps, 40)
    assert set(np.unique(draws)) == {0, 2}
    np.testing.assert_array_equal(draws, np.tile(draws[:1, :, :1], (2, 1, 3, 1)))
    with pytest.raises(ArtifactError, match=r"^layer 'forget': its noise falls on a tensor of shape \(4,\)[^\n]*$"):
        shelf(Mapped(0), task="regression")


def test_no_seed_generator_is_in_the_exported_graph(tiny):
    names = [variable.name for variable in getattr(tiny.loaded, "weights", [])]
    assert names
    assert not [name for name in names if "seed" in name]
    twice = [tiny.answer("mc_predict", ROWS) for _ in range(2)]
    tiny.sample(ROWS, 7, seed=99)
    twice.append(tiny.answer("mc_predict", ROWS))
    for name, values in twice[0].items():
        assert np.array_equal(values, twice[1][name])
        assert np.array_equal(values, twice[2][name])


@pytest.mark.parametrize("count", [2, 3, 10])
def test_variance_is_unbiased(tiny, count):
    """Over many seeds the mean of the variances of few draws is the variance of many."""
    found = np.mean([tiny.sample(ROWS, count, seed=seed)["std"] ** 2 for seed in range(400)], axis=0)
    wanted = tiny.sample(ROWS, 5000, seed=1)["std"] ** 2
    np.testing.assert_allclose(found.mean(), wanted.mean(), rtol=0.1)
    draws = tiny.draws(ROWS, count)
    np.testing.assert_allclose(tiny.sample(ROWS, count)["std"], draws.std(axis=1, ddof=1), atol=1e-6)


def test_entropy_of_a_one_hot_is_zero_and_not_below(shelf):
    certain = shelf(layers.Dropout(0.1), layers.Dense(3, "softmax"), scale=4000.0)
    answer = certain.sample(ROWS * 100, 20)
    assert (answer["probabilities"].max(axis=1) == 1).any()
    for name in ("predictive_entropy", "expected_entropy", "mutual_information"):
        assert np.isfinite(answer[name]).all()
        assert answer[name].min() >= 0
    assert answer["predictive_entropy"].min() == 0


def test_probabilities_are_averaged_and_not_logits(tiny):
    draws = tiny.draws(ROWS, 200).astype(np.float64)
    answer = tiny.sample(ROWS, 200)["probabilities"]
    np.testing.assert_allclose(answer, draws.mean(axis=1), atol=1e-6)
    logits = np.log(draws).mean(axis=1)
    of_logits = np.exp(logits - logsumexp(logits, axis=1, keepdims=True))
    assert np.abs(answer - of_logits).max() > 0.01


def test_draws_are_not_folded_one_way_and_unfolded_another(tiny):
    """Rows that are alike among themselves show it: what belongs to a row must not vary over the rows."""
    rows, count = np.stack([ROWS[0], ROWS[1], ROWS[0]]), 5
    draws = tiny.draws(rows, count)
    assert draws.shape[:2] == (3, count)
    np.testing.assert_allclose(draws[0], draws[2], atol=1e-6)
    assert np.abs(draws[0] - draws[1]).max() > 1e-3
    alone = np.stack([tiny.draws(row[None], count)[0] for row in rows])
    np.testing.assert_allclose(draws, alone, atol=1e-6)


def test_likelihood_is_of_each_row_and_not_of_the_draws_together():
    draws, y, noise = RANDOM.normal(size=(50, 8)), RANDOM.normal(size=8), 0.7
    wanted = -np.log(norm.pdf(y, draws, noise).mean(axis=0)).mean()
    joint = -(logsumexp(norm.logpdf(y, draws, noise).sum(axis=1)) - np.log(50)) / 8
    assert scores.regression(draws, noise, y)["nll"] == pytest.approx(wanted)
    assert abs(joint - wanted) > 0.05


def test_quantiles_of_too_few_draws_are_not_claimed(tiny, branches):
    few = tiny.sample(ROWS, 5)
    assert (few["lower"] == 0).all()
    assert (few["upper"] == 1).all()
    many = tiny.sample(ROWS, 200)
    assert many["lower"].max() > 0
    inputs = {"left": np.zeros((2, 3), np.float32), "right": np.zeros((2, 2), np.float32)}
    assert np.isinf(branches.sample(inputs, 5)["lower"]).all()


def test_conformal_scores_are_those_of_the_draws_that_are_served(shelf):
    x = RANDOM.normal(size=(60, 4)).astype(np.float32)
    y = RANDOM.integers(0, 3, 60)
    net = [layers.Dropout(0.5), layers.Dense(8, "relu"), layers.Dropout(0.5), layers.Dense(3, "softmax")]
    artifact = shelf(*net, num_samples=25, seed=3, holdout=KnownRows({"x": x}, [y]))
    served = artifact.answer("mc_predict", x)["probabilities"]
    np.testing.assert_allclose(served, artifact.sample(x, 25, seed=3)["probabilities"], atol=1e-6)
    calibration = artifact.manifest.calibrated(artifact.manifest.outputs[0])
    assert calibration is not None
    assert calibration.conformal is not None
    [found] = calibration.conformal.scores
    np.testing.assert_allclose(found, np.sort(1 - served[np.arange(60), y]), atol=2e-6)
    other = artifact.sample(x, 25, seed=4)["probabilities"]
    assert np.abs(np.sort(1 - other[np.arange(60), y]) - found).max() > 1e-3


def test_dropout_of_rate_0_is_refused_and_not_certain(shelf):
    with pytest.raises(ArtifactError, match="all rates are 0"):
        shelf(layers.Dropout(0.0), layers.Dense(3, "softmax"))


def test_the_deterministic_answer_is_no_stochastic_pass(tiny):
    network = keras.models.load_model(tiny.folder / "model.keras", compile=False)
    answer = tiny.answer("serving_default", ROWS)["probabilities"]
    assert np.array_equal(answer, network(ROWS, training=False).numpy())
    assert np.array_equal(answer, tiny.answer("serving_default", ROWS)["probabilities"])
    assert np.abs(tiny.draws(ROWS, 50) - answer[:, None]).max(axis=(1, 2)).min() > 1e-3


def test_no_keras_model_hangs_on_the_exported_module(tiny):
    """It would bring signatures and seed generators of its own."""
    assert set(tiny.loaded.signatures) == {"serving_default", "mc_predict", "mc_sample", "mc_draws"}
    assert not hasattr(tiny.loaded, "layers")
    assert not hasattr(tiny.loaded, "_seed_generators")
    integers = [weight for weight in tiny.loaded.weights if tf.as_dtype(weight.dtype).is_integer]
    assert not integers


def test_memory_does_not_grow_with_draws_times_rows(shelf):
    """20,000 draws of 64 rows of 512 units would be 2.6 GB in one piece."""
    net = [layers.Dropout(0.5), layers.Dense(512, "relu"), layers.Dropout(0.5), layers.Dense(2, "softmax")]
    folder = shelf(*net).folder
    code = (
        "import sys, resource, numpy as np, tensorflow as tf\n"
        f"sample = tf.saved_model.load({str(folder)!r}).signatures['mc_sample']\n"
        "rows = tf.constant(np.ones((64, 4), np.float32))\n"
        "ask = lambda count: sample(x=rows, num_samples=tf.constant(count), seed=tf.constant(5, tf.int64))\n"
        "ask(200)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "ask(20_000)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    # Kilobytes on Linux.
    assert int(result.stdout) < 400_000
