"""Arrays to answers: several outputs, and answers that are no numbers."""

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


def test_answers_are_grouped_by_output_where_there_are_several():
    several = manifest(
        ModelOutput(name="kind", prefix="kind_", task="classification", shape=[2], labels=["a", "b"]),
        ModelOutput(name="size", prefix="size_", task="regression", shape=[2]),
    )
    arrays = {
        "kind_probabilities": np.array([[0.25, 0.75]], np.float32),
        "size_mean": np.array([[1.5, 2.5]], np.float32),
    }
    written = orjson.loads(
        orjson.dumps(AnswerWriter(several).predictions(Outputs.whole(arrays)), option=orjson.OPT_SERIALIZE_NUMPY)
    )
    assert written == [{"kind": {"label": "b", "probabilities": {"a": 0.25, "b": 0.75}}, "size": {"mean": [1.5, 2.5]}}]


def test_what_a_regression_s_signatures_do_not_carry_is_absent():
    single = manifest(ModelOutput(name="y", task="regression", shape=[]))
    arrays = {name: np.array([1.0, 2.0], np.float32) for name in ("mean", "epistemic_std", "standard_error", "lower")}
    rows = AnswerWriter(single).uncertainties(Outputs.whole(arrays), [5, 6], [True, False], PredictionSets(single).at())
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
    [row] = AnswerWriter(several).uncertainties(Outputs.whole(arrays), [100], [True], sets.at(0.8))
    assert row["kind"]["prediction_set"] == ["a"]
    assert row["kind"]["abstain"]
    assert row["kind"]["novelty"] == 1
    assert row["size"]["interval"] == {"lower": -1, "upper": 3, "coverage": 0.8}
    assert "abstain" not in row["size"]
    assert (row["num_samples"], row["converged"]) == (100, True)
    assert sets.at(0.8).warnings == ()
    [row] = AnswerWriter(several).uncertainties(Outputs.whole(arrays), [100], [True], sets.at())
    assert row["size"]["interval"] == {"lower": None, "upper": None, "coverage": 0.9}
    assert sets.at().warnings == ("size: coverage 0.9: 9 calibration rows wanted, there are 4; intervals have no ends",)
