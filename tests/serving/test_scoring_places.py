"""`dropserve score` of models with an answer for each place of a row: list columns, as the signature answers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.artifact import publish
from tests.models.artifacts import Artifact
from tests.models.networks import places_net
from tests.process import ROOT

LABELS = ["noun", "verb", "name"]
DRAWN = {"num_samples": 30, "seed": 5}
KINDS: dict[str, Any] = {"sequence": (6, 2), "map": (3, 4, 2), "free": (None, 2), "values": (3, 4, 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    for kind, shape in KINDS.items():
        net = places_net(2, shape, "linear") if kind == "values" else places_net(3, shape)
        publish(net, name=kind, repository=folder / "artifacts", labels=None if kind == "values" else LABELS)
    return folder


def score(folder: Path, kind: str, rows: list, out: str, *more: str) -> subprocess.CompletedProcess[str]:
    pq.write_table(pa.table({"id": list(range(len(rows))), "x": rows}), folder / f"{out}.in.parquet")
    arguments = [f"{out}.in.parquet", out, "--model", kind, "--num-samples", "30", "--seed", "5", *more]
    return subprocess.run(
        [sys.executable, str(ROOT / "dropserve.py"), "score", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


@pytest.mark.parametrize("kind", ["sequence", "map"])
def test_each_column_has_the_list_over_the_places(folder, kind):
    x = np.random.default_rng(0).normal(size=(5, *KINDS[kind])).astype(np.float32)
    done = score(folder, kind, x.tolist(), f"{kind}.parquet", "--part-rows", "2")
    assert (done.returncode, done.stderr) == (0, "")
    table = pq.read_table(folder / f"{kind}.parquet")
    expected = Artifact(folder / "artifacts" / kind / "1").sample(x, **DRAWN)
    best = expected["probabilities"].argmax(axis=-1)
    assert table["id"].to_pylist() == list(range(5))
    assert table["label"].to_pylist() == np.array(LABELS, object)[best].tolist()
    for name in ("probabilities", "std", "standard_error", "lower", "upper"):
        for number, label in enumerate(LABELS):
            column = "probability" if name == "probabilities" else name
            np.testing.assert_allclose(table[f"{column}_{label}"].to_pylist(), expected[name][..., number], atol=1e-6)
    for name in ("std", "standard_error"):
        own = np.take_along_axis(expected[name], best[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(table[name].to_pylist(), own, atol=1e-6)
    for name in ("predictive_entropy", "expected_entropy", "mutual_information"):
        np.testing.assert_allclose(table[name].to_pylist(), expected[name], atol=1e-5)
    assert table["num_samples"].to_pylist() == [30] * 5


def test_rows_of_free_axes_have_as_many_places_as_they_have(folder):
    random = np.random.default_rng(1)
    rows = [random.normal(size=(size, 2)).astype(np.float32) for size in (3, 7, 3, 1)]
    given = [row.tolist() for row in rows]
    given[2] = [[1.0, 2.0, 3.0]]
    done = score(folder, "free", given, "free.parquet")
    assert (done.returncode, done.stderr) == (0, "")
    table = pq.read_table(folder / "free.parquet")
    assert table["id"].to_pylist() == [0, 1, 3]
    artifact = Artifact(folder / "artifacts" / "free" / "1")
    for place, row in enumerate((rows[0], rows[1], rows[3])):
        expected = artifact.sample(row[None], **DRAWN)
        np.testing.assert_allclose(
            table["probability_verb"][place].as_py(), expected["probabilities"][0, :, 1], atol=1e-6
        )
    assert pq.read_table(folder / "free.rejects.parquet")["row"].to_pylist() == [2]


def test_values_of_several_axes_are_lists_too(folder):
    x = np.random.default_rng(2).normal(size=(4, 3, 4, 2)).astype(np.float32)
    done = score(folder, "values", x.tolist(), "values.parquet", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["rows"] == 4
    table = pq.read_table(folder / "values.parquet")
    expected = Artifact(folder / "artifacts" / "values" / "1").sample(x, **DRAWN)
    for name in ("mean", "epistemic_std", "standard_error"):
        np.testing.assert_allclose(table[name].to_pylist(), expected[name], atol=1e-5)


def test_csv_is_refused_as_it_has_no_lists(folder):
    done = score(folder, "sequence", np.zeros((2, 6, 2)).tolist(), "lists.csv")
    assert done.returncode == 2
    assert done.stderr.startswith("error: lists.csv: column ")
    assert done.stderr.endswith("holds lists, which CSV cannot; wanted a name in .parquet\n")
    assert not (folder / "lists.csv").exists()


def test_what_is_scored_twice_has_the_same_bytes_and_labels_take_little_room(folder):
    x = np.random.default_rng(3).normal(size=(300, 6, 2)).tolist()
    for out in ("first.parquet", "second.parquet"):
        assert score(folder, "sequence", x, out).returncode == 0
    assert (folder / "first.parquet").read_bytes() == (folder / "second.parquet").read_bytes()
    group = pq.ParquetFile(folder / "first.parquet").metadata.row_group(0)
    columns = {group.column(place).path_in_schema: group.column(place) for place in range(group.num_columns)}
    assert "RLE_DICTIONARY" in columns["label.list.element"].encodings
