"""Files as people have them: what is read of them, what is inferred, and the one line with which each bad one ends."""

import datetime
import re
from decimal import Decimal
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet
import pytest

from training import summary, tables
from training.errors import InputError
from training.plan import plan
from training.recipes import recipe_of
from training.splits import split
from training.tables import ColumnType, TableError

GOOD = [f"{number / 2},{number % 3},{'yes' if number % 2 else 'no'},{'ab'[number % 2]}" for number in range(20)]
HEADER = "size,rooms,garden,kind"


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def csv(path, *lines):
    return written(path / "homes.csv", "\n".join(lines) + "\n")


def parquet(path, **columns):
    pyarrow.parquet.write_table(pa.table(columns), path / "homes.parquet")
    return path / "homes.parquet"


def read(path, target="kind", *types, task=None):
    return tables.read(path, target=target, types=dict(map(ColumnType.parse, types)), task=task)


def test_types_and_task_are_inferred(tmp_path):
    lines = [
        f"{line},{'' if number == 4 else number},{str(number % 2 == 0).lower()}" for number, line in enumerate(GOOD)
    ]
    data = read(csv(tmp_path, f"{HEADER},floor,lift", *lines))
    assert data.columns == ("size", "rooms", "garden", "floor", "lift")
    assert dict(data.kinds) == {"garden": "categorical", "lift": "boolean"}
    assert data.nullable == ("floor",)
    assert (data.task, data.labels, data.target) == ("classification", ("a", "b"), "kind")
    assert data.x["size"].tolist() == [number / 2 for number in range(20)]
    assert data.x["garden"].tolist()[:2] == ["no", "yes"]
    assert data.x["lift"].tolist()[:2] == [True, False]
    assert np.flatnonzero(np.isnan(data.x["floor"])).tolist() == [4]
    assert data.y.tolist() == [number % 2 for number in range(20)]


def test_types_are_those_that_are_asked_for(tmp_path):
    path = csv(tmp_path, HEADER, *GOOD)
    data = read(path, "kind", "rooms=categorical", "garden=ignored", "size=nullable")
    assert data.columns == ("size", "rooms")
    assert dict(data.kinds) == {"rooms": "categorical"}
    assert data.nullable == ("size",)
    assert set(data.x["rooms"].tolist()) == {"0", "1", "2"}
    assert data.ignored == (("garden", "as asked"),)
    flags = parquet(tmp_path, flag=[0, 1] * 10, text=["1", "2"] * 10, word=["TRUE", "false"] * 10, kind=["a", "b"] * 10)
    data = read(flags, "kind", "flag=boolean", "text=numeric", "word=boolean,nullable")
    assert data.x["flag"].tolist()[:2] == [False, True]
    assert data.x["text"].tolist()[:2] == [1, 2]
    assert data.x["word"].tolist()[:2] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("values", "task", "labels"),
    [
        ([True, False] * 10, "classification", ("false", "true")),
        ([3, 20, 100, 20] * 5, "classification", ("3", "20", "100")),
        ([0.0, 1.0] * 10, "classification", ("0", "1")),
        ([0.5, 1.0] * 10, "regression", ()),
        (list(range(21)), "regression", ()),
        (["b", "a"] * 10, "classification", ("a", "b")),
        ([Decimal("1.5"), Decimal("2.5")] * 10, "regression", ()),
        (pa.array(["b", "a"] * 10).dictionary_encode(), "classification", ("a", "b")),
    ],
)
def test_task_follows_from_the_targets_values(tmp_path, values, task, labels):
    size = [number / 7 for number in range(len(values))]
    data = read(parquet(tmp_path, size=size, answer=values), "answer")
    assert (data.task, data.labels) == (task, labels)
    if task == "classification":
        texts = {True: "true", False: "false"} if labels == ("false", "true") else {}
        whole = [values[0].as_py() if isinstance(values, pa.Array) else values[0]][0]
        first = texts.get(whole, f"{whole:g}" if isinstance(whole, float) else str(whole))
        assert data.labels[data.y[0]] == first
    # Whatever is accepted can be split.
    parts = split(data.y, data.task)
    assert min(len(parts.train), len(parts.calibration), len(parts.test)) > 0


