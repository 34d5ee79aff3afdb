"""Scoring of files: the signature's own numbers, whatever the cut, the engine or the interruption."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from models.contract import MC_SAMPLE
from models.package import package
from serving.runtime import Model
from serving.scoring import job as scoring
from serving.scoring import sources
from serving.scoring.errors import RowRefused, ScoreError
from serving.scoring.parts import score_part
from serving.scoring.scorer import Scorer, Settings
from tests.process import ROOT

SETTINGS = Settings(num_samples=30, seed=7)
BANDS = [f"band_{number:02d}" for number in range(1, 61)]
TOLERANCE = 1e-6


@pytest.fixture(scope="session")
def model(trained) -> Model:
    return Model.load(trained.folder)


@pytest.fixture(scope="session")
def wanted(trained):
    """What the SavedModel itself says of all 208 rows."""
    signature = tf.saved_model.load(str(trained.folder)).signatures[MC_SAMPLE]
    drawn = signature(features=trained.rows, num_samples=tf.constant(30), seed=tf.constant(7, tf.int64))
    return {name: array.numpy() for name, array in drawn.items()}


@pytest.fixture(scope="session")
def table(trained) -> pa.Table:
    columns = {"id": [f"row {number}" for number in range(len(trained.rows))]}
    columns |= {name: trained.rows[:, place] for place, name in enumerate(BANDS)}
    return pa.table(columns)


@pytest.fixture
def score(trained, model):
    """Plan and run in this process, with the model that the tests share."""

    def run(source, out, *, settings=SETTINGS, part_rows=1000, strict=False, threads=2):
        job = scoring.plan(str(source), Path(out), trained.folder, settings, part_rows)
        done: list[int] = []

        def engine(job, pending, strict, advance):
            scorer = Scorer(model, job.form)
            for part in pending:
                score_part(scorer, part, job.target.shelf, threads=threads, strict=strict, advance=advance)

        outcome = scoring.run(job, engine, strict=strict, advance=done.append)
        assert sum(done) == job.rows
        return outcome

    return run


def dropserve(*arguments, cwd, check=True):
    command = [sys.executable, str(ROOT / "dropserve.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300)
    assert not check or done.returncode == 0, done.stderr
    return done


def files(folder):
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def digests(folder):
    return {name: digest for name, (digest, _) in files(folder).items()}


def floats(table, names):
    return np.stack([np.asarray(table[name].to_numpy(), np.float64) for name in names], axis=1)


def assert_same(found, wanted):
    """Two outputs agree: text exactly, numbers to what matrix products of another size leave."""
    assert found.schema == wanted.schema
    for name in wanted.column_names:
        if pa.types.is_floating(wanted[name].type):
            np.testing.assert_allclose(found[name].to_numpy(), wanted[name].to_numpy(), atol=TOLERANCE)
        else:
            assert found[name].equals(wanted[name]), name


def test_columns_are_what_the_signature_gives(score, table, wanted, tmp_path):
    pq.write_table(table, tmp_path / "in.parquet")
    outcome = score(tmp_path / "in.parquet", tmp_path / "out.parquet")
    assert (outcome.scored, outcome.rejected) == (208, 0)
    scored = pq.read_table(tmp_path / "out.parquet")
    assert scored.select(table.column_names).equals(table)
    labels = ["mine", "rock"]
    for column, name in {"probability": "probabilities", "std": "std", "standard_error": "standard_error"}.items():
        np.testing.assert_allclose(floats(scored, [f"{column}_{x}" for x in labels]), wanted[name], atol=TOLERANCE)
    for name in ("predictive_entropy", "expected_entropy", "mutual_information"):
        np.testing.assert_allclose(scored[name].to_numpy(), wanted[name], atol=2 * TOLERANCE)
    best = wanted["probabilities"].argmax(axis=1)
    assert scored["label"].to_pylist() == [labels[index] for index in best]
    np.testing.assert_allclose(scored["std"].to_numpy(), wanted["std"][np.arange(208), best], atol=TOLERANCE)
    assert set(scored["num_samples"].to_pylist()) == {30}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", "out.parquet", "out.parquet.score.json"]


def test_answers_do_not_depend_on_the_cut(score, table, tmp_path):
    pq.write_table(table, tmp_path / "whole.parquet")
    score(tmp_path / "whole.parquet", tmp_path / "one.parquet")
    one = pq.read_table(tmp_path / "one.parquet")
    # Other files, row groups, parts, threads; the order of the rows is that of the names.
    (tmp_path / "cut" / "deeper").mkdir(parents=True)
    pq.write_table(table.slice(0, 50), tmp_path / "cut" / "a.parquet", row_group_size=7)
    pq.write_table(table.slice(50, 1), tmp_path / "cut" / "b.parquet")
    pq.write_table(table.slice(51), tmp_path / "cut" / "deeper" / "c.parquet", row_group_size=100)
    outcome = score(tmp_path / "cut", tmp_path / "many", part_rows=17, threads=1)
    assert outcome.scored == 208
    assert_same(pyarrow.dataset.dataset(tmp_path / "many").to_table(), one)
    assert len(list((tmp_path / "many").glob("part-*.parquet"))) == 3 + 1 + 10


def test_a_pattern_chooses_files(score, table, tmp_path):
    for name, start in (("a1", 0), ("a2", 3), ("b1", 6)):
        pq.write_table(table.slice(start, 3), tmp_path / f"{name}.parquet")
    (tmp_path / "a3.txt").write_text("not data")
    score(tmp_path / "a*", tmp_path / "scored" / "out.parquet")
    assert pq.read_table(tmp_path / "scored" / "out.parquet")["id"].to_pylist() == [f"row {n}" for n in range(6)]


def test_csv_gives_what_parquet_gives(score, table, tmp_path):
    pq.write_table(table, tmp_path / "in.parquet")
    pyarrow.csv.write_csv(table, tmp_path / "in.csv")
    score(tmp_path / "in.parquet", tmp_path / "from_parquet.parquet")
    score(tmp_path / "in.csv", tmp_path / "from_csv.parquet", part_rows=10)
    score(tmp_path / "in.csv", tmp_path / "parts", part_rows=10)
    parquet, text = (pq.read_table(tmp_path / f"from_{kind}.parquet") for kind in ("parquet", "csv"))
    added = parquet.column_names[len(table.column_names) :]
    assert_same(text.select(added), parquet.select(added))
    written = [pyarrow.csv.read_csv(path) for path in sorted((tmp_path / "parts").glob("part-*.csv"))]
    # A bound that is 0 in all rows of a part reads as a column of whole numbers.
    joined = pa.concat_tables(written, promote_options="permissive")
    assert joined.num_rows == 208
    np.testing.assert_allclose(joined["std_mine"], text["std_mine"], atol=TOLERANCE)


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_csv_has_the_delimiters_that_training_takes(score, table, tmp_path, delimiter):
    pyarrow.csv.write_csv(table, tmp_path / "comma.csv")
    pyarrow.csv.write_csv(table, tmp_path / "in.csv", pyarrow.csv.WriteOptions(delimiter=delimiter))
    score(tmp_path / "comma.csv", tmp_path / "comma.parquet")
    score(tmp_path / "in.csv", tmp_path / "out.parquet", part_rows=50)
    assert_same(pq.read_table(tmp_path / "out.parquet"), pq.read_table(tmp_path / "comma.parquet"))


def test_csv_rows_may_hold_line_ends_and_quotes(score, table, tmp_path):
    texts = ["two\nlines", 'a "quoted" word', 'comma, and\n"both"\n', "plain", ""] * 8
    rows = table.slice(0, len(texts)).set_column(0, "id", pa.array(texts))
    pyarrow.csv.write_csv(rows, tmp_path / "in.csv")
    (tmp_path / "crlf.csv").write_bytes((tmp_path / "in.csv").read_bytes().replace(b'"\n', b'"\r\n').rstrip(b"\n"))
    for part_rows in (1, 3, 1000):
        score(tmp_path / "in.csv", tmp_path / f"{part_rows}.parquet", part_rows=part_rows)
        scored = pq.read_table(tmp_path / f"{part_rows}.parquet")
        assert scored["id"].to_pylist() == texts
    assert score(tmp_path / "crlf.csv", tmp_path / "crlf.parquet", part_rows=3).scored == len(texts)


@pytest.mark.parametrize("end", ["\r", "\r\n", "mixed"])
def test_csv_lines_end_as_arrow_takes_them(score, table, tmp_path, monkeypatch, end):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)  # so that line ends lie across blocks
    path = tmp_path / "in.csv"
    pyarrow.csv.write_csv(table, path)
    lines = path.read_text().splitlines()
    # Pads, so that every place of a line end in a block comes about.
    lines[1:] = [line.replace("row ", "row " + "x" * (number % 7)) for number, line in enumerate(lines[1:])]
    ends = ["\r", "\n", "\r\n"] if end == "mixed" else [end]
    path.write_bytes("".join(line + ends[number % len(ends)] for number, line in enumerate(lines)).encode())
    assert score(path, tmp_path / "out.parquet", part_rows=50).scored == len(table)
    assert pq.read_table(tmp_path / "out.parquet")["id"].equals(pyarrow.csv.read_csv(path)["id"])
    _, parts = sources.survey(path, 50, 0)
    assert [(part.first_row, part.rows) for part in parts] == [(0, 50), (50, 50), (100, 50), (150, 50), (200, 8)]


def test_a_quote_within_a_value_is_text(score, table, tmp_path):
    path = tmp_path / "in.csv"
    texts = ['5" pipe', *['two\nlines, and a "word"'] * (len(table) - 2), 'six "feet" or 6\'2"']
    ids = [texts[0], *('"' + text.replace('"', '""') + '"' for text in texts[1:-1]), texts[-1]]
    lines = [",".join(map(repr, row)) for row in zip(*(table[name].to_pylist() for name in BANDS), strict=True)]
    rows = [f"{name},{line}\n" for name, line in zip(ids, lines, strict=True)]
    path.write_text("\ufeff" + ",".join(['"id"', *BANDS]) + "\n" + "".join(rows))
    assert score(path, tmp_path / "out.parquet", part_rows=50).rejected == 0
    assert pq.read_table(tmp_path / "out.parquet")["id"].to_pylist() == texts
    assert len(sources.survey(path, 50, 0)[1]) == 5


@pytest.mark.parametrize("header", ["a,b\n", '\ufeff"a\n1",b\r', "a;b\r\n"])
def test_lines_of_any_text_are_those_of_the_csv_module(tmp_path, monkeypatch, header):
    def records(text):
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=";" if ";" in header else ","))

    path = tmp_path / "in.csv"
    chosen = random.Random(0)
    for size in (1, 2, 3, 5, 64) * 60:
        monkeypatch.setattr(sources, "BLOCK_BYTES", size)
        text = "".join(chosen.choices(['"', '"', ",", ";", "\n", "\r", "x", '""'], k=chosen.randint(0, 30)))
        path.write_bytes((header + text).encode())
        found = [(part.start, part.stop) for part in sources.survey(path, 1, 0)[1]]
        lines = [path.read_bytes()[start:stop].decode() for start, stop in found if start < stop]
        # A \r at the header's end and a \n after it are one line end.
        body = path.read_bytes()[found[0][0] :].decode()
        assert "".join(lines) == body
        assert [records(line) for line in lines] == [[record] for record in records(body)], (size, text)


def spoil(rows, changes):
    for row, column, text in changes:
        rows[row][BANDS.index(column) + 1] = text
    return rows


def test_bad_csv_rows_are_rejected_with_the_reason_and_the_rest_scored(score, table, tmp_path):
    pyarrow.csv.write_csv(table, tmp_path / "good.csv")
    score(tmp_path / "good.csv", tmp_path / "good.parquet")
    header, *lines = [line.split(",") for line in (tmp_path / "good.csv").read_text().splitlines()]
    spoil(lines, [(3, "band_07", "loud"), (50, "band_60", ""), (51, "band_01", "inf"), (52, "band_02", "1e39")])
    lines[100] = lines[100][:-2]
    lines[207] = [*lines[207], "1"]
    (tmp_path / "bad.csv").write_text("\n".join(",".join(line) for line in [header, *lines]))
    for part_rows in (20, 1000):
        outcome = score(tmp_path / "bad.csv", tmp_path / f"{part_rows}.parquet", part_rows=part_rows)
        assert (outcome.scored, outcome.rejected) == (202, 6)
        rejects = pq.read_table(tmp_path / f"{part_rows}.rejects.parquet").to_pylist()
        assert [reject["row"] for reject in rejects] == [3, 50, 51, 52, 100, 207]
        assert [reject["source"] for reject in rejects] == [str(tmp_path / "bad.csv")] * 6
        for reject, said in zip(
            rejects,
            [
                ['"band_07"', 'found "loud"', "wanted a finite"],
                ['"band_60"', "found null"],
                ['"band_01"', "inf"],
                ['"band_02"', "1e+39"],
                ["found 59 values, wanted 61"],
                ["found 62 values"],
            ],
            strict=True,
        ):
            for word in said:
                assert word in reject["reason"]
        assert (rejects[0]["id"], rejects[0]["band_07"], rejects[4]["id"]) == ("row 3", "loud", None)
        good = pq.read_table(tmp_path / "good.parquet")
        kept = np.setdiff1d(np.arange(208), [3, 50, 51, 52, 100, 207])
        assert_same(pq.read_table(tmp_path / f"{part_rows}.parquet"), good.take(pa.array(kept)))


def test_bad_parquet_rows_are_rejected(score, table, tmp_path):
    column = table["band_03"].to_pylist()
    column[5], column[6], column[7] = None, float("nan"), float("inf")
    place = table.column_names.index("band_03")
    pq.write_table(table.set_column(place, "band_03", pa.array(column, pa.float64())), tmp_path / "in.parquet")
    outcome = score(tmp_path / "in.parquet", tmp_path / "out")
    assert (outcome.scored, outcome.rejected) == (205, 3)
    rejects = pq.read_table(tmp_path / "out" / "_rejects.parquet").to_pylist()
    assert [(reject["row"], reject["id"]) for reject in rejects] == [(5, "row 5"), (6, "row 6"), (7, "row 7")]
    for reject, found in zip(rejects, ("null", "NaN", "Infinity"), strict=True):
        assert f'feature "band_03": found {found}, wanted a finite' in reject["reason"]


def test_columns_of_any_type_pass_through(score, table, tmp_path):
    extras = {
        "view": pa.array(["a", None, "c"], pa.string_view()),
        "bytes": pa.array([b"a", None, b"\xff"], pa.binary_view()),
        "views": pa.array([["a"], None, ["b", "c"]], pa.list_(pa.string_view())),
        "large": pa.array(["a", None, "c"], pa.large_string()),
        "category": pa.array(["a", None, "b"]).dictionary_encode(),
        "money": pa.array(["1.50", None, "2.25"]).cast(pa.decimal128(5, 2)),
        "moment": pa.array([1, None, 3], pa.timestamp("ns", tz="UTC")),
    }
    extended = table.slice(0, 3).set_column(1, "band_01", pa.array([0.1, None, 0.3]))
    for name, values in extras.items():
        extended = extended.append_column(name, values)
    pq.write_table(extended, tmp_path / "in.parquet", row_group_size=2)
    assert score(tmp_path / "in.parquet", tmp_path / "out.parquet").rejected == 1
    scored, rejected = (pq.read_table(tmp_path / f"out.{name}parquet") for name in ("", "rejects."))
    for name, values in extras.items():
        assert scored[name].to_pylist() == [values[0].as_py(), values[2].as_py()]
        assert rejected[name].to_pylist() == [None]
    pq.write_table(extended.drop_columns(["views", "bytes"]), tmp_path / "in.parquet")
    score(tmp_path / "in.parquet", tmp_path / "out.csv")
    assert pyarrow.csv.read_csv(tmp_path / "out.csv")["view"].to_pylist() == ["a", "c"]


@pytest.mark.parametrize("out", ["out", "out.parquet"])
def test_row_groups_are_of_many_rows_however_many_columns(score, table, tmp_path, out):
    rows = 5000
    tall = pa.concat_tables([table] * (rows // 208 + 1)).slice(0, rows)
    for number in range(940):
        tall = tall.append_column(f"extra_{number}", pa.array(np.full(rows, float(number))))
    pq.write_table(tall, tmp_path / "in.parquet")
    # One file is joined of parts that are smaller than a row group.
    score(tmp_path / "in.parquet", tmp_path / out, part_rows=500 if out.endswith(".parquet") else rows)
    place = tmp_path / out if out.endswith(".parquet") else tmp_path / out / "part-00000.parquet"
    groups = pq.read_metadata(place)
    # 940 numbers of eight bytes and 71 others a row, in groups of 32 MiB.
    assert [groups.row_group(number).num_rows > 4000 for number in range(groups.num_row_groups)] == [True, False]
    assert pq.read_table(place).select(tall.column_names).equals(tall)


def test_text_of_bytes_that_are_none_is_refused(score, table, tmp_path):
    values = pa.array([b"a", b"\xff"]).view(pa.string())
    pq.write_table(table.slice(0, 2).append_column("note", values), tmp_path / "in.parquet")
    with pytest.raises(ScoreError, match=r"in.parquet: damaged after row 0: In column 61: Invalid: Invalid UTF8"):
        score(tmp_path / "in.parquet", tmp_path / "out")


@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    """Somebody's own regression network: the sum of four numbers, half of them dropped."""
    network = keras.Sequential(
        [keras.Input([4], name="signal"), keras.layers.Dropout(0.5), keras.layers.Dense(1, kernel_initializer="ones")]
    )
    folder = tmp_path_factory.mktemp("brought")
    network.save(folder / "sum.keras")
    return Model.load(package(folder / "sum.keras", name="sum", repository=folder / "artifacts", task="regression"))


