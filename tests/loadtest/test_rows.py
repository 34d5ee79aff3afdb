from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest import rows
from loadtest.errors import RowsError


def test_packaged_rows_are_rows_of_sonar():
    names, packaged = rows.read_csv(rows.SONAR, rows.SONAR_TARGET)
    whole = Path(__file__).parents[2] / "training" / "data" / "sonar.csv"
    assert names == [f"band_{number:02d}" for number in range(1, 61)]
    assert len(packaged) == 52
    assert {tuple(row) for row in packaged} <= {tuple(row) for row in rows.read_csv(whole, "object")[1]}


def test_csv_keeps_every_column_but_the_target_and_its_type(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("age,city,weight\n31,Bern,70.5\n")
    assert rows.read_csv(path, None) == (["age", "city", "weight"], [[31.0, "Bern", 70.5]])
    assert rows.read_csv(path, "city") == (["age", "weight"], [[31.0, 70.5]])


@pytest.mark.parametrize("content", [[[1, 2], [3, 4]], {"instances": [[1, 2], [3, 4]]}])
def test_json_rows_are_taken_as_they_are(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(content))
    assert rows.read_json(path) == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("content", "target", "wanted"),
    [
        ("a,b\n1,2\n", "c", "no column 'c'; its columns are a, b"),
        ("a,b\n", None, "no rows"),
        ("", None, "no rows"),
        ("a,b\n1,2\n3\n", None, "line 3 has 1 cells, wanted 2"),
    ],
)
def test_unusable_csv_is_refused_in_one_line_that_names_it(tmp_path, content, target, wanted):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(RowsError, match=wanted) as caught:
        rows.read_csv(path, target)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [("{", "not JSON"), ('{"rows": []}', "wanted a list of instances"), ("3", "wanted a list"), ("[]", "no rows")],
)
def test_unusable_json_is_refused_in_one_line_that_names_it(tmp_path, content, wanted):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(RowsError, match=wanted) as caught:
        rows.read_json(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absent_file_is_refused(tmp_path):
    path = tmp_path / "absent.csv"
    with pytest.raises(RowsError) as caught:
        rows.read_csv(path, None)
    assert str(caught.value) == (
        f"{path}: cannot be read (No such file or directory); wanted a CSV or JSON file of rows"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"a,b\n1,2\n3,\xff4\n",
            "not UTF-8 text (byte 0xff in line 3); wanted a CSV or JSON file of rows saved as UTF-8",
        ),
        (b"PAR1\x15\x04\x8d", "not UTF-8 text (byte 0x8d in line 1); wanted a CSV or JSON file of rows saved as UTF-8"),
        (
            b'a\n"' + 200_000 * b"x",
            "not CSV (field larger than field limit (131072)); wanted a header and rows of values",
        ),
    ],
    ids=["another encoding", "another format", "a quote that never ends"],
)
def test_damaged_csv_is_refused_without_the_decoder_s_words(tmp_path, content, said):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(RowsError) as caught:
        rows.read_csv(path, None)
    assert str(caught.value) == f"{path}: {said}"


def test_sonar_rows_are_sent_to_a_model_that_takes_them(sonar_server):
    names, packaged = rows.read_csv(rows.SONAR, rows.SONAR_TARGET)
    assert rows.choose(sonar_server.url, None, None) == [dict(zip(names, row, strict=True)) for row in packaged]