def test_task_is_the_one_that_is_asked_for(tmp_path):
    path = parquet(tmp_path, size=[number / 7 for number in range(20)], stars=[1, 2, 3, 4, 5] * 4)
    assert read(path, "stars", task="regression").task == "regression"
    with pytest.raises(TableError, match="4 rows of class '1'; wanted at least 5"):
        read(path, "stars")


def test_a_table_of_numbers_is_one_matrix(tmp_path):
    data = read(parquet(tmp_path, a=[1, None] * 10, b=[float(number) for number in range(20)], y=["u", "v"] * 10), "y")
    assert data.x.shape == (20, 2)
    assert data.x.dtype == np.float32
    assert data.nullable == ("a",)
    assert data.input_name == "features"
    assert data.instances(np.array([0, 1])) == [[1.0, 0.0], [None, 1.0]]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiters_and_quotes_of_csv(tmp_path, delimiter):
    rows = [delimiter.join(["1" if n % 2 else "2", f'"a{delimiter}{n % 3}"', "xy"[n % 2]]) for n in range(20)]
    data = read(csv(tmp_path, "﻿" + delimiter.join(["n", "text", "y"]), *rows), "y")
    assert data.columns == ("n", "text")
    assert set(data.x["text"]) == {f"a{delimiter}{n}" for n in range(3)}


def test_categories_are_as_the_csv_file_spells_them(tmp_path):
    spellings = {"zip": ["01234", "1234", "007"], "paid": ["True", "true", "False"], "day": ["2026-01-02", "", "NA"]}
    lines = [
        ",".join([f"{number}", *(texts[number % 3] for texts in spellings.values()), "ab"[number % 2]])
        for number in range(20)
    ]
    path = csv(tmp_path, f"size,{','.join(spellings)},kind", *lines)
    data = read(path, "kind", *(f"{column}=categorical" for column in spellings))
    for column, texts in spellings.items():
        assert data.x[column][:3].tolist() == texts


def test_texts_with_commas_and_digits_are_categories(tmp_path):
    lists = ["1,2", "1,2,3", "4", "a,5"]
    lines = [f"{number};{lists[number % 4]};{'ab'[number % 2]}" for number in range(20)]
    assert set(read(csv(tmp_path, "size;seen;kind", *lines)).x["seen"]) == set(lists)
    commas = csv(tmp_path, "size;kind", *(f"{number % 7},5;{'ab'[number % 2]}" for number in range(20)))
    assert "0,5" in read(commas, "kind", "size=categorical").x["size"]


