"""Reading rows for every kind of input, from manifests alone."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.contract import Feature, ModelInput
from serving.errors import InvalidField, InvalidInstance
from serving.instances import InstanceReader
from tests.serving.manifests import made_up_manifest


def reader(*inputs: ModelInput) -> InstanceReader:
    return InstanceReader(made_up_manifest(inputs))


def numeric(name: str, nullable: bool = False) -> Feature:
    return Feature(name=name, kind="numeric", nullable=nullable)


TABLE = ModelInput(name="features", dtype="float32", shape=[3], features=[numeric(name) for name in "abc"])
NULLABLE = ModelInput(
    name="features", dtype="float32", shape=[3], features=[numeric("a"), numeric("b", nullable=True), numeric("c")]
)
MIXED = [
    ModelInput(name="age", dtype="float32", shape=[], features=[numeric("age", nullable=True)]),
    ModelInput(name="visits", dtype="int64", shape=[], features=[numeric("visits")]),
    ModelInput(name="member", dtype="bool", shape=[], features=[Feature(name="member", kind="boolean")]),
    ModelInput(
        name="home_town",
        dtype="string",
        shape=[],
        features=[Feature(name="home town", kind="categorical", nullable=True)],
    ),
]
IMAGE = ModelInput(name="image", dtype="float32", shape=[2, 3, 1])
SEQUENCE = ModelInput(name="steps", dtype="float32", shape=[None, 2])
BRANCHES = [ModelInput(name="left", dtype="float32", shape=[3]), ModelInput(name="right", dtype="int32", shape=[2])]

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=3), children, max_size=4),
    max_leaves=20,
)


def test_lists_and_objects_give_the_same_matrix():
    lists = reader(TABLE).read([[1, 2.5, 3], [4, 5, 6]])["features"]
    objects = reader(TABLE).read([{"c": 3, "a": 1, "b": 2.5}, {"a": 4, "b": 5, "c": 6}])["features"]
    assert lists.dtype == np.float32
    np.testing.assert_array_equal(lists, [[1, 2.5, 3], [4, 5, 6]])
    np.testing.assert_array_equal(objects, lists)


def test_names_whose_blanks_hide_are_quoted():
    columns = [numeric(name) for name in ("a ", "b\xa0", "c")]
    blank = ModelInput(name="features", dtype="float32", shape=[3], features=columns)
    with pytest.raises(InvalidInstance) as refused:
        reader(blank).read([{"a": 1}])
    assert refused.value.wanted == r"one of 'a ', 'b\xa0', c"


def test_null_and_absent_names_are_missing_values_in_nullable_columns_only():
    by_list = reader(NULLABLE).read([[1, None, 3], [1, 2, 3]])["features"]
    by_name = reader(NULLABLE).read([{"a": 1, "c": 3}, {"a": 1, "b": 2, "c": 3}])["features"]
    assert math.isnan(by_list[0, 1])
    np.testing.assert_array_equal(by_name, by_list)
    with pytest.raises(InvalidInstance, match='row 0, feature "a": found null, wanted a finite float32 number'):
        reader(NULLABLE).read([[None, 2, 3]])
    with pytest.raises(InvalidInstance, match='row 0, feature "b": found NaN'):
        reader(NULLABLE).read([[1, math.nan, 3]])


def test_a_table_of_several_types_has_one_array_a_column():
    rows = [[41.5, 3, True, "Ulm"], {"age": None, "visits": 0, "member": False}]
    arrays = {name: array.tolist() for name, array in reader(*MIXED).read(rows[:1]).items()}
    assert arrays == {"age": [41.5], "visits": [3], "member": [True], "home_town": ["Ulm"]}
    missing = reader(*MIXED).read(rows[1:])
    assert math.isnan(missing["age"][0])
    assert missing["home_town"].tolist() == [""]


def column(name: str, kind: str, dtype: str, nullable: bool) -> ModelInput:
    feature = Feature.model_validate({"name": name, "kind": kind, "nullable": nullable})
    return ModelInput(name=name, dtype=dtype, shape=[], features=[feature])


def test_a_boolean_that_may_be_missing_is_a_number_in_the_graph_only():
    smoker = reader(column("smoker", "boolean", "float32", nullable=True))
    values = smoker.read([[True], [False], [None], [1]])["smoker"]
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, [1, 0, math.nan, 1])
    for wrong in (0.5, "true", math.nan):
        with pytest.raises(InvalidInstance, match=r'row 1, feature "smoker": found .*, wanted true or false or null'):
            smoker.read([[True], [wrong]])


def test_an_empty_category_is_a_missing_one():
    may = reader(column("town", "categorical", "string", nullable=True))
    assert may.read([[""], [None]])["town"].tolist() == ["", ""]
    must = reader(column("town", "categorical", "string", nullable=False))
    # A category that nobody has seen is none to refuse.
    assert must.read([["Atlantis"]])["town"].tolist() == ["Atlantis"]
    for wrong in ("", None):
        with pytest.raises(
            InvalidInstance, match=r'row 0, feature "town": found .*, wanted a string that is not empty'
        ):
            must.read([[wrong]])


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ([41.5, 3.0, True, "Ulm"], 'feature "visits": found 3.0, wanted an integer'),
        ([41.5, 2**63, True, "Ulm"], 'feature "visits": found 9223372036854775808, wanted an integer from'),
        ([41.5, 3, 1, "Ulm"], 'feature "member": found 1, wanted true or false'),
        ([41.5, 3, True, 7], 'feature "home town": found 7, wanted a string or null'),
        ([41.5, 3, True, "\ud800"], 'feature "home town": found "\\ud800", wanted a string or null'),
    ],
)
def test_a_table_of_several_types_refuses_by_column(row, named):
    with pytest.raises(InvalidInstance) as refused:
        reader(*MIXED).read([row])
    assert f"row 0, {named}" in str(refused.value)


@pytest.mark.parametrize(
    ("inputs", "row"),
    [
        ([NULLABLE], {"features": [1, 2, 3], "extra": 1}),
        ([NULLABLE], {"features": {"features": [1, 2, 3], "extra": 1}}),
        (MIXED, {"age": 41.5, "visits": 3, "member": True, "home_town": "Ulm", "extra": 1}),
    ],
)
def test_beside_a_table_s_inputs_the_name_that_is_none_is_refused(inputs, row):
    with pytest.raises(InvalidInstance, match='row 0, feature "extra": found an unknown input, wanted one of '):
        reader(*inputs).read([row])


def test_an_image_is_a_nested_list_or_an_object_with_its_input():
    pixels = [[[1], [2], [3]], [[4], [5], [6]]]
    plain = reader(IMAGE).read([pixels, pixels])["image"]
    assert plain.shape == (2, 2, 3, 1)
    np.testing.assert_array_equal(plain[1], pixels)
    np.testing.assert_array_equal(reader(IMAGE).read([{"image": pixels}, {"image": pixels}])["image"], plain)


@pytest.mark.parametrize(
    ("pixels", "named"),
    [
        (
            [[[1], [2], [3]]],
            'feature "image": found a list of 1, wanted a list of 2: float32 values of shape [2, 3, 1]',
        ),
        ([[[1], [2], [3]], [[4], [5]]], 'feature "image[1]": found a list of 2, wanted a list of 3'),
        ([[[1], [2], [3]], [[4], [True], [6]]], 'feature "image[1][1][0]": found true, wanted a finite float32'),
        ([[[1], [2], [3]], [[4], 5, [6]]], 'feature "image[1][1]": found 5, wanted float32 values of shape'),
        ([[[1], [2], [3]], "456"], 'feature "image[1]": found "456", wanted float32 values of shape'),
    ],
)
def test_a_wrong_image_is_refused_by_its_place(pixels, named):
    good = [[[1], [2], [3]], [[4], [5], [6]]]
    with pytest.raises(InvalidInstance) as refused:
        reader(IMAGE).read([good, pixels])
    assert f"row 1, {named}" in str(refused.value)


def test_an_object_of_inputs_holds_no_other():
    instance: Any = [1.0, 2.0, 3.0]
    for _ in range(600):
        instance = {"features": instance}
    with pytest.raises(InvalidInstance, match="found an object of the model's inputs within another"):
        reader(TABLE).read([instance])


def test_a_free_axis_may_have_any_length_that_all_rows_share():
    assert reader(SEQUENCE).read([[[1, 2], [3, 4], [5, 6]]])["steps"].shape == (1, 3, 2)
    with pytest.raises(InvalidInstance, match=r'row 1, feature "steps": found shape \[1, 2\], wanted the first row'):
        reader(SEQUENCE).read([[[1, 2], [3, 4]], [[1, 2]]])
    with pytest.raises(InvalidInstance, match='row 0, feature "steps": found an empty list'):
        reader(SEQUENCE).read([[]])


def test_several_inputs_are_objects_by_input_name():
    arrays = reader(*BRANCHES).read([{"left": [1, 2, 3], "right": [4, 5]}, {"right": [9, 8], "left": [7, 6, 5]}])
    np.testing.assert_array_equal(arrays["left"], np.array([[1, 2, 3], [7, 6, 5]], np.float32))
    np.testing.assert_array_equal(arrays["right"], np.array([[4, 5], [9, 8]], np.int32))
    with pytest.raises(InvalidInstance, match='row 0, feature "right": found no value'):
        reader(*BRANCHES).read([{"left": [1, 2, 3]}])
    with pytest.raises(InvalidInstance, match='row 0, feature "up": found an unknown input, wanted one of left, right'):
        reader(*BRANCHES).read([{"left": [1, 2, 3], "right": [4, 5], "up": []}])
    with pytest.raises(InvalidInstance, match="row 0: found a list of 3, wanted an object"):
        reader(*BRANCHES).read([[1, 2, 3]])


@pytest.mark.parametrize("inputs", [[TABLE], [NULLABLE], MIXED, [IMAGE], [SEQUENCE], BRANCHES])
@given(instances=ANY_JSON)
def test_whatever_is_sent_is_read_or_refused_with_one_line(inputs, instances):
    message = ""
    try:
        arrays = reader(*inputs).read(instances)
    except (InvalidField, InvalidInstance) as refused:
        message = str(refused)
    else:
        for item in inputs:
            assert len(arrays[item.name]) == len(instances)
    assert "\n" not in message
    assert message.encode().decode() == message


finite = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.integers(-(10**6), 10**6)


@given(rows=st.lists(st.lists(finite, min_size=3, max_size=3), min_size=1, max_size=5))
def test_reading_in_bulk_and_by_columns_agree(rows):
    """A nullable column with a null sends the reader to the columns, one by one."""
    bulk = reader(NULLABLE).read(rows)["features"]
    slow = reader(NULLABLE).read([*rows, [0, None, 0]])["features"]
    np.testing.assert_array_equal(slow[:-1], bulk)


LARGEST = float(np.finfo(np.float32).max)


@pytest.mark.parametrize("value", [LARGEST, -LARGEST, int(LARGEST), 3.4028235677973362e38, 5e-324, -0.0])
def test_the_largest_and_smallest_values_of_a_float32_are_read(value):
    array = reader(TABLE).read([[value, 0, 0]])["features"]
    assert array[0, 0] == np.float32(value)


@pytest.mark.parametrize("value", [3.4028235677973366e38, -3.4028235677973366e38, 2**128, 10**400, -(10**400)])
def test_values_that_a_float32_would_round_to_infinity_are_refused(value):
    with pytest.raises(InvalidInstance, match='row 0, feature "a"'):
        reader(TABLE).read([[value, 0, 0]])
    with pytest.raises(InvalidInstance, match='row 0, feature "a"'):
        reader(NULLABLE).read([[value, None, 0]])


CELLS = {
    "age": st.none() | st.integers(0, 150) | st.floats(-1e6, 1e6, width=32),
    "visits": st.integers(-(2**63), 2**63 - 1),
    "member": st.booleans(),
    "home town": st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    "pays": st.none() | st.booleans() | st.sampled_from([0, 1, 0.0, 1.0]),
}
PAYS = ModelInput(
    name="pays", dtype="float32", shape=[], features=[Feature(name="pays", kind="boolean", nullable=True)]
)


@given(rows=st.lists(st.fixed_dictionaries(CELLS), min_size=1, max_size=8), as_lists=st.booleans(), data=st.data())
def test_a_mixed_table_is_read_by_columns_as_each_value_would_be(rows, as_lists, data):
    sent: list = [[row[name] for name in CELLS] for row in rows]
    if not as_lists:
        # A missing value may be `null`, or no name at all.
        sent = [{k: v for k, v in row.items() if v is not None or data.draw(st.booleans())} for row in rows]
    found = reader(*MIXED, PAYS).read(sent)
    for name, missing in (("age", math.nan), ("visits", None), ("member", None), ("home town", ""), ("pays", math.nan)):
        array = found[name.replace(" ", "_")]
        wanted = [missing if row[name] is None else row[name] for row in rows]
        assert array.shape == (len(rows),)
        np.testing.assert_array_equal(array, np.array(wanted, array.dtype))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("age", value) for value in (True, "3", math.inf, 10**400)),
        *(("visits", value) for value in (1.0, 2**63, None)),
        *(("member", 1), ("home town", 3), ("home town", "\ud800"), ("pays", 2), ("pays", math.nan)),
    ],
)
def test_one_wrong_value_of_a_mixed_table_is_found_among_right_ones(name, value):
    right = {"age": 3, "visits": 1, "member": True, "home town": "Ulm", "pays": None}
    with pytest.raises(InvalidInstance) as refusal:
        reader(*MIXED, PAYS).read([right, right, right | {name: value}, right])
    assert (refusal.value.row, refusal.value.feature) == (2, name)
