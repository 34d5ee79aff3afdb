"""Columns of files against a model's inputs: what is taken and refused is what the HTTP reader takes and refuses."""

from __future__ import annotations

import datetime
import decimal
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from models.contract import MC_SAMPLE, Feature, Manifest, ModelInput, ModelOutput, Signature, SignatureTensor
from serving.errors import InvalidInstance
from serving.instances import InstanceReader
from serving.prediction_sets import PredictionSets
from serving.scoring.columns import AnswerColumns
from serving.scoring.errors import ScoreError
from serving.scoring.rows import RowReader
from training.tables import as_texts

KINDS = {"age": "float32", "visits": "int64", "member": "bool", "town": "string", "smokes": "float32"}


def manifest(*, nullable: bool, outputs: list[ModelOutput] | None = None, tensors: dict | None = None) -> Manifest:
    """A table of four types; `tensors`: what `mc_sample` gives, shapes by name."""
    inputs = []
    for name, dtype in KINDS.items():
        kind = {"member": "boolean", "smokes": "boolean", "town": "categorical"}.get(name, "numeric")
        may = nullable and dtype in ("float32", "string")
        feature = Feature.model_validate({"name": name, "kind": kind, "nullable": may})
        inputs.append(ModelInput(name=name, dtype=dtype, shape=[], features=[feature]))
    given = [SignatureTensor(name=name, dtype=kind, shape=shape) for name, (kind, shape) in (tensors or {}).items()]
    return Manifest(
        name="people",
        version=1,
        created="2026-01-01",
        inputs=inputs,
        outputs=outputs or [],
        stochastic_layers=[],
        num_samples=100,
        seed=0,
        signatures={MC_SAMPLE: Signature(inputs=[], outputs=given)},
        examples=[],
        library_versions={},
        files={},
    )


GOOD = {"age": 41.5, "visits": 3, "member": True, "town": "Bern", "smokes": False}
# Per column: values of a Parquet file, and the text of a CSV file that is the same.
TRIED: dict[str, list[tuple[Any, str | None]]] = {
    "age": [(0.0, "0"), (-1e-3, "-1e-3"), (3.5e38, "3.5e38"), (None, None), (float("inf"), "inf"), (7.0, " 7 ")],
    "visits": [(-4, "-4"), (2**40, str(2**40)), (None, None), (0, "0")],
    "member": [(False, "false"), (None, None), (True, "True")],
    "smokes": [(True, "true"), (False, "0"), (None, None)],
    "town": [("", None), ("Zürich", "Zürich"), (None, None)],
}
TYPES = {"age": pa.float64(), "visits": pa.int64(), "member": pa.bool_(), "town": pa.string(), "smokes": pa.bool_()}


def over_http(made: Manifest, row: dict) -> dict[str, np.ndarray] | str:
    """What the server makes of the row: arrays, or why not."""
    try:
        return InstanceReader(made).read([row])
    except InvalidInstance as error:
        return f"found {error.found}, wanted {error.wanted}"


@pytest.mark.parametrize("nullable", [False, True])
@pytest.mark.parametrize("column", KINDS)
def test_typed_columns_are_taken_and_refused_as_over_http(nullable, column):
    made = manifest(nullable=nullable)
    rows = [GOOD | {column: value} for value, _ in TRIED[column]]
    batch = pa.RecordBatch.from_pylist(rows, schema=pa.schema(list(TYPES.items())))
    found, reasons = RowReader(made, batch.schema, "file", is_text=False).read(batch)
    taken = {int(place): place_in for group in found for place_in, place in enumerate(group.places)}
    for number, row in enumerate(rows):
        wanted = over_http(made, row)
        if isinstance(wanted, str):
            assert wanted in reasons[number]
            continue
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[0].inputs[name][taken[number]], array[0])
    assert len(taken) + len(reasons) == len(rows)


@pytest.mark.parametrize("nullable", [False, True])
@pytest.mark.parametrize("column", [name for name in KINDS if name != "town"])
def test_text_is_taken_where_the_value_that_it_stands_for_is(nullable, column):
    made = manifest(nullable=nullable)
    good: dict[str, str | None] = {"age": "41.5", "visits": "3", "member": "true", "town": "Bern", "smokes": "0"}
    texts = pa.RecordBatch.from_pylist(
        [good | {column: text} for _, text in TRIED[column]], schema=pa.schema([(name, pa.string()) for name in KINDS])
    )
    values = pa.RecordBatch.from_pylist(
        [GOOD | {column: value} for value, _ in TRIED[column]], schema=pa.schema(list(TYPES.items()))
    )
    [of_text], refused = RowReader(made, texts.schema, "file", is_text=True).read(texts)
    [of_values], refused_values = RowReader(made, values.schema, "file", is_text=False).read(values)
    assert refused.keys() == refused_values.keys()
    for name in KINDS:
        np.testing.assert_array_equal(of_text.inputs[name], of_values.inputs[name])


