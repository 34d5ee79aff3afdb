"""The engine's figures against independent oracles: NumPy with the same masks, and all masks enumerated."""

import itertools
import math

import keras
import numpy as np
import pytest

from tests.models import networks, oracle

RATES = {0: 0.2, 1: 0.3, 2: 0.3}


def sonar_draws(model: keras.Model, rows: np.ndarray, seed: int, num_samples: int) -> np.ndarray:
    """Class probabilities [rows, draws, 2] in double precision, from the weights and the stream's definition alone."""
    mean, variance, *_ = [np.float64(weight) for weight in model.get_layer("scaling").get_weights()]
    scaled = (rows - mean) / np.sqrt(variance)
    dense = [
        [np.float64(weight) for weight in layer.get_weights()] for layer in model.layers if layer.name != "scaling"
    ]
    weights = [pair for pair in dense if pair]
    answers = []
    for draw in range(num_samples):
        x = scaled
        for layer, (kernel, bias) in enumerate(weights):
            mask = oracle.kept(seed, oracle.stream(layer), [draw], x.shape[1:], RATES[layer])[0]
            x = x * mask / (1 - RATES[layer]) @ kernel + bias
            x = np.maximum(x, 0) if layer < 2 else oracle.sigmoid(x)
        answers.append(np.concatenate([1 - x, x], axis=1))
    return np.stack(answers, axis=1)


@pytest.mark.parametrize("seed", [0, 7, -(2**63), 2**63 - 1])
def test_all_sonar_rows_equal_a_numpy_implementation_fed_with_the_same_masks(sonar, sonar_model, sonar_rows, seed):
    expected = oracle.statistics(sonar_draws(sonar_model, sonar_rows, seed, 200))
    found = sonar.sample(sonar_rows, 200, seed)
    assert expected["std"].max() > 0.1
    assert expected["mutual_information"].max() > 0.05
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5, err_msg=name)


def test_draws_equal_a_numpy_implementation_fed_with_the_same_masks(sonar, sonar_model, sonar_rows):
    found = sonar.draws(sonar_rows[:20], 50, 11)
    np.testing.assert_allclose(found, sonar_draws(sonar_model, sonar_rows[:20], 11, 50), atol=1e-5)


def test_default_answer_is_the_sample_at_the_manifests_number_and_seed(sonar, sonar_rows):
    manifest = sonar.manifest
    default = sonar.answer("mc_predict", sonar_rows)
    explicit = sonar.sample(sonar_rows, manifest.num_samples, manifest.seed)
    assert default.keys() == explicit.keys()
    for name, values in default.items():
        # Equal masks; a constant number of draws lets TensorFlow round one division otherwise.
        np.testing.assert_allclose(values, explicit[name], atol=1e-6, err_msg=name)


# Exact enumeration: ten units, 2 ** 10 masks, each with its probability.

TINY_ROWS = np.array([[0.4, -1.1, 0.9, 0.2], [2.0, 0.3, -0.7, -1.5], [-0.1, 0.0, 0.2, 0.1]], np.float32)


def enumerated() -> dict[str, np.ndarray]:
    """Exact moments over all masks of `tiny_net`: mean, variance [rows, 3], fourth central moment, entropies."""
    weights = [np.float64(weight) for weight in networks.tiny_net().get_weights()]
    masks = np.array(list(itertools.product([0, 1], repeat=10)), np.float64)
    first, second = masks[:, :4], masks[:, 4:]
    # The rates that 16-bit numbers give are the rates wanted: 0.25 and 0.5 are exact.
    chance = np.prod(np.where(first, 0.75, 0.25), axis=1) * 0.5**6
    x = TINY_ROWS[:, None] * first / 0.75
    x = np.tanh(x @ weights[0] + weights[1]) * second / 0.5
    probabilities = oracle.softmax(x @ weights[2] + weights[3])
    mean = np.einsum("m,rmk->rk", chance, probabilities)
    centred = probabilities - mean[:, None]
    entropies = oracle.entropy(probabilities)
    expected_entropy = entropies @ chance
    return {
        "mean": mean,
        "variance": np.einsum("m,rmk->rk", chance, centred**2),
        "fourth": np.einsum("m,rmk->rk", chance, centred**4),
        "mutual_information": oracle.entropy(mean) - expected_entropy,
        # Influence of one draw on the mutual information: its entropy's deviation and, by the chain rule, its mean's.
        "influence": np.sqrt(
            np.einsum(
                "m,rm->r",
                chance,
                (-(centred * np.log(mean)[:, None]).sum(axis=-1) - (entropies - expected_entropy[:, None])) ** 2,
            )
        ),
    }


def deviations(artifact, num_samples: int, seed: int) -> dict[str, np.ndarray]:
    """Errors of one run in units of their exact standard error."""
    exact, found = enumerated(), artifact.sample(TINY_ROWS, num_samples, seed)
    of_variance = np.sqrt((exact["fourth"] - exact["variance"] ** 2) / num_samples)
    return {
        "mean": (found["probabilities"] - exact["mean"]) / np.sqrt(exact["variance"] / num_samples),
        "variance": (found["std"].astype(np.float64) ** 2 - exact["variance"]) / of_variance,
        "mutual_information": (found["mutual_information"] - exact["mutual_information"])
        / (exact["influence"] / math.sqrt(num_samples)),
    }


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_200000_draws_agree_with_the_enumeration_of_all_masks_within_4_standard_errors(tiny, seed):
    for name, values in deviations(tiny, 200_000, seed).items():
        assert np.abs(values).max() < 4, name


