"""Every kind of network, packaged, reloaded in a fresh process, against masks set by hand and against Keras itself."""

from typing import Any

import keras
import numpy as np
import pytest

from models.artifact import publish
from models.contract import Manifest, read_manifest
from tests.models import oracle, zoo
from tests.models.process import fresh_python
from tests.models.reference import Reference, packed

# Keras says so of nested models, and hands them the mask all the same.
pytestmark = pytest.mark.filterwarnings("ignore:Layer 'inner' .* was passed an input with a mask")

ROWS, DRAWS, SEED = 3, 5, 11
MANY = 3000

FRESH = """
import sys
from pathlib import Path
import numpy as np
from tests.models.artifacts import Artifact

folder, draws, seed, many = Path(sys.argv[1]), *map(int, sys.argv[2:])
# One at a time, as they are published.
for name, place in map(str.split, sys.stdin):
    try:
        artifact = Artifact(Path(place))
        inputs = dict(np.load(folder / f"{name}-rows.npz"))
        last = {key: values[-1:] for key, values in inputs.items()}
        found = {
            "deterministic": artifact.answer("serving_default", inputs),
            "draws": artifact.answer("mc_draws", inputs, num_samples=draws, seed=seed),
            "alone": artifact.answer("mc_draws", last, num_samples=draws, seed=seed),
            "many": artifact.answer("mc_draws", last, num_samples=many, seed=seed + 1),
            "sample": artifact.sample(inputs, draws, seed),
        }
    except Exception as error:
        (folder / f"{name}-error.txt").write_text(f"{type(error).__name__}: {error}")
        continue
    flat = {f"{of}|{key}": values for of, answers in found.items() for key, values in answers.items()}
    np.savez(folder / f"{name}-answers.npz", **flat)
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory, request) -> dict[str, Any]:
    """What a fresh process says of every exhibit, and the models that they were made of."""
    folder = tmp_path_factory.mktemp("zoo")
    mine = [item for item in request.session.items if item.module is request.module and "shown" in item.fixturenames]
    wanted = {item.callspec.params["name"] for item in mine}
    models, places, failures = {}, {}, {}
    with fresh_python(FRESH, folder, DRAWS, SEED, MANY) as reader:
        for name in [name for name in zoo.ZOO if name in wanted]:
            try:
                models[name] = zoo.ZOO[name].build()
                place = publish(models[name], name=name, repository=folder / "artifacts", **zoo.ZOO[name].options)
            except Exception as error:
                failures[name] = error
                continue
            places[name] = place
            np.savez(folder / f"{name}-rows.npz", allow_pickle=False, **zoo.rows_of(read_manifest(place), ROWS))
            reader.write(f"{name} {place}\n")
            reader.flush()
    return {"folder": folder, "models": models, "places": places, "failures": failures}


class Exhibited:
    def __init__(self, shown: dict[str, Any], name: str) -> None:
        if name in shown["failures"]:
            raise shown["failures"][name]
        folder = shown["folder"]
        error = folder / f"{name}-error.txt"
        assert not error.exists(), error.read_text()
        self.model: keras.Model = shown["models"][name]
        self.manifest: Manifest = read_manifest(shown["places"][name])
        self.rows = dict(np.load(folder / f"{name}-rows.npz"))
        self.answers: dict[str, dict[str, np.ndarray]] = {}
        for key, values in np.load(folder / f"{name}-answers.npz").items():
            of, _, output = key.partition("|")
            self.answers.setdefault(of, {})[output] = values

    def reported(self, outputs: list[np.ndarray]) -> list[np.ndarray]:
        """The network's flat outputs as the quantities that the manifest announces."""
        found = []
        doubles = [values.astype(np.float64) for values in outputs]
        for values, output in zip(doubles, self.manifest.outputs, strict=True):
            if output.task == "regression":
                found.append(values[..., 0] if values.shape[-1] == 1 else values)
            elif values.shape[-1] == 1:
                logits = values.min() < 0 or values.max() > 1
                second = oracle.sigmoid(values) if logits else values
                found.append(np.concatenate([1 - second, second], axis=-1))
            else:
                logits = not np.allclose(values.sum(axis=-1), 1, atol=1e-2)
                found.append(oracle.softmax(values) if logits else values)
        return found

    def keras(self, rows: dict[str, np.ndarray], training: bool) -> list[np.ndarray]:
        tensors = {name: keras.ops.convert_to_tensor(values) for name, values in rows.items()}
        outputs = self.model(packed(self.model, list(tensors), tensors), training=training)
        return [keras.ops.convert_to_numpy(keras.ops.cast(item, "float32")) for item in keras.tree.flatten(outputs)]

    def named(self, of: str, name: str) -> list[np.ndarray]:
        """One quantity of every output."""
        return [self.answers[of][output.prefix + name] for output in self.manifest.outputs]

    def central(self, of: str) -> list[np.ndarray]:
        names = ["probabilities" if output.task == "classification" else "mean" for output in self.manifest.outputs]
        pairs = zip(self.manifest.outputs, names, strict=True)
        return [self.answers[of][output.prefix + name] for output, name in pairs]