@pytest.mark.parametrize("text", ["NA", "N/A", "null", "NULL", "nan", "#N/A"])
def test_text_for_a_missing_number_is_what_it_is_to_training(text):
    rows = [{"age": text, "visits": "3", "member": "true", "town": text, "smokes": text}]
    batch = pa.RecordBatch.from_pylist(rows, schema=pa.schema([(name, pa.string()) for name in KINDS]))
    [found], reasons = RowReader(manifest(nullable=True), batch.schema, "file", is_text=True).read(batch)
    assert np.isnan(found.inputs["age"]).all()
    assert np.isnan(found.inputs["smokes"]).all()
    assert found.inputs["town"].tolist() == [text]
    assert reasons == {}
    _, reasons = RowReader(manifest(nullable=False), batch.schema, "file", is_text=True).read(batch)
    assert list(reasons) == [0]


@pytest.mark.parametrize("text", ["+3", "+.5", "3.", "1E+5", "NAN", "-nan", " 3 "])
def test_a_number_is_one_whatever_stands_in_other_rows(text):
    row = {"age": text, "visits": "3", "member": "true", "town": "Bern", "smokes": "0"}
    batch = pa.RecordBatch.from_pylist([row, row | {"age": "old"}])
    [found], reasons = RowReader(manifest(nullable=True), batch.schema, "file", is_text=True).read(batch)
    np.testing.assert_array_equal(found.inputs["age"], [np.float32(text)])
    assert list(reasons) == [1]


@pytest.mark.parametrize("text", ["NA", "+3", ".5", "1."])
def test_a_row_is_refused_for_the_value_that_is_none(text):
    row = {"age": text, "visits": "3", "member": "maybe", "town": "Bern", "smokes": "NA"}
    batch = pa.RecordBatch.from_pylist([row])
    _, reasons = RowReader(manifest(nullable=True), batch.schema, "file", is_text=True).read(batch)
    assert reasons == {0: 'feature "member": found "maybe", wanted true or false'}


@pytest.mark.parametrize("text", ["1,5", "1_000", "0x10", "one", "--1", "1e", "True", "[1]", "1 2"])
def test_text_that_is_no_number_is_refused(text):
    row = {"age": text, "visits": text, "member": "true", "town": "Bern", "smokes": "0"}
    batch = pa.RecordBatch.from_pylist([row], schema=pa.schema([(name, pa.string()) for name in KINDS]))
    found, reasons = RowReader(manifest(nullable=True), batch.schema, "file", is_text=True).read(batch)
    assert found == []
    assert 'feature "age"' in reasons[0]


def test_columns_of_another_type_are_refused_at_once():
    columns = pa.schema([("age", pa.string()), *list(TYPES.items())[1:]])
    with pytest.raises(ScoreError, match="column 'age' is of type string, wanted float32"):
        RowReader(manifest(nullable=False), columns, "file", is_text=False)


@pytest.mark.parametrize(
    ("values", "categories"),
    [
        (pa.array([7, None, -2]), ["7", "", "-2"]),
        (pa.array([7.0, None, 1e10, 2.5, float("nan"), 1e300]), ["7", "", "10000000000", "2.5", "", "1e+300"]),
        (pa.array(np.array([2.5, np.nan, 7], np.float16)), ["2.5", "", "7"]),
        (pa.array([True, False, None]), ["true", "false", ""]),
        (pa.array([datetime.time(4, 5), None]), ["04:05:00.000000", ""]),
        (pa.array([datetime.date(2026, 1, 31), None]), ["2026-01-31", ""]),
        (pa.array([datetime.datetime(2026, 1, 31, 4, 5), None]), ["2026-01-31 04:05:00.000000", ""]),
        (pa.array([decimal.Decimal("1.50"), None]), ["1.50", ""]),
        (pa.array([3, None, 3]).dictionary_encode(), ["3", "", "3"]),
    ],
    ids=str,
)
def test_categories_of_any_type_are_those_that_training_makes_of_them(values, categories):
    assert as_texts(values).tolist() == categories
    batch = pa.RecordBatch.from_pylist([GOOD] * len(values), schema=pa.schema(list(TYPES.items())))
    batch = batch.set_column(batch.schema.get_field_index("town"), "town", values)
    [found], reasons = RowReader(manifest(nullable=True), batch.schema, "file", is_text=False).read(batch)
    assert found.inputs["town"].tolist() == categories
    assert reasons == {}