@pytest.mark.parametrize(
    ("values", "spelled"),
    [
        ([0.5, 1.0], ["0.5", "1"]),
        (np.array([0.5, 1], np.float16), ["0.5", "1"]),
        ([0.0, -0.0, 1.0, 1.0], ["0", "0", "1", "1"]),
        ([1e6, None, 2e6, 3e6], ["1000000", "", "2000000", "3000000"]),
        ([1e19, 2e19, float("inf"), 5.0], ["1e+19", "2e+19", "inf", "5"]),
        (np.array([2**63, 2**64 - 1], np.uint64), ["9223372036854775808", "18446744073709551615"]),
    ],
)
def test_numbers_of_a_parquet_file_are_categories_each_by_itself(values, spelled, tmp_path):
    path = parquet(
        tmp_path, **columns(level=pa.array(np.tile(values, 20 // len(values)).tolist(), pa.array(values).type))
    )
    assert read(path, "kind", "level=categorical").x["level"].tolist() == spelled * (20 // len(values))


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (np.array([0, 1], np.float16), ("0", "1")),
        ([0.0, -0.0, 1.0, 1.0], ("0", "1")),
        ([1e19, 2e19], ("1e+19", "2e+19")),
    ],
)
def test_numbers_of_a_parquet_file_are_classes_each_by_itself(values, labels, tmp_path):
    path = parquet(tmp_path, **columns(y=pa.array(np.tile(values, 20 // len(values)), pa.array(values).type)))
    data = read(path, "y")
    assert data.labels == labels
    assert np.bincount(data.y).tolist() == [10, 10]


def test_texts_that_never_repeat_are_left_out_and_said_to_be(tmp_path):
    data = read(csv(tmp_path, f"name,{HEADER}", *(f"n{number},{line}" for number, line in enumerate(GOOD))))
    assert "name" not in data.columns
    assert data.ignored == (("name", "20 texts, none of them twice"),)


def test_same_file_same_digest_another_value_another(tmp_path):
    first = read(csv(tmp_path, HEADER, *GOOD)).sha256
    assert read(csv(tmp_path, HEADER, *GOOD)).sha256 == first
    assert read(csv(tmp_path, HEADER, *GOOD[:-1], GOOD[-1].replace("yes", "perhaps"))).sha256 != first
    assert read(csv(tmp_path, HEADER, *GOOD[:-1], GOOD[-1].replace("9.5", "9.25"))).sha256 != first


def changed(row, text):
    return [HEADER, *GOOD[:row], text, *GOOD[row + 1 :]]


def columns(**columns):
    usual = {"size": [number / 2 for number in range(20)], **columns}
    return {**usual, "kind": columns.get("kind", ["a", "b"] * 10)}


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    # name: (lines of a CSV file or columns of a Parquet file, options, what the line says)
    "empty file": ([], {}, "cannot be read as CSV"),
    "no rows": ([HEADER], {}, "no rows; wanted at least 10"),
    "too few rows": ([HEADER, *GOOD[:9]], {}, "9 rows; wanted at least 10"),
    "no target": ([HEADER, *GOOD], {"target": None}, "no target; wanted --target COLUMN, one of size, rooms, garden"),
    "missing target": ([HEADER, *GOOD], {"target": "price"}, "target 'price' is not among its columns; wanted one of"),
    "blanks around a column's name": (
        [" size,rooms ,gar\xa0den,kind\u200b", *GOOD],
        {"target": "size"},
        "target 'size' is not among its columns; wanted one of ' size', 'rooms ', 'gar\\xa0den', 'kind\\u200b'",
    ),
    "blanks around a column that tells nothing": (
        ["  size ,kind", *(f"1,{'ab'[number % 2]}" for number in range(20))],
        {},
        "column '  size ': 1 in every row, which tells nothing; leave it out with --type '  size =ignored'",
    ),
    "a column's name with a line break": (
        ['"si\nze",kind', *(f"1,{'ab'[number % 2]}" for number in range(20))],
        {},
        "column 'si\\nze': 1 in every row, which tells nothing; leave it out with --type 'si\\nze=ignored'",
    ),
    "no header": (GOOD, {}, "target 'kind' is not among its columns"),
    "numbers as header": (["1,2,3", *(["4,5,6"] * 12)], {"target": "1"}, "its header is 1, 2, 3, which are values"),
    "duplicate columns": (["a,a,kind", *["1,2,x"] * 12], {}, "column 'a' is there 2 times; wanted a name of its own"),
    "nameless column": (["a,,kind", *["1,2,x"] * 12], {}, "column 2 has no name"),
    "ragged": (changed(7, "1,2"), {}, "homes.csv: row 8: 2 values found, 4 wanted, one for each column"),
    "ragged far down, after values of two lines": (
        [HEADER, *(f'{number},1,"yes\n\nno",{"ab"[number % 2]}' for number in range(1, 1800)), "", "1,2,yes,a,,"],
        {},
        "homes.csv: row 1,800: 6 values found, 4 wanted, one for each column",
    ),
    "text among numbers": (
        changed(7, "about 9,1,yes,a"),
        {},
        "column 'size': text where numbers were, 'about 9' in row 8; wanted a number there",
    ),
    "decimal commas": (
        ["size;kind", *(f"{number % 7},5;{'ab'[number % 2]}" for number in range(20))],
        {},
        "column 'size': '0,5' in row 1, a number with a comma; wanted a decimal point, as in 1.5, and no mark between "
        "thousands, or --type size=categorical",
    ),
    "decimal commas here and there": (
        ["size;kind", *(f"{'NA' if number < 4 else 7 if number < 9 else '-2,25'};a" for number in range(20))],
        {"target": "size"},
        "target 'size': '-2,25' in row 10, a number with a comma; wanted a decimal point, as in 1.5, and no mark "
        "between thousands, or --task classification",
    ),
    "commas between thousands": (
        ["price,kind", *(f'"{number},{number:03}.50",{"ab"[number % 2]}' for number in range(20))],
        {},
        "column 'price': '0,000.50' in row 1, a number with a comma; wanted a decimal point",
    ),
    "decimal commas as numbers": (
        ["size;kind", *(f"{number % 7},5;{'ab'[number % 2]}" for number in range(20))],
        {"types": ["size=numeric"]},
        "column 'size': '0,5' in row 1; wanted a number with a decimal point",
    ),
    "text as numbers": (
        [HEADER, *GOOD],
        {"types": ["garden=numeric"]},
        "'garden': 'no' in row 1; wanted a number",
    ),
    "numbers as booleans": (
        [HEADER, *GOOD],
        {"types": ["rooms=boolean"]},
        "'rooms': 2 in row 3; wanted true",
    ),
    "one row": ([HEADER, *GOOD[:1]], {}, "homes.csv: 1 row; wanted at least 10"),
    "text far down": (
        columns(level=["1"] * 1799 + ["high"], size=range(1800), kind=["a", "b"] * 900),
        {},
        "column 'level': text where numbers were, 'high' in row 1,800; wanted",
    ),
    "many answers missing": (
        columns(size=range(1800), y=["u", None] * 900, kind=["a", "b"] * 900),
        {"target": "y"},
        "target 'y': no value in 900 rows, first in row 2; wanted",
    ),
    "infinity": (changed(4, "inf,1,yes,a"), {}, "column 'size': inf in row 5; wanted a number within float32"),
    "beyond float32": (changed(4, "1e39,1,yes,a"), {}, "column 'size': 1e+39 in row 5; wanted a number within float32"),
    "one value": ([HEADER, *("1," + line.split(",", 1)[1] for line in GOOD)], {}, "column 'size': 1 in every row"),
    "no values": ([HEADER, *("," + line.split(",", 1)[1] for line in GOOD)], {}, "column 'size': no values"),
    "one class": (
        [HEADER, *(line[:-1] + "a" for line in GOOD)],
        {},
        "'kind': 'a' in every row; wanted at least",
    ),
    "rare class": (changed(7, "1,2,yes,c"), {}, "target 'kind': 1 row of class 'c'; wanted at least 5 of each"),
    "classes that differ in blanks": (
        [HEADER, *(line + ("" if number < 18 else " ") for number, line in enumerate(GOOD))],
        {},
        "target 'kind': the classes 'a' and 'a ' differ only in blanks; wanted one spelling of each",
    ),
    "classes that differ in a second blank": (
        columns(y=["not  here", "not here", "here", "there"] * 5),
        {"target": "y"},
        "target 'y': the classes 'not  here' and 'not here' differ only in blanks",
    ),
    "classes that differ in no-break spaces": (
        columns(y=["not\xa0here", "not here", "here", "there"] * 5),
        {"target": "y"},
        "target 'y': the classes 'not here' and 'not\\xa0here' differ only in blanks",
    ),
    "constant target": (
        columns(y=[2.5] * 20),
        {"target": "y"},
        "'y': 2.5 in every row; wanted values",
    ),
    "missing answers": (changed(7, "1,2,yes,"), {}, "target 'kind': no value in 1 row, first in row 8"),
    "NaN answer": (
        columns(y=[0.5] * 19 + [float("nan")]),
        {"target": "y"},
        "'y': no value in 1 row, first in row 20",
    ),
    "infinite answer": (columns(y=[0.5] * 19 + [float("-inf")]), {"target": "y"}, "target 'y': -inf in row 20; wanted"),
    "text as quantity": ([HEADER, *GOOD], {"task": "regression"}, "target 'kind': 'a' found in row 1, numbers wanted"),
    "text among answers": (
        [HEADER, *GOOD[:3], "twelve,1,no,b", *GOOD[4:]],
        {"target": "size"},
        "target 'size': text where numbers were, 'twelve' in row 4",
    ),
    "only the target": (["kind", *"abababababab"], {}, "no column beside the target 'kind'"),
    "only identifiers": (
        ["id,kind", *(f"n{n},{'ab'[n % 2]}" for n in range(12))],
        {},
        "('id' is ignored: 12 texts",
    ),
    "dates": (
        columns(when=[datetime.datetime(2026, 1, 1 + day) for day in range(20)]),
        {},
        "column 'when': its type is timestamp[us]; wanted numbers, booleans or texts, or --type when=ignored",
    ),
    "dates of a CSV file": (
        ["signed on,kind", *(f"2026-01-{day},{'ab'[day % 2]}" for day in range(10, 30))],
        {},
        "column 'signed on': its type is date32[day]; wanted numbers, booleans or texts, or --type 'signed on=ignored'",
    ),
    "bytes that are no text": (
        columns(raw=[b"\xff\xfe", b"a"] * 10),
        {"types": ["raw=categorical"]},
        "column 'raw': bytes that are no text in UTF-8; wanted texts",
    ),
    "bytes that are no text as classes": (
        columns(y=[b"\xff\xfe", b"a"] * 10),
        {"target": "y", "task": "classification"},
        "target 'y': bytes that are no text in UTF-8; wanted texts",
    ),
    "lists": (columns(many=[[1, 2]] * 20), {}, "column 'many': its type is list<"),
    "unknown column in --type": ([HEADER, *GOOD], {"types": ["sise=numeric"]}, "--type sise: not among its columns"),
    "unknown type": (
        [HEADER, *GOOD],
        {"types": ["size=text"]},
        "--type 'size=text'; wanted COLUMN=KIND",
    ),
    "differences beyond float32": (
        columns(serial=[10**15 + number for number in range(20)]),
        {},
        "column 'serial': 1e+15 to 1e+15, the same number in float32; wanted it in another unit or from another origin",
    ),
    "squares beyond float32": (
        columns(y=[number * 1e30 for number in range(20)]),
        {"target": "y", "task": "regression"},
        "target 'y': 0 to 1.9e+31, of which float32 holds no squares; wanted it in another unit",
    ),
    "type of the target": ([HEADER, *GOOD], {"types": ["kind=categorical"]}, "is the target; wanted --task for it"),
}


@pytest.mark.parametrize("name", BAD)
def test_each_bad_file_has_its_line_and_leaves_nothing_behind(name, tmp_path):
    content, options, said = BAD[name]
    (tmp_path / "in").mkdir()
    path = parquet(tmp_path / "in", **content) if isinstance(content, dict) else tmp_path / "in" / "homes.csv"
    if isinstance(content, list):
        written(path, "".join(f"{line}\n" for line in content))
    request = {"target": "kind", **options}
    with pytest.raises(InputError) as refused:
        plan(str(path), repository=tmp_path / "artifacts", seed=0, num_samples=100, **request)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.csv", None, "not found; wanted a CSV or Parquet file"),
        ("bad.parquet", b"PAR1 and nothing of the kind", "cannot be read as Parquet"),
        ("bad.csv", b"a,kind\n\xff\xfe,1\n", "not UTF-8 text (byte 0xff in line 2); wanted a CSV file saved as UTF-8"),
        ("latin1.csv", "größe,kind\n1,2\n".encode("latin-1"), "not UTF-8 text (byte 0xf6 in line 1); wanted a CSV"),
        ("utf16.csv", "size,kind\n1,2\n".encode("utf-16"), "not UTF-8 text (UTF-16, as it looks); wanted a CSV file"),
        ("no-bom.csv", "size,kind\n1,2\n".encode("utf-16-le"), "not UTF-8 text (UTF-16, as it looks); wanted a CSV"),
        ("folder.csv", ..., "is a folder; wanted a CSV or Parquet file"),
    ],
)
def test_what_is_no_table_is_refused(name, content, said, tmp_path):
    path = tmp_path / name
    if content is ...:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(TableError, match=f"^{re.escape(str(path))}: .*{re.escape(said)}") as refused:
        read(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("types", [(), ("name=categorical",)], ids=["inferred", "asked for"])
def test_another_encoding_far_down_a_file_is_found(tmp_path, types):
    lines = [f"{'ä' if number == 3999 else 'abc'[number % 3]},{number % 7}.5,{number % 2}" for number in range(4000)]
    path = tmp_path / "names.csv"
    path.write_text("\n".join(["name,size,kind", *lines]), encoding="latin-1")
    with pytest.raises(TableError, match=r"names\.csv: not UTF-8 text \(byte 0xe4 in line 4001\); wanted a CSV file"):
        read(path, "kind", *types)


@pytest.mark.parametrize("name", [None, "patient"])
def test_index_of_a_pandas_table_is_no_feature_unless_asked_for(tmp_path, name):
    path = tmp_path / "homes.parquet"
    frame = pandas.DataFrame(columns(rooms=[1, 2] * 10))
    # Filtered, as most tables once were: a whole range is kept in the file's metadata alone.
    frame[frame["size"] != 3].rename_axis(name).to_parquet(path)
    column = name or "__index_level_0__"
    assert column in pyarrow.parquet.read_schema(path).names
    data = read(path)
    assert data.columns == ("size", "rooms")
    assert data.ignored == ((column, "index of a pandas table"),)
    assert read(path, "kind", f"{column}=numeric").columns == ("size", "rooms", column)
    assert read(path, column, task="regression").columns == ("size", "rooms", "kind")
    with pytest.raises(TableError, match=r"wanted one of size, rooms, kind$"):
        read(path, "price")


@pytest.mark.parametrize("said", [b"{", b"[]", b"{}", b'{"index_columns": 3}', b'{"index_columns": [3, "elsewhere"]}'])
def test_what_a_file_says_of_its_index_need_not_make_sense(tmp_path, said):
    table = pa.table(columns()).replace_schema_metadata({b"pandas": said})
    pyarrow.parquet.write_table(table, tmp_path / "homes.parquet")
    data = read(tmp_path / "homes.parquet")
    assert (data.columns, data.ignored) == (("size",), ())


def test_dates_as_the_target_cannot_be_left_out(tmp_path):
    path = csv(tmp_path, "size,signed", *(f"{day},2026-01-{day}" for day in range(10, 30)))
    with pytest.raises(TableError, match=r"target 'signed': its type is date32\[day\]; wanted [a-z, ]*$"):
        read(path, "signed")


def test_of_many_columns_a_few_are_shown_and_the_others_counted_by_type(tmp_path):
    numbers = {f"n{number}": np.arange(20) + number for number in range(1200)}
    holes = {f"h{number}": [None, *range(19)] for number in range(97)}
    texts = {f"t{number}": ["u", "v"] * 10 for number in range(103)}
    names = {f"id{number}": [f"{number}-{row}" for row in range(20)] for number in range(12)}
    path = parquet(tmp_path, **numbers, **holes, **texts, **names, kind=["a", "b"] * 10)
    shown = summary.columns(read(path))
    column, kind, values, _ = (list(column.cells) for column in shown.columns)
    assert column[:31] == [*(f"n{number}" for number in range(30)), "and 1,370 more"]
    assert values[30] == "1,170 numeric, 103 categorical, 97 nullable numeric"
    assert column[31:] == [*(f"id{number}" for number in range(10)), "and 2 more"]
    assert kind[31:] == ["ignored"] * 11
    with pytest.raises(TableError, match=r"wanted one of n0, .*, n19 and 1,393 more$"):
        read(path, "price")


def test_model_is_called_as_the_file_and_trained_by_its_size(tmp_path):
    path = written(tmp_path / "My Homes (2).csv", "\n".join([HEADER, *GOOD]))
    made = plan(str(path), repository=tmp_path, seed=0, num_samples=100, target="kind", epochs=7)
    assert (made.name, made.data.name, made.recipe.epochs) == ("my-homes-2", "My Homes (2).csv", 7)
    small, large = (
        recipe_of(read(parquet(tmp_path, x=np.arange(rows) / 3, y=np.arange(rows) % 2), "y")) for rows in (100, 100_000)
    )
    assert small.batch_size < large.batch_size
    assert small.epochs > large.epochs
    # A file that is called as a known data set is not that data set.
    own = written(tmp_path / "sonar.csv", "\n".join([HEADER, *GOOD]))
    assert plan(str(own), repository=tmp_path, seed=0, num_samples=100, target="kind").recipe.hidden_units == (64,)
