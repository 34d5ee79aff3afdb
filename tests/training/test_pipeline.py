import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from models import contract
from training import summary
from training.datasets import DATASETS, load
from training.pipeline import train
from training.plan import plan
from training.progress import Reporter
from training.splits import split


def trained(name, repository, **request):
    request = {"seed": 0, "num_samples": 20, "epochs": 2} | request
    return train(plan(name, repository=repository, **request), Reporter(quiet=True))


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_becomes_an_artifact_that_verifies_and_answers(name, tmp_path):
    published = trained(name, tmp_path)
    data = load(name)
    rows = split(data.y, data.task)
    assert published.folder == tmp_path / name / "1"
    manifest = contract.verify(published.folder)

    [output] = manifest.outputs
    assert (output.task, output.labels) == (data.task, list(data.labels) or None)
    [given] = manifest.inputs
    assert given.name == data.input_name
    assert given.features == data.features(rows.train)
    assert manifest.training_data is not None
    assert manifest.training_data.sha256 == data.sha256
    assert manifest.training["seed"] == 0
    assert manifest.num_samples == 20

    # The figures in the manifest are those of the served deterministic answer to the test rows.
    served = tf.saved_model.load(str(published.folder)).signatures
    answer = served["serving_default"](**{data.input_name: tf.constant(data.x[rows.test])})
    y = data.y[rows.test]
    if data.task == "regression":
        rmse = np.sqrt(np.mean((answer["mean"].numpy().astype(np.float64) - y) ** 2))
        assert manifest.metrics["test"]["rmse"] == pytest.approx(rmse, rel=1e-5)
    else:
        right = answer["probabilities"].numpy().argmax(axis=1) == y
        assert manifest.metrics["test"]["accuracy"] == right.mean()
        assert len({data.labels[data.y[row]] for row in example_numbers(manifest, data)}) == 2

    # And the draws' figures are those of the served mean of the draws: dropout does move the answer.
    assert set(published.mc_metrics) == set(manifest.metrics["test"])
    assert published.mc_metrics != manifest.metrics["test"]


def example_numbers(manifest, data):
    """Which rows of the data the manifest's examples are."""
    for example in manifest.examples:
        same = (data.x == np.array(example, np.float32)).reshape(len(data.x), -1).all(axis=1)
        [number] = np.flatnonzero(same)
        yield number


def weights(published):
    return [value.tobytes() for value in keras.models.load_model(published.folder / "model.keras").get_weights()]


def test_same_seed_publishes_the_same_weights_as_the_next_version_also_with_others_fitted_beside(tmp_path):
    alone = trained("sonar", tmp_path, seed=5)
    compared = trained("sonar", tmp_path, seed=5, compare=True)
    assert [published.folder.name for published in (alone, compared)] == ["1", "2"]
    assert weights(compared) == weights(alone)
    assert compared.manifest.metrics == alone.manifest.metrics

    assert [variant.name for variant in compared.variants] == ["visible and hidden", "baseline", "visible", "hidden"]
    kept = compared.manifest.training["comparison"]
    assert [entry["name"] for entry in kept] == ["baseline", "visible", "hidden"]
    assert len({entry["nll"] for entry in kept}) == 3

    document = json.loads(json.dumps(summary.document(compared)))
    assert document["variants"][1:] == kept
    # One row a network, one for the draws of the published one, one for the constant answer.
    assert summary.table(compared).row_count == 6