def test_bytes_are_no_category():
    columns = pa.schema(list((TYPES | {"town": pa.binary()}).items()))
    with pytest.raises(ScoreError, match="column 'town' is of type binary, wanted string"):
        RowReader(manifest(nullable=False), columns, "file", is_text=False)


@pytest.mark.parametrize("column", ["age", "smokes"])
def test_decimals_are_numbers(column):
    values = [decimal.Decimal("1"), decimal.Decimal("0"), decimal.Decimal("2.5"), None]
    rows = [GOOD | {column: value} for value in values]
    kinds = TYPES | {column: pa.decimal128(5, 2)}
    batch = pa.RecordBatch.from_pylist(rows, schema=pa.schema(list(kinds.items())))
    [found], reasons = RowReader(manifest(nullable=False), batch.schema, "file", is_text=False).read(batch)
    assert found.inputs[column].tolist() == ([1, 0, 2.5] if column == "age" else [1, 0])
    assert list(reasons) == ([3] if column == "age" else [2, 3])
    assert column == "age" or "found 2.5, wanted true or false" in reasons[2]


@pytest.mark.parametrize("column", ["member", "smokes"])
@pytest.mark.parametrize("kind", [pa.int8(), pa.uint8(), pa.int64(), pa.uint64(), pa.float32(), pa.decimal128(5, 2)])
def test_exactly_0_and_1_stand_for_truths(column, kind):
    values = [1, 0, 2, None, 1]
    rows = [GOOD | {column: value} for value in values]
    rows[4]["visits"] = None
    kinds = TYPES | {column: kind}
    batch = pa.RecordBatch.from_pylist(rows, schema=pa.schema(list(kinds.items())))
    [found], reasons = RowReader(manifest(nullable=False), batch.schema, "file", is_text=False).read(batch)
    assert found.inputs[column].tolist() == [1, 0]
    assert list(reasons) == [2, 3, 4]
    assert "found 2" in reasons[2]
    assert "wanted true or false" in reasons[2]
    assert reasons[4].startswith('feature "visits": ')


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.date32()), pa.large_list(pa.binary()), pa.decimal128(5, 2), pa.struct([("a", pa.int8())])]
)
def test_tensors_of_what_json_has_not_are_refused_at_once(kind):
    made = manifest(nullable=False).model_copy(update={"inputs": [ModelInput(name="x", dtype="float32", shape=[None])]})
    with pytest.raises(ScoreError, match=r"file: column 'x' is of type .*, wanted lists of float32"):
        RowReader(made, pa.schema([("x", kind)]), "file", is_text=False)
    for taken in (pa.list_(pa.float16()), pa.fixed_shape_tensor(pa.float32(), [2])):
        RowReader(made, pa.schema([("x", taken)]), "file", is_text=False)


def test_what_a_calibrated_model_with_two_outputs_gives_is_all_there():
    outputs = [
        ModelOutput(name="kind", prefix="kind_", task="classification", shape=[2], labels=["cat", "dog"]),
        ModelOutput(name="weight", prefix="weight_", task="regression", shape=[]),
    ]
    tensors: dict[str, tuple[str, list[Any]]] = {
        "kind_probabilities": ("float32", [None, 2]),
        "kind_novelty": ("float32", [None]),
        "kind_std": ("float32", [None, 2]),
        "kind_prediction_set": ("bool", [None, 2]),
        "kind_abstain": ("bool", [None]),
        "weight_mean": ("float32", [None]),
        "weight_interval_lower": ("float32", [None]),
        "novelty": ("float32", [None]),
    }
    known = manifest(nullable=False, outputs=outputs, tensors=tensors)
    columns = AnswerColumns(known, "p_", 30, PredictionSets(known).at())
    arrays = {
        name: np.arange(3 * math.prod(shape[1:])).reshape([3, *shape[1:]]).astype(kind)
        for name, (kind, shape) in tensors.items()
    }
    found = dict(zip([field.name for field in columns.fields], columns.make(arrays), strict=True))
    assert list(found) == [
        f"p_{name}"
        for name in (
            "kind_label",
            "kind_probability_cat",
            "kind_probability_dog",
            "kind_std",
            "kind_std_cat",
            "kind_std_dog",
            "kind_prediction_set",
            "kind_abstain",
            "kind_novelty",
            "weight_mean",
            "weight_interval_lower",
            "novelty",
            "num_samples",
        )
    ]
    assert found["p_kind_label"].to_pylist() == ["dog"] * 3
    assert found["p_kind_prediction_set"].to_pylist() == [["dog"], ["cat", "dog"], ["cat", "dog"]]
    assert found["p_kind_std"].to_pylist() == [1.0, 3.0, 5.0]
    assert found["p_num_samples"].to_pylist() == [30] * 3