def test_a_vector_may_be_one_column_or_several_and_what_overflows_is_rejected(brought, tmp_path):
    rows = [[1.0, 2.0, 3.0, 4.0], [3.4e38] * 4, [5.0, 6.0, 7.0, 8.0]]
    [name] = [item.name for item in brought.manifest.inputs]
    pq.write_table(
        pa.table({f"place {place}": [row[place] for row in rows] for place in range(4)}), tmp_path / "a.parquet"
    )
    pq.write_table(pa.table({name: rows, "note": ["x", "y", "z"]}), tmp_path / "b.parquet")
    found = []
    for letter in "ab":
        out = tmp_path / f"scored_{letter}.parquet"
        job = scoring.plan(str(tmp_path / f"{letter}.parquet"), out, brought.folder, SETTINGS, 1000)

        def engine(job, pending, strict, advance):
            score_part(Scorer(brought, job.form), pending[0], job.target.shelf, threads=1, strict=strict)

        outcome = scoring.run(job, engine, strict=False, advance=lambda rows: None)
        assert (outcome.scored, outcome.rejected) == (2, 1)
        [reject] = pq.read_table(tmp_path / f"scored_{letter}.rejects.parquet").to_pylist()
        assert reject["row"] == 1
        assert "overflows" in reject["reason"]
        found.append(pq.read_table(out))
    answers = brought.run(MC_SAMPLE, {name: np.array(rows)[[0, 2]], "num_samples": 30, "seed": 7})
    for table in found:
        for column in ("mean", "epistemic_std", "standard_error"):
            np.testing.assert_allclose(table[column].to_numpy(), answers[column].reshape(2), rtol=TOLERANCE)
        assert "label" not in table.column_names


