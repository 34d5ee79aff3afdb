"""Arrays to answers: several outputs, and answers that are no numbers."""

from typing import Any

import numpy as np
import orjson
import pytest

from models.contract import Calibration, Manifest, ModelOutput
from serving.answers import AnswerWriter
from serving.errors import InvalidRequest
from serving.outputs import Outputs
from serving.prediction_sets import PredictionSets
from tests.serving.manifests import made_up_manifest


def manifest(*outputs: ModelOutput) -> Manifest:
    return made_up_manifest(outputs=outputs)


def written(rows: list[orjson.Fragment]) -> list[dict[str, Any]]:
    """What a client reads."""
    return orjson.loads(orjson.dumps(rows))


def test_answers_are_grouped_by_output_where_there_are_several():
    several = manifest(
        ModelOutput(name="kind", prefix="kind_", task="classification", shape=[2], labels=["a", "b"]),
        ModelOutput(name="size", prefix="size_", task="regression", shape=[2]),
    )
    arrays = {
        "kind_probabilities": np.array([[0.25, 0.75]], np.float32),
        "size_mean": np.array([[1.5, 2.5]], np.float32),
    }
    rows = written(AnswerWriter(several).predictions(Outputs.whole(arrays)))
    assert rows == [{"kind": {"label": "b", "probabilities": {"a": 0.25, "b": 0.75}}, "size": {"mean": [1.5, 2.5]}}]


def test_what_a_regression_s_signatures_do_not_carry_is_absent():
    single = manifest(ModelOutput(name="y", task="regression", shape=[]))
    arrays = {name: np.array([1.0, 2.0], np.float32) for name in ("mean", "epistemic_std", "standard_error", "lower")}
    sets = PredictionSets(single)
    rows = written(AnswerWriter(single).uncertainties(Outputs.whole(arrays), [5, 6], [True, False], sets.at()))
    assert [set(row) for row in rows] == [{"mean", "epistemic_std", "standard_error", "num_samples", "converged"}] * 2
    assert [(row["num_samples"], row["converged"]) for row in rows] == [(5, True), (6, False)]


def test_an_answer_that_is_no_number_is_refused_by_its_row():
    single = manifest(ModelOutput(name="y", task="classification", shape=[2]))
    arrays = {"probabilities": np.array([[0.5, 0.5], [np.nan, np.nan]], np.float32)}
    with pytest.raises(InvalidRequest, match="row 1: the network overflows"):
        AnswerWriter(single).predictions(Outputs.whole(arrays))


def test_sets_intervals_and_warnings_are_of_their_output_where_there_are_several():
    several = manifest(
        ModelOutput(name="kind", prefix="kind_", task="classification", shape=[2], labels=["a", "b"]),
        ModelOutput(name="size", prefix="size_", task="regression", shape=[]),
    )
    outputs = {
        "kind": {
            "conformal": {"kind": "lac", "scores": [[0.5] * 9]},
            "abstention": {"statistic": "confidence", "threshold": 0.6, "answered_share": 0.9},
        },
        "size": {"conformal": {"kind": "interval", "scores": [[2.0] * 4]}},
    }
    several = several.model_copy(update={"calibration": Calibration.model_validate({"rows": 9, "outputs": outputs})})
    one, number = np.array([[0.55, 0.45]], np.float32), np.array([1.0], np.float32)
    arrays = {f"kind_{name}": one for name in ("probabilities", "std", "standard_error")}
    arrays |= {f"kind_{name}": number for name in ("predictive_entropy", "expected_entropy", "mutual_information")}
    arrays |= {f"size_{name}": number for name in ("mean", "epistemic_std", "aleatoric_std", "std", "standard_error")}
    arrays |= {"kind_novelty": number}
    sets = PredictionSets(several)
    [row] = written(AnswerWriter(several).uncertainties(Outputs.whole(arrays), [100], [True], sets.at(0.8)))
    assert row["kind"]["prediction_set"] == ["a"]
    assert row["kind"]["abstain"]
    assert row["kind"]["novelty"] == 1
    assert row["size"]["interval"] == {"lower": -1, "upper": 3, "coverage": 0.8}
    assert "abstain" not in row["size"]
    assert (row["num_samples"], row["converged"]) == (100, True)
    assert sets.at(0.8).warnings == ()
    [row] = written(AnswerWriter(several).uncertainties(Outputs.whole(arrays), [100], [True], sets.at()))
    assert row["size"]["interval"] == {"lower": None, "upper": None, "coverage": 0.9}
    assert sets.at().warnings == ("size: coverage 0.9: 9 calibration rows wanted, there are 4; intervals have no ends",)


def test_names_stay_what_they_are():
    labels = ["100 %", '"yes"', "%b", "\u00e4\n"]
    single = manifest(ModelOutput(name="y", task="classification", shape=[4], labels=labels))
    values = np.array([[0.125, 0.5, 0.25, 0.125], [0.0, 0.0, 1.0, 0.0]], np.float32)
    rows = written(AnswerWriter(single).predictions(Outputs.whole({"probabilities": values})))
    assert [row["label"] for row in rows] == ['"yes"', "%b"]
    assert [row["probabilities"] for row in rows] == [dict(zip(labels, row, strict=True)) for row in values.tolist()]


def test_classes_of_several_places_are_nested_lists_by_label():
    single = manifest(ModelOutput(name="y", task="classification", shape=[2, 3, 2], labels=["land", "sea"]))
    sea = np.random.default_rng(0).random((4, 2, 3)).astype(np.float32)
    both, half = np.stack([1 - sea, sea], axis=-1), np.full((4, 2, 3), 0.5, np.float32)
    arrays: dict[str, np.ndarray] = {"probabilities": both, "std": both / 2, "standard_error": both / 4}
    arrays |= dict.fromkeys(("predictive_entropy", "expected_entropy", "mutual_information"), half)
    writer, sets = AnswerWriter(single), PredictionSets(single)
    rows = written(writer.uncertainties(Outputs.whole(arrays), [9] * 4, [True] * 4, sets.at()))
    for row, own in zip(rows, both, strict=True):
        for label, values in zip(("land", "sea"), np.moveaxis(own, -1, 0), strict=True):
            np.testing.assert_array_equal(np.float32(row["probabilities"][label]), values)
            np.testing.assert_array_equal(np.float32(row["std"][label]), values / 2)
        assert row["label"] == np.where(own[..., 1] > 0.5, "sea", "land").tolist()
        assert row["predictive_entropy"] == half[0].tolist()
    plain = written(writer.predictions(Outputs.whole(arrays)))
    assert [row["label"] for row in plain] == [row["label"] for row in rows]