@pytest.fixture(scope="module", params=zoo.ZOO)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def exhibited(shown, name) -> Exhibited:
    return Exhibited(shown, name)


def test_draws_are_those_of_masks_set_by_hand(exhibited, name):
    reference = Reference(exhibited.model, exhibited.manifest)
    expected = exhibited.reported(reference.draws(exhibited.rows, DRAWS, SEED))
    for found, wanted in zip(exhibited.named("draws", "draws"), expected, strict=True):
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, atol=zoo.ZOO[name].tolerance)
        assert np.ptp(wanted, axis=1).max() > 1e-3, "the draws do not differ: nothing is shown"


def test_row_alone_gets_the_same_draws(exhibited, name):
    slack = max(1e-6, zoo.ZOO[name].tolerance / 10)
    for together, alone in zip(exhibited.named("draws", "draws"), exhibited.named("alone", "draws"), strict=True):
        np.testing.assert_allclose(alone[0], together[-1], atol=slack)


def test_statistics_are_those_of_the_draws(exhibited):
    for found, values in zip(exhibited.central("sample"), exhibited.named("draws", "draws"), strict=True):
        np.testing.assert_allclose(found, values.mean(axis=1, dtype=np.float64), atol=2e-6)


def test_deterministic_answer_is_bit_equal_to_the_keras_model(exhibited):
    outputs = exhibited.keras(exhibited.rows, training=False)
    for found, wanted, values in zip(
        exhibited.central("deterministic"), exhibited.reported(outputs), outputs, strict=True
    ):
        if np.array_equal(wanted[..., -1].ravel(), values[..., -1].ravel()):
            # One sigmoid unit gives the second class; the first is its difference from 1.
            np.testing.assert_array_equal(found[..., -1], wanted[..., -1])
        np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("name", [key for key, item in zoo.ZOO.items() if item.same_as_training], scope="module")
def test_draws_have_the_distribution_of_keras_training_mode(shown, name):
    """Keras draws a mask for each row: one call on many copies of a row samples its distribution."""
    exhibited = Exhibited(shown, name)
    keras.utils.set_random_seed(5)
    copies = {key: np.repeat(values[-1:], MANY, axis=0) for key, values in exhibited.rows.items()}
    expected = exhibited.reported(exhibited.keras(copies, training=True))
    for found, wanted in zip(exhibited.named("many", "draws"), expected, strict=True):
        ours, theirs = found[0].astype(np.float64), wanted.astype(np.float64)
        variances = [sample.var(axis=0) for sample in (ours, theirs)]
        # Sums of products in another order: not noise.
        rounding = 1e-6 + zoo.ZOO[name].tolerance / 10
        of_mean = np.sqrt(sum(variances) / MANY) + rounding
        assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 5 * of_mean).all()
        fourths = [((sample - sample.mean(axis=0)) ** 4).mean(axis=0) for sample in (ours, theirs)]
        spread = sum(np.maximum(fourth - variance**2, 0) for fourth, variance in zip(fourths, variances, strict=True))
        of_variance = np.sqrt(spread / MANY) + rounding
        assert (np.abs(variances[0] - variances[1]) < 5 * of_variance).all()
