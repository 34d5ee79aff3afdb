"""What a draw is: a row's answer depends on (row, artifact, number of draws, seed) and on nothing else."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models import engine
from models.artifact import publish
from tests.models import networks, oracle
from tests.models.artifacts import Artifact
from tests.models.process import python
from training.datasets import load

EQUAL = 1e-6

seeds = st.one_of(st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)]), st.integers(-(2**63), 2**63 - 1))
quick = settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


def inputs_of(artifact: Artifact, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    if artifact.manifest.name == "sonar":
        return {"features": load("sonar").x[:rows]}
    random = np.random.default_rng(seed)
    return {
        item.name: random.uniform(0, 1, (rows, *(size or 6 for size in item.shape))).astype(np.float32)
        for item in artifact.manifest.inputs
    }


def take(inputs: dict[str, np.ndarray], rows) -> dict[str, np.ndarray]:
    return {name: values[rows] for name, values in inputs.items()}


def assert_close(found, expected, name=""):
    np.testing.assert_allclose(found, expected, atol=EQUAL, rtol=0, err_msg=name)


def assert_equal(found, expected, rows=slice(None)):
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert_close(values, expected[name][rows], name)


@pytest.fixture(scope="module", params=["sonar", "tiny", "norms", "branches"])
def artifact(request) -> Artifact:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def batch(artifact):
    return inputs_of(artifact, 40)


@quick
@given(
    rows=st.lists(st.integers(0, 39), min_size=1, max_size=40),
    num_samples=st.sampled_from([2, 3, 100, 130, 700]),
    seed=seeds,
)
def test_row_answer_does_not_depend_on_batch_mates_order_or_batch_size(artifact, batch, rows, num_samples, seed):
    together = artifact.sample(batch, num_samples, seed)
    assert_equal(artifact.sample(take(batch, rows), num_samples, seed), together, rows)


@quick
@given(
    shorter=st.integers(2, 150), more=st.integers(1, 150), rows=st.integers(1, 40), other=st.integers(1, 40), seed=seeds
)
def test_first_draws_of_a_long_run_are_the_short_run(artifact, batch, shorter, more, rows, other, seed):
    """Draws are equal to 1e-6 across batch sizes; their masks, being the same numbers, are tested bit for bit below."""
    long = artifact.draws(take(batch, slice(rows)), shorter + more, seed)
    short = artifact.draws(take(batch, slice(other)), shorter, seed)
    both = min(rows, other)
    assert_close(short[:both], long[:both, :shorter])


@quick
@given(num_samples=st.integers(2, 300), seed=seeds)
def test_sample_is_the_statistics_of_the_draws(artifact, batch, num_samples, seed):
    found, draws = artifact.sample(batch, num_samples, seed), artifact.draws(batch, num_samples, seed)
    if "probabilities" in found:
        expected = oracle.statistics(draws)
        np.testing.assert_allclose(found["predictive_entropy"], expected["predictive_entropy"], atol=2e-6)
        np.testing.assert_allclose(found["mutual_information"], expected["mutual_information"], atol=2e-6)
        assert (found["mutual_information"] >= 0).all()
        np.testing.assert_allclose(found["probabilities"].sum(axis=-1), 1, atol=1e-6)
        mean, std = found["probabilities"], found["std"]
    else:
        mean, std = found["mean"], found["epistemic_std"]
        assert "aleatoric_std" not in found
        assert "std" not in found
    np.testing.assert_allclose(mean, draws.mean(axis=1, dtype=np.float64), atol=2e-6)
    np.testing.assert_allclose(std, draws.std(axis=1, ddof=1, dtype=np.float64), atol=1e-5)
    np.testing.assert_allclose(found["standard_error"], std / np.sqrt(num_samples), atol=1e-6)
    if num_samples >= 20:
        np.testing.assert_allclose(found["lower"], np.quantile(draws, 0.05, axis=1), atol=2e-6)
        np.testing.assert_allclose(found["upper"], np.quantile(draws, 0.95, axis=1), atol=2e-6)


@quick
@given(seed=seeds, other=seeds)
def test_same_seed_same_answer_another_seed_another(artifact, batch, seed, other):
    answer = artifact.draws(batch, 50, seed)
    np.testing.assert_array_equal(answer, artifact.draws(batch, 50, seed))
    if other != seed:
        assert np.abs(answer - artifact.draws(batch, 50, other)).max() > 1e-3


def test_extreme_seeds_all_differ(artifact, batch):
    extremes = [0, 1, -1, 2**32, 2**32 - 1, 2**63 - 1, -(2**63), 2**62]
    answers = {artifact.draws(batch, 20, seed).tobytes() for seed in extremes}
    assert len(answers) == len(extremes)


def test_draws_differ_from_each_other(artifact, batch):
    draws = artifact.draws(batch, 30, 4)
    # The smallest net has 256 masks, of which its dead units make some equal.
    assert len({draws[:, draw].tobytes() for draw in range(30)}) > 10


def test_no_rows_give_no_answers(artifact, batch):
    for values in artifact.sample(take(batch, slice(0)), 50).values():
        assert values.shape[0] == 0
    assert artifact.draws(take(batch, slice(0)), 50).shape[:2] == (0, 50)


NETS = {"tiny": networks.tiny_net, "norms": networks.batch_norm_net, "branches": networks.regression_net}


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """The same networks with chunks of other sizes, with and without kept masks."""
    repository = tmp_path_factory.mktemp("variants")
    settings_of = {
        "one draw a chunk": {"CHUNK_FLOATS": 1, "MIN_CHUNK_ROWS": 1, "MIN_FLAT_CHUNK_ROWS": 1},
        "one chunk, nothing kept": {"CHUNK_FLOATS": 2**28, "KEPT_BYTES": 0},
        "few rows a chunk, few kept": {
            "KEPT_BYTES": 4 * 20_000,
            "MIN_CHUNK_ROWS": 37,
            "MIN_FLAT_CHUNK_ROWS": 37,
            "CHUNK_FLOATS": 1,
        },
    }
    found = {}
    for number, (label, changes) in enumerate(settings_of.items()):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in changes.items():
                patch.setattr(engine, name, value)
            for net, build in NETS.items():
                found[label, net] = Artifact(publish(build(), name=f"{net}-{number}", repository=repository))
    return found


@pytest.mark.parametrize("label", ["one draw a chunk", "one chunk, nothing kept", "few rows a chunk, few kept"])
@pytest.mark.parametrize("net", NETS)
def test_answer_does_not_depend_on_chunks_or_kept_masks(request, variants, net, label):
    usual, other = request.getfixturevalue(net), variants[label, net]
    batch = inputs_of(usual, 5)
    for num_samples, seed in [(2, 0), (100, 0), (61, 0), (150, 0), (150, 9)]:
        assert_equal(other.sample(batch, num_samples, seed), usual.sample(batch, num_samples, seed))
        assert_close(other.draws(batch, num_samples, seed), usual.draws(batch, num_samples, seed))
    assert_equal(other.answer("mc_predict", batch), usual.answer("mc_predict", batch))
    assert_equal(other.adaptive(batch, 0.02, 300), usual.adaptive(batch, 0.02, 300))


def test_kept_masks_equal_the_drawn_ones_bit_for_bit(sonar):
    """The default seed's masks in the artifact, against the stream's definition."""
    for kept, (layer, units, rate) in zip(
        sonar.loaded.kept_masks, [(0, 60, 0.2), (1, 60, 0.3), (2, 30, 0.3)], strict=True
    ):
        values, added = np.split(kept.numpy(), [units], axis=1)
        assert not added.any()
        assert len(values) == engine.KEPT_DRAWS
        expected = oracle.kept(0, oracle.stream(layer), range(len(values)), (units,), rate)
        np.testing.assert_array_equal(values != 0, expected)
        np.testing.assert_allclose(values[expected], 1 / (1 - rate), rtol=1e-7)


def test_kept_masks_are_those_of_the_artifacts_own_seed(repository):
    model = networks.tiny_net()
    own = Artifact(publish(model, name="own-seed", repository=repository, num_samples=30, seed=-12345))
    assert own.manifest.seed == -12345
    batch = inputs_of(own, 3)
    values = own.loaded.kept_masks[0].numpy()
    expected = oracle.kept(-12345, oracle.stream(0), range(len(values)), (4,), 0.25)
    np.testing.assert_array_equal(values != 0, expected)
    assert_equal(own.answer("mc_predict", batch), own.sample(batch, 30, -12345))


def test_batch_normalization_is_bit_identical_after_mc(norms):
    """Neither the moving statistics nor any other variable of the artifact changes, whatever is asked of it."""
    before = {variable.name: variable.numpy().tobytes() for variable in norms.loaded.weights}
    assert sum("moving" in name for name in before) == 6
    batch = inputs_of(norms, 16)
    plain = norms.answer("serving_default", batch)
    norms.sample(batch, 300, 5)
    norms.answer("mc_predict", batch)
    norms.draws(batch, 30, 5)
    norms.adaptive(batch, 0.01, 300)
    assert {variable.name: variable.numpy().tobytes() for variable in norms.loaded.weights} == before
    np.testing.assert_array_equal(norms.answer("serving_default", batch)["probabilities"], plain["probabilities"])


def test_publishing_leaves_the_callers_model_as_it_was(repository, tmp_path):
    model = networks.batch_norm_net()
    batch = np.random.default_rng(0).uniform(size=(4, 8, 8, 1)).astype(np.float32)
    before = [weight.tobytes() for weight in model.get_weights()], model(batch, training=False).numpy().tobytes()
    classes = [type(layer) for layer in model.layers]
    publish(model, name="untouched", repository=repository)
    assert [weight.tobytes() for weight in model.get_weights()] == before[0]
    assert model(batch, training=False).numpy().tobytes() == before[1]
    assert [type(layer) for layer in model.layers] == classes
    noisy = [model(batch, training=True).numpy() for _ in range(2)]
    assert np.abs(noisy[0] - noisy[1]).max() > 1e-3


FRESH = """
import json, sys
import numpy as np
from pathlib import Path
from tests.models.artifacts import Artifact
from tests.models.process import python
from training.datasets import load
from tests.models.test_invariants import inputs_of
answers = {}
for folder in sys.argv[1:]:
    artifact = Artifact(Path(folder))
    batch = inputs_of(artifact, 9)
    answers[artifact.manifest.name] = {
        "draws": artifact.draws(batch, 60, 17).tolist(),
        **{name: values.tolist() for name, values in artifact.sample(batch, 60, 17).items()},
    }
json.dump(answers, sys.stdout)
"""


def test_reloaded_artifact_answers_the_same_in_a_fresh_process(sonar, tiny, norms, branches):
    ours = [sonar, tiny, norms, branches]
    fresh = json.loads(python(FRESH, *[artifact.folder for artifact in ours]))
    for artifact in ours:
        batch = inputs_of(artifact, 9)
        here = {"draws": artifact.draws(batch, 60, 17), **artifact.sample(batch, 60, 17)}
        there = {name: np.array(values, np.float32) for name, values in fresh[artifact.manifest.name].items()}
        assert_equal(there, here)