def test_error_falls_as_the_root_of_the_number_of_draws(tiny):
    """Scaled by its standard error, the error has mean square 1 at every T: neither a bias nor a slower decay."""
    mean_squares = {
        num_samples: np.mean([deviations(tiny, num_samples, seed)["mean"] ** 2 for seed in range(100, 140)])
        for num_samples in (100, 1_000, 10_000)
    }
    # 40 seeds x 3 rows x 2 free classes, rows sharing masks: between 80 and 240 degrees of freedom.
    assert all(0.5 < value < 1.7 for value in mean_squares.values()), mean_squares


def test_seeds_are_independent_of_each_other(tiny):
    """The mean over seeds is as good as one long run: consecutive seeds do not repeat each other's draws."""
    runs = np.stack([tiny.sample(TINY_ROWS, 500, seed)["probabilities"] for seed in range(200, 300)])
    exact = enumerated()
    error = (runs.mean(axis=0) - exact["mean"]) / np.sqrt(exact["variance"] / (500 * 100))
    assert np.abs(error).max() < 4


@pytest.mark.parametrize("num_samples", [1, 0, -5])
def test_fewer_than_two_draws_are_refused(tiny, num_samples):
    with pytest.raises(Exception, match="num_samples: wanted at least 2 draws"):
        tiny.sample(TINY_ROWS, num_samples)


def test_two_draws_have_a_deviation_and_the_widest_interval(tiny):
    found, draws = tiny.sample(TINY_ROWS, 2, 5), tiny.draws(TINY_ROWS, 2, 5)
    np.testing.assert_allclose(found["std"], np.abs(draws[:, 0] - draws[:, 1]) / math.sqrt(2), atol=1e-6)
    assert (found["lower"] == 0).all()
    assert (found["upper"] == 1).all()


# The adaptive number of draws.


def test_adaptive_rows_equal_the_sample_at_their_own_number_of_draws(sonar, sonar_rows):
    found = sonar.adaptive(sonar_rows[:40], 0.01, 2000, 3)
    assert len(set(found["num_samples"].tolist())) > 2
    for row, num_samples in enumerate(found["num_samples"]):
        alone = sonar.sample(sonar_rows[row : row + 1], int(num_samples), 3)
        for name, values in alone.items():
            np.testing.assert_allclose(found[name][row], values[0], atol=2e-6, err_msg=f"{name}, row {row}")


def test_adaptive_rows_reach_the_tolerance_or_say_that_they_did_not(sonar, sonar_rows):
    found = sonar.adaptive(sonar_rows, 0.012, 500, 0)
    reached = found["standard_error"].max(axis=1) <= 0.012
    assert found["converged"].any()
    assert not found["converged"].all()
    assert (found["num_samples"] <= 500).all()
    assert (found["num_samples"][~found["converged"]] == 500).all()
    assert reached[found["converged"]].all()


def test_adaptive_answers_do_not_depend_on_batch_mates(sonar, sonar_rows):
    together = sonar.adaptive(sonar_rows[:12], 0.01, 1000, 1)
    for row in range(12):
        alone = sonar.adaptive(sonar_rows[row : row + 1], 0.01, 1000, 1)
        assert alone["num_samples"][0] == together["num_samples"][row]
        assert alone["converged"][0] == together["converged"][row]
        for name, values in alone.items():
            np.testing.assert_allclose(together[name][row], values[0], atol=1e-6, err_msg=name)


def test_identical_draws_are_no_proof_of_certainty(repository):
    """The stopping rule's error is at least 1/T for probabilities: 32 equal draws do not end at a tolerance of 0.01."""
    from models.artifact import publish
    from tests.models.artifacts import Artifact

    x = inputs = keras.Input((2,), name="x")
    x = keras.layers.Dropout(0.01)(x)
    model = keras.Model(inputs, keras.layers.Dense(1, activation="sigmoid", kernel_initializer="zeros")(x))
    artifact = Artifact(publish(model, name="constant", repository=repository))
    found = artifact.adaptive(np.ones((1, 2), np.float32), 0.01, 1000)
    assert found["std"].max() == 0
    assert found["converged"].all()
    assert 100 <= found["num_samples"][0] < 200
    tight = artifact.adaptive(np.ones((1, 2), np.float32), 0.0005, 1000)
    assert not tight["converged"].any()


@pytest.mark.parametrize("max_samples", [2, 31, 32, 33])
def test_adaptive_stops_at_the_maximum(sonar, sonar_rows, max_samples):
    found = sonar.adaptive(sonar_rows[:3], 0.0, max_samples, 0)
    assert found["num_samples"].tolist() == [max_samples] * 3
    assert not found["converged"].any()


def test_adaptive_refuses_fewer_than_two_draws(sonar, sonar_rows):
    with pytest.raises(Exception, match="wanted at least 2 draws"):
        sonar.adaptive(sonar_rows[:1], 0.1, 1)
