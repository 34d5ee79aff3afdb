"""The document describes answers of several places in a row, and of none."""

import copy
import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
import schemathesis

from models.artifact import publish
from serving.answers import AnswerWriter
from serving.openapi import document
from serving.outputs import Outputs
from serving.prediction_sets import PredictionSets
from serving.settings import Settings
from tests.models.artifacts import Artifact
from tests.models.networks import places_net, tiny_net

NETS = {
    "one class": (tiny_net, (4,)),
    "a class for each of six places": (lambda: places_net(4), (6, 3)),
    "a class for each place of a map": (lambda: places_net(3, (5, 4, 2)), (5, 4, 2)),
    "yes or no for each place": (lambda: places_net(1, activation="sigmoid"), (6, 3)),
    "as many places as asked": (lambda: places_net(4, (None, 3)), (7, 3)),
    "a number for each place": (lambda: places_net(1, (5, 4, 3), "linear"), (5, 4, 3)),
    "two numbers for each place": (lambda: places_net(2, activation="linear"), (6, 3)),
}


@pytest.mark.parametrize("name", NETS)
def test_answers_are_as_the_document_says(name, tmp_path):
    make, shape = NETS[name]
    answers, described = answered(publish(make(), name="net", repository=tmp_path), shape)
    for path, answer in answers.items():
        described[path]["POST"].validate_response(response(path, answer))
        for wrong in damaged(answer["predictions"][0]):
            bad = {**answer, "predictions": [wrong]}
            assert not described[path]["POST"].is_valid_response(response(path, bad)), wrong


def answered(folder: Path, shape: tuple[int, ...]) -> tuple[dict[str, Any], Any]:
    """Answers to two rows of this shape, by path, and the document."""
    artifact = Artifact(folder)
    manifest = artifact.manifest
    x = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    writer, sets = AnswerWriter(manifest), PredictionSets(manifest).at()
    rows = {
        "/predict": writer.predictions(Outputs.whole(artifact.answer("serving_default", x))),
        "/uncertainty": writer.uncertainties(Outputs.whole(artifact.sample(x, 30)), [30, 30], [True, True], sets),
    }
    model = {"name": "net", "version": "1"}
    answers = {
        path: orjson.loads(orjson.dumps({"model": model, "predictions": written, **seed}))
        for (path, written), seed in zip(rows.items(), ({}, {"seed": 0}), strict=True)
    }
    described = orjson.loads(orjson.dumps(document(manifest, Settings(), "test")))
    return answers, schemathesis.openapi.from_dict(described)


def response(path: str, answer: Any) -> httpx.Response:
    made = httpx.Response(200, json=answer, request=httpx.Request("POST", f"http://127.0.0.1{path}"))
    made.elapsed = datetime.timedelta()
    return made


def damaged(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The row with each member once as a list of what it is."""
    found = []
    for name, value in row.items():
        wrong = copy.deepcopy(row)
        wrong[name] = {label: [number] for label, number in value.items()} if isinstance(value, dict) else [value]
        found.append(wrong)
    return found
