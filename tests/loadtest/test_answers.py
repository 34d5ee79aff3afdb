"""An answer's checks, on answers made by hand: each wrong number is named."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest

from loadtest import tensors
from loadtest.answers import AnswerError, Memory

ENTROPY = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
SAMPLED = {
    "label": "mine",
    "probabilities": {"mine": 0.75, "rock": 0.25},
    "std": {"mine": 0.2, "rock": 0.2},
    "standard_error": {"mine": 0.02, "rock": 0.02},
    "predictive_entropy": ENTROPY,
    "expected_entropy": ENTROPY - 0.1,
    "mutual_information": 0.1,
    "num_samples": 100,
    "converged": True,
}
# Of calibrated models; a set may be empty, or hold others than the label.
SETS = SAMPLED | {"prediction_set": ["mine", "rock"], "abstain": False, "novelty": 1.5}
INTERVAL = {"lower": 1.0, "upper": 5.0, "coverage": 0.9}
VALUE = {"mean": 3.0, "epistemic_std": 0.5, "standard_error": 0.05, "num_samples": 100, "converged": True}


def body(*predictions: dict[str, Any], **changes: Any) -> bytes:
    answer = {"model": {"name": "sonar", "version": "1"}, "seed": 0, "predictions": predictions}
    return json.dumps(answer | changes).encode()


def changed(prediction: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    prediction = copy.deepcopy(prediction)
    *parents, last = path.split(".")
    place = prediction
    for parent in parents:
        place = place[parent]
    place[last] = value
    return prediction


SPREAD = VALUE | {"aleatoric_std": 1.2, "std": 1.3, "interval": INTERVAL, "abstain": True, "novelty": 0.0}

# A class, and a number, for each of several places in a row.
PLACES: dict[str, Any] = {
    "label": [["mine", "rock"], ["mine", "mine"]],
    "probabilities": {"mine": [[0.75, 0.25], [0.75, 0.75]], "rock": [[0.25, 0.75], [0.25, 0.25]]},
    "std": {label: [[0.2, 0.1], [0.2, 0.2]] for label in ("mine", "rock")},
    "standard_error": {label: [[0.02, 0.01], [0.02, 0.02]] for label in ("mine", "rock")},
    "predictive_entropy": [[ENTROPY, ENTROPY], [ENTROPY, ENTROPY]],
    "expected_entropy": [[ENTROPY - 0.1, ENTROPY - 0.2], [ENTROPY, ENTROPY]],
    "mutual_information": [[0.1, 0.2], [0.0, 0.0]],
    "num_samples": 100,
    "converged": True,
    "novelty": 1.0,
}
MAP = VALUE | {"mean": [[1.0, 2.0, 3.0]], "epistemic_std": [[0.5, 0.1, 0.2]], "standard_error": [[0.05, 0.01, 0.02]]}


@pytest.mark.parametrize(
    "prediction",
    [
        SAMPLED,
        SETS,
        SETS | {"prediction_set": []},
        SETS | {"prediction_set": ["rock"]},
        VALUE,
        SPREAD,
        SPREAD | {"interval": {"lower": None, "upper": None, "coverage": 0.99}},
        VALUE | {"mean": [1.0, 2.0], "epistemic_std": [0.5, 0.1], "standard_error": [0.05, 0.01]},
        PLACES,
        MAP,
        {"object": PLACES, "depth": MAP, "num_samples": 100, "converged": True},
        # One output of each kind: the draws are the row's.
        {"object": SAMPLED, "depth": VALUE, "num_samples": 100, "converged": True},
    ],
    ids=[
        "classes",
        "a set",
        "an empty set",
        "a set without the label",
        "value",
        "calibrated value",
        "no ends",
        "values",
        "a class for each place",
        "a number for each place",
        "two outputs of several places",
        "two outputs",
    ],
)
def test_right_answer_passes_again_and_again(prediction):
    memory = Memory()
    for _ in range(2):
        memory.check_predict(body(prediction), [5])
        memory.check_uncertainty(body(prediction), [5], num_samples=100, seed=0)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("probabilities.mine", 0.76, "probabilities sum to 1.01"),
        ("probabilities.mine", 1.5, "probabilities.mine"),
        ("probabilities.mine", "0.75", "probabilities.mine"),
        ("probabilities.mine", math.nan, "probabilities.mine"),
        ("label", "rock", "label 'rock'"),
        ("predictive_entropy", -0.1, "predictive_entropy"),
        ("predictive_entropy", ENTROPY + 0.001, "predictive_entropy"),
        ("expected_entropy", -0.1, "expected_entropy"),
        ("mutual_information", 0.2, "mutual_information"),
        ("standard_error.mine", 0.03, "standard_error of mine"),
        ("std.rock", 0.3, "standard_error of rock"),
        ("num_samples", 99, "num_samples is 99, wanted 100"),
        ("converged", "yes", "converged"),
    ],
)
def test_wrong_number_of_a_class_answer_is_named(path, value, named):
    with pytest.raises(AnswerError, match=named):
        Memory().check_uncertainty(body(changed(SAMPLED, path, value)), [5], num_samples=100, seed=0)


@pytest.mark.parametrize(("path", "value"), [("standard_error", 0.06), ("epistemic_std", -1.0), ("mean", None)])
def test_wrong_number_of_a_regression_answer_is_named(path, value):
    with pytest.raises(AnswerError, match=path):
        Memory().check_uncertainty(body(changed(VALUE, path, value)), [5], num_samples=100, seed=0)


@pytest.mark.parametrize(
    ("prediction", "path", "value", "named"),
    [
        (SETS, "prediction_set", ["rock", "mine"], "in their order"),
        (SETS, "prediction_set", ["mine", "mine"], "each once"),
        (SETS, "prediction_set", ["gold"], "prediction_set is"),
        (SETS, "prediction_set", "mine", "prediction_set"),
        (SETS, "abstain", "false", "abstain"),
        (SETS, "abstain", 0, "abstain"),
        (SETS, "novelty", -0.1, "novelty"),
        (SPREAD, "interval.lower", 3.5, "wanted the mean in it"),
        (SPREAD, "interval.upper", 2.0, "wanted the mean in it"),
        (SPREAD, "interval.lower", None, "one end"),
        (SPREAD, "interval.coverage", 1.0, "coverage"),
        (SPREAD, "std", 1.7, "std is 1.7"),
        (SPREAD, "aleatoric_std", -1.2, "aleatoric_std"),
        (SPREAD, "abstain", 1, "abstain"),
    ],
)
def test_wrong_field_of_a_calibrated_answer_is_named(prediction, path, value, named):
    with pytest.raises(AnswerError, match=named):
        Memory().check_uncertainty(body(changed(prediction, path, value)), [5], num_samples=100, seed=0)


@pytest.mark.parametrize(
    ("prediction", "path", "value", "named"),
    [
        (PLACES, "probabilities.mine", [[0.75, 0.25], [0.75, 0.76]], "probabilities sum to 1.01"),
        (PLACES, "probabilities.mine", [[0.75, 0.25], [0.75, None]], "probabilities.mine"),
        (PLACES, "probabilities.mine", [[0.75, 0.25], [0.75]], "of the shapes"),
        (PLACES, "probabilities.mine", [0.75, 0.25], "wanted the same places"),
        (PLACES, "label", [["mine", "rock"], ["rock", "mine"]], "label 'rock' is not the one"),
        (PLACES, "label", [["mine", "rock"], ["mine", 1]], "label"),
        (PLACES, "label", "mine", "wanted the same places"),
        (PLACES, "predictive_entropy", [[ENTROPY, ENTROPY], [ENTROPY, 0.1]], "predictive_entropy is 0.1"),
        (PLACES, "predictive_entropy", ENTROPY, "wanted the same places"),
        (PLACES, "mutual_information", [[0.1, 0.2], [0.0, 0.1]], "mutual_information is 0.1"),
        (PLACES, "expected_entropy", [[0.1, 0.2], [0.0, -0.1]], "expected_entropy"),
        (PLACES, "std.rock", [[0.2, 0.1], [0.2, 0.3]], "standard_error of rock"),
        (PLACES, "standard_error.mine", [0.02, 0.01, 0.02, 0.02], "wanted the same places"),
        (MAP, "standard_error", [[0.05, 0.01, 0.03]], "standard_error is 0.03"),
        (MAP, "standard_error", [0.05, 0.01, 0.02], "wanted the same places"),
        (MAP, "mean", [[1.0, 2.0]], "wanted the same places"),
        (MAP, "mean", [[1.0, 2.0, "3.0"]], "mean"),
        (MAP, "epistemic_std", [[0.5, 0.1, -0.2]], "epistemic_std"),
    ],
)
def test_wrong_place_of_an_answer_is_named(prediction, path, value, named):
    with pytest.raises(AnswerError, match=named):
        Memory().check_uncertainty(body(changed(prediction, path, value)), [5], num_samples=100, seed=0)


def test_tensors_of_several_places_are_the_native_answers():
    names = ("probabilities", "std", "standard_error")
    outputs: dict[str, list[Any]] = {
        name: [[[[PLACES[name][label][i][j] for label in ("mine", "rock")] for j in (0, 1)] for i in (0, 1)]]
        for name in names
    }
    outputs |= {name: [PLACES[name]] for name in PLACES if name.endswith(("entropy", "information"))}
    table = tensors.Table("some", "x", (2, 2, 3), (), {"probabilities": (2, None, 2)})
    tensors.check_outputs(table, outputs)
    [found] = tensors.predictions(outputs, 1)
    assert found["label"] == [["0", "1"], ["0", "0"]]
    for name in names:
        assert found[name] == {"0": PLACES[name]["mine"], "1": PLACES[name]["rock"]}
    Memory().check_draws("some", [found], [0], 100, 0)
    with pytest.raises(AnswerError, match="probabilities is of shape"):
        tensors.check_outputs(table, {"probabilities": [[[0.25, 0.75]]]})


@pytest.mark.parametrize("is_flat", [True, False])
def test_tensors_of_v2_are_nested_by_their_shape(is_flat):
    nested = [[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[7.0, 8.0], [9.0, 10.0], [11.0, 12.0]]]
    data: list[Any] = [float(number) for number in range(1, 13)] if is_flat else nested
    tensor = {"name": "mean", "shape": [2, 3, 2], "datatype": "FP32", "data": data}
    head = json.dumps({"model_name": "some", "outputs": [tensor]}).encode()
    assert tensors.v2_outputs(head, None, "some") == {"mean": nested}


def test_tensors_of_a_calibrated_model_are_answers_too():
    rows: dict[str, list[Any]] = {"mean": [3.0, 4.0], "epistemic_std": [0.5, 0.5], "standard_error": [0.05, 0.05]}
    ends: dict[str, list[Any]] = {
        "interval_lower": [1.0, None],
        "interval_upper": [5.0, None],
        "abstain": [True, False],
    }
    found = tensors.predictions({**rows, **ends}, 2)
    assert [answer["interval"] for answer in found] == [{"lower": 1.0, "upper": 5.0}, {"lower": None, "upper": None}]
    Memory().check_draws("some", found, [0, 1], 100, 0)
    classes: dict[str, list[Any]] = {
        "probabilities": [[0.75, 0.25]],
        "std": [[0.2, 0.2]],
        "standard_error": [[0.02, 0.02]],
        "predictive_entropy": [ENTROPY],
        "expected_entropy": [ENTROPY - 0.1],
        "mutual_information": [0.1],
        "prediction_set": [[True, False]],
        "abstain": [False],
    }
    found = tensors.predictions(classes, 1)
    assert found[0]["prediction_set"] == ["0"]
    Memory().check_draws("some", found, [0], 100, 0)


def test_answer_for_another_seed_or_another_count_of_rows_is_refused():
    with pytest.raises(AnswerError, match="seed is 0, wanted 7"):
        Memory().check_uncertainty(body(SAMPLED), [5], num_samples=100, seed=7)
    with pytest.raises(AnswerError, match="1 predictions, wanted 2"):
        Memory().check_predict(body(SAMPLED), [5, 6])


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"model": {"name": "sonar"}, "predictions": []}', b"<html>"])
def test_content_of_another_form_is_refused(content):
    with pytest.raises(AnswerError, match="another form"):
        Memory().check_predict(content, [])


def test_same_row_must_get_the_same_answer_up_to_rounding():
    memory = Memory()
    memory.check_predict(body(SAMPLED), [5])
    shifted = changed(changed(SAMPLED, "probabilities.mine", 0.75 + 1e-6), "probabilities.rock", 0.25 - 1e-6)
    memory.check_predict(body(shifted), [5])
    other = changed(changed(SAMPLED, "probabilities.mine", 0.7501), "probabilities.rock", 0.2499)
    with pytest.raises(AnswerError, match=r"row 5 was answered differently before: probabilities\.mine is 0\.7501"):
        memory.check_predict(body(SAMPLED, other), [4, 5])
    # Another row, another version of the model: nothing to compare with.
    memory.check_predict(body(other), [6])
    memory.check_predict(body(other, model={"name": "sonar", "version": "2"}), [5])


def test_same_row_may_differ_between_seeds_and_numbers_of_draws():
    memory = Memory()
    memory.check_uncertainty(body(SAMPLED), [5], num_samples=None, seed=None)
    other = changed(SAMPLED, "expected_entropy", ENTROPY - 0.2) | {"mutual_information": 0.2}
    memory.check_uncertainty(body(other, seed=7), [5], num_samples=None, seed=7)
    with pytest.raises(AnswerError, match="row 5 was answered differently before"):
        memory.check_uncertainty(body(other), [5], num_samples=None, seed=None)