def test_strict_ends_at_the_first_bad_row_and_leaves_nothing(score, table, tmp_path):
    column = table["band_03"].to_pylist()
    column[120] = column[150] = None
    pq.write_table(table.set_column(3, "band_03", pa.array(column)), tmp_path / "in.parquet")
    with pytest.raises(RowRefused, match=r'in.parquet, row 120: feature "band_03": found null'):
        score(tmp_path / "in.parquet", tmp_path / "out", part_rows=50, strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def test_a_folder_may_have_a_name_with_a_dot_and_any_name_where_it_is_there(score, table, tmp_path):
    pq.write_table(table.slice(0, 3), tmp_path / "in.parquet")
    (tmp_path / "kept.json").mkdir()
    for name in ("scored.v2", "scored.2026-11", "kept.json"):
        assert score(tmp_path / "in.parquet", tmp_path / name).scored == 3
        assert (tmp_path / name / "part-00000.parquet").is_file()


def test_the_same_again_does_nothing_and_another_is_refused(score, table, tmp_path):
    pq.write_table(table, tmp_path / "in.parquet")
    first = score(tmp_path / "in.parquet", tmp_path / "out", part_rows=100)
    before = files(tmp_path)
    assert score(tmp_path / "in.parquet", tmp_path / "out", part_rows=100) == first
    assert files(tmp_path) == before
    for difference, said in (
        ({"settings": Settings(num_samples=31, seed=7)}, r"other settings \(num_samples=30, not 31\);"),
        ({"part_rows": 50}, "parts of 100 rows, not 50"),
    ):
        with pytest.raises(ScoreError, match=said):
            score(tmp_path / "in.parquet", tmp_path / "out", **{"part_rows": 100} | difference)
    pq.write_table(table.slice(1), tmp_path / "in.parquet")
    with pytest.raises(ScoreError, match="other files, or of files that have changed"):
        score(tmp_path / "in.parquet", tmp_path / "out", part_rows=100)


def test_outputs_of_two_kinds_stand_side_by_side(score, table, tmp_path):
    pq.write_table(table, tmp_path / "in.parquet")
    first = score(tmp_path / "in.parquet", tmp_path / "two.parquet")
    assert score(tmp_path / "in.parquet", tmp_path / "two.csv") == first
    pq.write_table(table.slice(1), tmp_path / "less.parquet")
    before = files(tmp_path)
    assert score(tmp_path / "in.parquet", tmp_path / "two.parquet") == first
    with pytest.raises(ScoreError, match=r"two\.csv: holds the scoring of other files"):
        score(tmp_path / "less.parquet", tmp_path / "two.csv")
    assert files(tmp_path) == before


def test_parts_of_no_known_scoring_are_not_taken_up(score, table, tmp_path):
    pq.write_table(table, tmp_path / "in.parquet")
    (tmp_path / ".out.parquet.work").mkdir()
    pq.write_table(table, tmp_path / ".out.parquet.work" / "part-00000.parquet")
    before = files(tmp_path)
    with pytest.raises(ScoreError, match=r"part-00000.parquet: is there already, from something else"):
        score(tmp_path / "in.parquet", tmp_path / "out.parquet")
    assert files(tmp_path) == before


def test_rejects_of_another_are_neither_removed_nor_overwritten(score, table, tmp_path):
    pq.write_table(table, tmp_path / "jan.rejects.parquet")
    before = digests(tmp_path)
    with pytest.raises(ScoreError, match=r"jan.rejects.parquet: is input, and would be written beside .*jan.parquet"):
        score(tmp_path / "jan.rejects.parquet", tmp_path / "jan.parquet")
    (tmp_path / "out.rejects.parquet").write_text("mine")
    before["out.rejects.parquet"] = hashlib.sha256(b"mine").hexdigest()
    with pytest.raises(ScoreError, match=r"out.rejects.parquet: is there already, from something else"):
        score(tmp_path / "jan.rejects.parquet", tmp_path / "out.parquet")
    assert digests(tmp_path) == before
    # Those of the run itself are no hindrance.
    bad = table.set_column(1, "band_01", pa.array([None, *table["band_01"].to_pylist()[1:]], pa.float32()))
    pq.write_table(bad, tmp_path / "feb.parquet")
    first = score(tmp_path / "feb.parquet", tmp_path / "done.parquet")
    assert first.rejected == 1
    assert score(tmp_path / "feb.parquet", tmp_path / "done.parquet") == first


def test_names_that_differ_in_case_have_rejects_of_their_own(score, table, tmp_path):
    bad = table.set_column(1, "band_01", pa.array([None, *table["band_01"].to_pylist()[1:]], pa.float32()))
    pq.write_table(bad, tmp_path / "one.parquet")
    pq.write_table(bad.slice(0, 5), tmp_path / "two.parquet")
    score(tmp_path / "one.parquet", tmp_path / "x.parquet")
    score(tmp_path / "two.parquet", tmp_path / "x.PARQUET")
    for out, source in (("parquet", "one.parquet"), ("PARQUET", "two.parquet")):
        [reject] = pq.read_table(tmp_path / f"x.rejects.{out}").to_pylist()
        assert reject["source"].endswith(source)


@pytest.mark.parametrize(("out", "rejects"), [("out", "out/_rejects.parquet"), ("out.parquet", "out.rejects.parquet")])
def test_strict_refuses_what_an_earlier_run_rejected(trained, model, score, table, tmp_path, out, rejects):
    column = table["band_03"].to_pylist()
    column[120] = column[150] = None
    pq.write_table(table.set_column(3, "band_03", pa.array(column)), tmp_path / "in.parquet")
    job = scoring.plan(str(tmp_path / "in.parquet"), tmp_path / out, trained.folder, SETTINGS, 50)

    def cut_off(job, pending, strict, advance):
        for part in pending[:3]:
            score_part(Scorer(model, job.form), part, job.target.shelf, threads=1, strict=strict)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scoring.run(job, cut_off, strict=False, advance=lambda rows: None)
    begun = files(tmp_path)
    with pytest.raises(RowRefused, match=r"rejects-00002.parquet: rows rejected by an earlier run, 1"):
        score(tmp_path / "in.parquet", tmp_path / out, part_rows=50, strict=True)
    assert files(tmp_path) == begun
    assert score(tmp_path / "in.parquet", tmp_path / out, part_rows=50).rejected == 2
    done = files(tmp_path)
    with pytest.raises(RowRefused, match=f"{rejects}: rows rejected by an earlier run, 2; wanted none, or no --strict"):
        score(tmp_path / "in.parquet", tmp_path / out, part_rows=50, strict=True)
    assert files(tmp_path) == done


@pytest.mark.parametrize(("out", "lost"), [("out", "out/part-00002.parquet"), ("out.parquet", "out.parquet")])
def test_a_finished_scoring_that_lost_a_file_is_refused(score, table, tmp_path, out, lost):
    pq.write_table(table, tmp_path / "in.parquet")
    score(tmp_path / "in.parquet", tmp_path / out, part_rows=50)
    (tmp_path / lost).unlink()
    with pytest.raises(ScoreError, match=f"score.json: says that all is done, and .*{lost} is not there; wanted "):
        score(tmp_path / "in.parquet", tmp_path / out, part_rows=50)


@pytest.mark.parametrize(
    ("folder", "source", "out", "refused"),
    [
        ("data", ".", "../scored", False),
        ("data", "*.parquet", "../scored.parquet", False),
        (".", "data", "data/../scored", False),
        (".", "data/*.parquet", "data/scored", False),
        (".", "d*/*.parquet", "scored", False),
        (".", "*/a.parquet", "data/scored.parquet", False),
        (".", "**/a.parquet", "data/scored", False),
        (".", "data/*/*.parquet", "data/.scored", False),
        (".", "data/odd[1].parquet", "data/odd1.parquet", False),
        ("data", ".", "scored", True),
        (".", "data", "link/scored", True),
        (".", "link", "data/scored", True),
        (".", "../{here}/data", "data/scored", True),
        (".", "../{here}/data/*.parquet", "data/scored.parquet", True),
        (".", "link/*.parquet", "data/scored.parquet", True),
        (".", "link/a.parquet", "data", True),
        (".", "d*/*/*.parquet", "data/scored", True),
        (".", "d*/*.parquet", "data", True),
        (".", "data/**/*.parquet", "data/scored", True),
        (".", "data/**/*.parquet", "data/scored.parquet", True),
        (".", "data/*.rejects.parquet", "data/scored.parquet", True),
    ],
)
def test_the_output_is_apart_from_the_input_whatever_the_spelling(
    trained, table, tmp_path, monkeypatch, folder, source, out, refused
):
    (tmp_path / "data" / "deeper").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for name in ("a", "odd[1]", "old.rejects", "deeper/b"):
        pq.write_table(table.slice(0, 2), tmp_path / "data" / f"{name}.parquet")
    monkeypatch.chdir(tmp_path / folder)
    source = source.format(here=tmp_path.name)
    # An independent answer: what the same command would read, were the output there.
    read = {file.resolve() for file in sources.find(source)}
    place = Path(out) if Path(out).suffix else Path(out) / "part-00000.parquet"
    written = [place, place.with_name(f"{place.stem}.rejects.parquet")] if Path(out).suffix else [place]
    if refused:
        with pytest.raises(ScoreError, match="lies where the input is read from"):
            scoring.plan(source, Path(out), trained.folder, SETTINGS, 1000)
    else:
        scoring.plan(source, Path(out), trained.folder, SETTINGS, 1000)
    for file in written:
        file.parent.mkdir(exist_ok=True)
        pq.write_table(table.slice(0, 2), file)
    assert ({file.resolve() for file in sources.find(source)} != read) is refused or out == "data"


@pytest.mark.parametrize("pattern", ["*/part-00002.*", "*/part-*[1-9].parquet"])
def test_no_later_part_becomes_input(trained, table, tmp_path, pattern):
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "part-00002.parquet")
    wanted = f"{tmp_path}/{pattern}"
    # There would be one part, which the pattern does not find.
    scoring.plan(wanted, tmp_path / "out", trained.folder, SETTINGS, 208)
    with pytest.raises(ScoreError, match="out: lies where the input is read from"):
        scoring.plan(wanted, tmp_path / "out", trained.folder, SETTINGS, 70)


