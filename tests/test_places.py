"""The command line on a model with a class for each place of a row: what it does, and what it refuses in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.models.networks import places_net
from tests.process import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A network, held-out rows that fit it and others that do not, and a table of rows."""
    folder, random = tmp_path_factory.mktemp("places"), np.random.default_rng(0)
    x = random.normal(size=(40, 6, 3)).astype(np.float32)
    places_net(4).save(folder / "net.keras")
    inputs = keras.Input((4,), name="x")
    keras.Model(inputs, places_net(4)(keras.layers.Reshape((6, 3))(keras.layers.Dense(18)(inputs)))).save(
        folder / "flat.keras"
    )
    places_net(4, (None, 3)).save(folder / "free.keras")
    np.savez(folder / "rows.npz", x=x, y=random.integers(0, 4, (40, 6)))
    np.savez(folder / "short.npz", x=x, y=random.integers(0, 4, (40, 5)))
    pq.write_table(pa.table({name: random.normal(size=5) for name in "abcd"}), folder / "rows.parquet")
    assert dropserve(folder, "package", "net.keras", "--name", "net", "--calibration", "rows.npz").returncode == 0
    assert dropserve(folder, "package", "flat.keras", "--name", "flat").returncode == 0
    assert dropserve(folder, "package", "free.keras", "--name", "free").returncode == 0
    return folder


def dropserve(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "dropserve.py"), *arguments, "--repository", str(folder / "artifacts")]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=300
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["package", "net.keras", "--name", "other", "--calibration", "short.npz"], "(40, 6) wanted for 40 rows"),
        (
            ["package", "net.keras", "--name", "other", "--calibration", "rows.npz", "--max-error", "0.1"],
            "max-error: only for one class a row: this model answers with a class for each place of a row",
        ),
        (["evaluate", "net", "short.npz"], "y: shape (40, 5) found, (40, 6) wanted for 40 rows"),
        (
            ["evaluate", "free", "short.npz"],
            "held-out answers of output 'answer': shape (40, 5) found, (40, 6) wanted for these rows",
        ),
        (
            ["score", "--model", "flat", "rows.parquet", "out.csv"],
            "out.csv: column 'label' holds lists, which CSV cannot; wanted a name in .parquet",
        ),
    ],
    ids=["answers of other places", "a promise", "evaluate", "evaluate, free places", "score"],
)
def test_what_is_of_one_class_a_row_ends_with_exit_code_2_and_one_line(folder, arguments, said):
    done = dropserve(folder, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (folder / "artifacts" / "other").exists()
    assert not (folder / "out.csv").exists()


def test_packaging_says_what_it_calibrated_and_what_it_left_out(folder):
    done = dropserve(folder, "package", "net.keras", "--name", "told", "--calibration", "rows.npz")
    assert done.returncode == 0
    assert "  temperature 4: NLL" in done.stdout
    assert "neither prediction sets nor abstention: a row has several classes (shape [6, 4])" in done.stdout