def test_no_rows_give_no_rows(score, table, tmp_path):
    pq.write_table(table.slice(0, 0), tmp_path / "in.parquet")
    (tmp_path / "in.csv").write_text(",".join(table.column_names) + "\n")
    for kind in ("parquet", "csv"):
        assert score(tmp_path / f"in.{kind}", tmp_path / f"{kind}.parquet").scored == 0
        scored = pq.read_table(tmp_path / f"{kind}.parquet")
        assert (scored.num_rows, "std_mine" in scored.column_names) == (0, True)


@pytest.fixture(scope="module")
def many(table, tmp_path_factory):
    """Enough rows that a kill finds the work half done."""
    folder = tmp_path_factory.mktemp("many")
    pq.write_table(pa.concat_tables([table] * 60), folder / "in.parquet")
    return folder / "in.parquet"


@pytest.mark.parametrize("out", ["out", "out.csv"])
def test_killed_in_the_middle_the_same_command_goes_on_and_ends_the_same(trained, score, many, tmp_path, out):
    settings = Settings(num_samples=100, seed=0)
    command = ["score", many, "--model", "sonar", "--repository", trained.repository, "--part-rows", 400, "--json"]
    (tmp_path / "calm").mkdir()
    (tmp_path / "killed").mkdir()
    calm = score(many, tmp_path / "calm" / out, settings=settings, part_rows=400)
    arguments = [sys.executable, str(ROOT / "dropserve.py"), *map(str, [*command, tmp_path / "killed" / out])]
    shelf = tmp_path / "killed" / (out if out == "out" else f".{out}.work")
    with subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        while len(list(shelf.glob("part-*"))) < 3:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    done = {name: file for name, file in files(shelf).items() if name.startswith("part-")}
    assert 3 <= len(done) < 32
    again = dropserve(*command, tmp_path / "killed" / out, cwd=tmp_path)
    assert digests(tmp_path / "killed") == digests(tmp_path / "calm")
    if out == "out":  # what was done was left as it was
        assert {name: files(shelf)[name] for name in done} == done
    counts = json.loads(again.stdout)
    assert counts["rows"] == calm.scored == 60 * 208
    assert list(shelf.glob("_work")) == []


def priorities_of(name: str) -> set[int]:
    """Of the processes below this one that are called so."""
    found: set[int] = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "".join(process.cmdline()).startswith(name):
                found.add(process.nice())
    return found


@pytest.mark.parametrize("out", ["out", "out.parquet"])
def test_killed_before_anything_is_begun_the_same_command_begins(trained, score, table, tmp_path, out):
    pq.write_table(table, tmp_path / "in.parquet")
    killed = f"""
import os, signal, sys
from pathlib import Path
from serving.scoring import job
from serving.scoring.scorer import Settings
planned = job.plan("in.parquet", Path({out!r}), Path({str(trained.folder)!r}), Settings(num_samples=30, seed=7), 1000)
sys.addaudithook(lambda event, _: os.kill(os.getpid(), signal.SIGKILL) if event == "os.rename" else None)
job.run(planned, None, strict=False, advance=lambda rows: None)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", killed], cwd=tmp_path, env=environment, check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert any(path.name.endswith("score.json.unfinished") for path in tmp_path.rglob("*"))
    assert score(tmp_path / "in.parquet", tmp_path / out).scored == 208
    assert not any(path.name.endswith(".unfinished") for path in tmp_path.rglob("*"))


def test_ray_gives_what_this_process_gives(trained, score, table, tmp_path):
    pytest.importorskip("ray")
    column = table["band_03"].to_pylist()
    column[120] = None
    pq.write_table(table.set_column(3, "band_03", pa.array(column)), tmp_path / "in.parquet")
    score(tmp_path / "in.parquet", tmp_path / "here", part_rows=60)
    command = ["score", tmp_path / "in.parquet", tmp_path / "ray", "--model", "sonar", "--repository"]
    command += [trained.repository, "--num-samples", 30, "--seed", 7, "--part-rows", 60, "--ray"]
    priorities: set[int] = set()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(dropserve, *command, cwd=tmp_path)
        while not running.done():
            priorities |= priorities_of("ray::MapWorker")
            time.sleep(0.1)
        done = running.result()
    assert priorities == {os.getpriority(os.PRIO_PROCESS, 0)}
    assert "207 rows scored by sonar" in done.stdout
    for name in ("part-00000.parquet", "part-00002.parquet", "part-00003.parquet", "_rejects.parquet"):
        assert_same(pq.read_table(tmp_path / "ray" / name), pq.read_table(tmp_path / "here" / name))
    refused = dropserve(*command[:2], tmp_path / "strict", *command[3:], "--strict", cwd=tmp_path, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    # Ray's core may log a worker that was busy at the end, whatever it is told.
    [line] = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "row 120" in line
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("source", "out", "options", "said"),
    [
        ("absent.csv", "out", [], "absent.csv: not there"),
        ("*.parquet.gz", "out", [], "no file whose name ends with"),
        ("notes.csv", "out", [], "no column 'band_01' (and 59 others), found text"),
        ("damaged.parquet", "out", [], "damaged.parquet: cannot be read"),
        ("empty.csv", "out", [], "empty.csv: no columns"),
        ("text.parquet", "out", [], "column 'band_01' is of type string"),
        ("label.csv", "out", [], "column 'label' of its own"),
        (
            "struct.parquet",
            "out.csv",
            [],
            "out.csv: column 'extra' holds structs, which CSV cannot; wanted a name in .parquet",
        ),
        ("map.parquet", "out.csv", [], "column 'extra' holds maps, which CSV cannot"),
        ("list.parquet", "out.csv", [], "column 'extra' holds lists, which CSV cannot"),
        ("uuid.parquet", "out.csv", [], "column 'extra' holds values of type extension<arrow.uuid>, which CSV cannot"),
        ("views.parquet", "out", [], "column 'extra' is of type struct<a: string_view>; wanted one that rows are"),
        (
            "good.csv",
            "out.tsv",
            [],
            "out.tsv: a file in .tsv, which is not written; wanted .csv, .parquet, or a folder",
        ),
        ("good.csv", "out.csv.GZ", [], "out.csv.GZ: a file in .GZ, which is not written"),
        ("good.csv", "b\udcff", [], "b\\xff: a name that is not UTF-8"),
        ("latin/\udcff.csv", "out", [], "latin/\\xff.csv: a name that is not UTF-8"),
        (".", "out", [], "Parquet and CSV files"),
        ("good.csv", "good.csv", [], "lies where the input is read from"),
        ("*.csv", "out.csv", [], "lies where the input is read from"),
        ("good.csv", "notes.csv", [], "notes.csv: is there already"),
        ("good.csv", "notes.csv/out", [], "cannot be made"),
        ("good.csv", "out", ["--model", "radar"], "no model 'radar', found sonar"),
        ("good.csv", "out", ["--version", "9"], "no version 9, wanted one of 1"),
        ("good.csv", "out", ["--num-samples", "1"], "--num-samples"),
        ("good.csv", "out", ["--seed", "x"], "--seed"),
        ("good.csv", "out", ["--prefix", "mc\udcff_"], "--prefix: found mc\\xff_, which is not UTF-8; wanted text"),
    ],
)
def test_bad_input_ends_with_exit_code_2_and_one_line(trained, table, tmp_path, source, out, options, said):
    pyarrow.csv.write_csv(table.slice(0, 2), tmp_path / "good.csv")
    (tmp_path / "notes.csv").write_text("text\nhello\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and then nothing")
    texts = pa.table({name: ["0.5"] for name in BANDS})
    pq.write_table(texts, tmp_path / "text.parquet")
    pyarrow.csv.write_csv(texts.append_column("label", [["mine"]]), tmp_path / "label.csv")
    values = {
        "struct": pa.array([{"a": 1}, {"a": 2}]),
        "map": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
        "list": pa.array([[1], [2, 3]]),
        "uuid": pa.array([b"a" * 16, None], pa.uuid()),
        "views": pa.array([{"a": "b"}, None], pa.struct([("a", pa.string_view())])),
    }
    (tmp_path / "latin").mkdir()
    pyarrow.csv.write_csv(table.slice(0, 2), tmp_path / "latin" / "b.csv")
    (tmp_path / "latin" / "b.csv").rename(tmp_path / "latin" / "\udcff.csv")
    for name, extra in values.items():
        pq.write_table(table.slice(0, 2).append_column("extra", extra), tmp_path / f"{name}.parquet")
    before = files(tmp_path)
    command = ["score", source, out, "--model", "sonar", "--repository", trained.repository, *options]
    done = dropserve(*command, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert files(tmp_path) == before


def test_two_at_once_on_the_same_output_are_refused(score, table, trained, tmp_path):
    pq.write_table(table, tmp_path / "in.parquet")
    job = scoring.plan(str(tmp_path / "in.parquet"), tmp_path / "out", trained.folder, SETTINGS, 100)

    def engine(job, pending, strict, advance):
        with pytest.raises(ScoreError, match="another scoring works on it now"):
            score(tmp_path / "in.parquet", tmp_path / "out", part_rows=100)
        raise ScoreError("the test ends here")

    with pytest.raises(ScoreError, match="the test ends here"):
        scoring.run(job, engine, strict=False, advance=lambda rows: None)
    assert score(tmp_path / "in.parquet", tmp_path / "out", part_rows=100).scored == 208


@pytest.mark.parametrize(
    ("encoding", "row", "said"),
    [
        ("latin-1", 0, r"byte 0xe4 in line 2"),
        # Beyond what is read for the header.
        ("latin-1", 207, r"byte 0xe4 in line 209"),
        ("utf-16", 0, "UTF-16, as it looks"),
        ("utf-16-le", 0, "UTF-16, as it looks"),
    ],
)
def test_another_encoding_is_refused_before_anything_is_scored(score, table, tmp_path, encoding, row, said):
    names = table["id"].to_pylist()
    names[row] = "ä"
    pyarrow.csv.write_csv(table.set_column(0, "id", pa.array(names)), tmp_path / "in.csv")
    text = (tmp_path / "in.csv").read_text(encoding="utf-8")
    (tmp_path / "in.csv").write_text(text, encoding=encoding)
    with pytest.raises(ScoreError, match=rf"in\.csv: not UTF-8 text \({said}\); wanted a CSV file saved as UTF-8$"):
        score(tmp_path / "in.csv", tmp_path / "out.parquet", part_rows=10)
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


def test_names_with_an_underscore_are_refused_in_a_folder_and_scored_where_they_are_meant(score, table, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(table, folder / "a.parquet")
    pq.write_table(table.slice(0, 5), folder / "_b.parquet")
    with pytest.raises(ScoreError, match=r"in/_b.parquet: a name with an underscore in front.*as '.*/in/\*.parquet'"):
        score(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert score(f"{folder}/*.parquet", tmp_path / "out").scored == 213
    (folder / "_b.parquet").unlink()
    (folder / "_temporary").mkdir()
    pq.write_table(table, folder / "_temporary" / "c.parquet")
    with pytest.raises(ScoreError, match=r"_temporary/c.parquet: a name with an underscore"):
        score(folder, tmp_path / "again")


def test_what_an_earlier_scoring_left_beside_its_parts_is_no_data(score, table, tmp_path):
    column = table["band_03"].to_pylist()
    column[7] = None
    pq.write_table(table.set_column(3, "band_03", pa.array(column)), tmp_path / "in.parquet")
    assert score(tmp_path / "in.parquet", tmp_path / "once").rejected == 1
    assert (tmp_path / "once" / "_rejects.parquet").exists()
    assert (
        score(tmp_path / "once", tmp_path / "twice", settings=SETTINGS.model_copy(update={"prefix": "second_"})).scored
        == 207
    )
