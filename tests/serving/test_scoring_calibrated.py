"""Columns that scoring adds for calibrated models: those of `/uncertainty`, at the coverage that was asked for."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from serving.runtime import Model
from serving.scoring import job as scoring
from serving.scoring.errors import ScoreError
from serving.scoring.parts import score_part
from serving.scoring.scorer import Scorer, Settings
from tests.process import ROOT
from tests.serving.calibrated import LABELS, ROWS, SCORES, SIDES, THRESHOLD, WIDTHS, publish_calibrated


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    return publish_calibrated(tmp_path_factory.mktemp("calibrated"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    pq.write_table(pa.table({"x": ROWS, "note": ["kept"] * len(ROWS)}), folder / "tiny.parquet")
    pq.write_table(pa.table({side: [row[side] for row in SIDES] for side in ("left", "right")}), folder / "b.parquet")
    by_number = {f"x{place}": [row[place] for row in ROWS] for place in range(4)}
    pyarrow.csv.write_csv(pa.table(by_number), folder / "tiny.csv")
    return folder


@pytest.fixture(scope="module")
def score(repository) -> Callable[..., None]:
    """Plan and run in this process, with models that are loaded once."""
    models = {name: Model.load(repository / name / "1") for name in ("tiny", "branches")}

    def run(name: str, source: Path, out: Path, coverage: float | None = None) -> None:
        model = models[name]
        settings = Settings(num_samples=100, seed=0, coverage=coverage)

        def engine(job, pending, strict, advance):
            for part in pending:
                score_part(Scorer(model, job.form), part, job.target.shelf, threads=1, strict=strict)

        job = scoring.plan(str(source), out, model.folder, settings, 25)
        assert scoring.run(job, engine, strict=True, advance=lambda rows: None).rejected == 0

    return run


@pytest.mark.parametrize(("coverage", "rank"), [(None, 90), (0.5, 50)], ids=["by default", "half"])
def test_sets_are_lists_of_labels_and_answers_may_be_withheld(score, rows, tmp_path, coverage, rank):
    score("tiny", rows / "tiny.parquet", tmp_path / "out.parquet", coverage)
    scored = pq.read_table(tmp_path / "out.parquet")
    assert scored.schema.field("prediction_set").type == pa.list_(pa.string())
    assert scored.schema.field("abstain").type == pa.bool_()
    for row in scored.to_pylist():
        found = {label: row[f"probability_{label}"] for label in LABELS}
        assert row["prediction_set"] == [label for label in LABELS if 1 - found[label] <= SCORES[rank - 1]]
        assert row["abstain"] == (max(found.values()) < THRESHOLD)
    assert len({tuple(row) for row in scored["prediction_set"].to_pylist()}) > 2


def test_in_csv_a_set_is_one_text(score, rows, tmp_path):
    score("tiny", rows / "tiny.csv", tmp_path / "text.csv", 0.95)
    score("tiny", rows / "tiny.csv", tmp_path / "lists.parquet", 0.95)
    lists = pq.read_table(tmp_path / "lists.parquet")["prediction_set"].to_pylist()
    text = pyarrow.csv.read_csv(tmp_path / "text.csv")["prediction_set"].to_pylist()
    assert text == ["|".join(labels) for labels in lists]


def test_intervals_are_two_columns(score, rows, tmp_path):
    score("branches", rows / "b.parquet", tmp_path / "out.parquet")
    for row in pq.read_table(tmp_path / "out.parquet").to_pylist():
        reach = WIDTHS[35] * row["epistemic_std"]
        ends = {"interval_lower": row["mean"] - reach, "interval_upper": row["mean"] + reach}
        assert {name: row[name] for name in ends} == pytest.approx(ends, rel=1e-5, abs=1e-5)
        assert "abstain" not in row


def test_another_coverage_is_another_scoring(score, rows, tmp_path):
    score("tiny", rows / "tiny.parquet", tmp_path / "out.parquet", 0.8)
    score("tiny", rows / "tiny.parquet", tmp_path / "out.parquet", 0.8)
    with pytest.raises(ScoreError, match="holds the scoring of other settings"):
        score("tiny", rows / "tiny.parquet", tmp_path / "out.parquet", 0.9)


def test_a_result_that_is_gone_is_missed(score, rows, tmp_path):
    score("tiny", rows / "tiny.csv", tmp_path / "out.csv")
    (tmp_path / "out.csv").unlink()
    with pytest.raises(ScoreError, match=r"out\.csv\.score\.json: says that all is done, and .*out\.csv is not there"):
        score("tiny", rows / "tiny.csv", tmp_path / "out.csv")


def dropserve(repository: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dropserve", "score", *map(str, arguments), "--repository", str(repository)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


def test_too_few_calibration_rows_are_warned_of(repository, rows, tmp_path):
    command = [rows / "tiny.parquet", tmp_path / "out.parquet", "--model", "tiny", "--coverage", "0.995"]
    warning = "coverage 0.995: 199 calibration rows wanted, there are 99; every set is the full one"
    assert dropserve(repository, *command).stderr == f"warning: {warning}\n"
    assert json.loads(dropserve(repository, *command, "--json").stdout)["warnings"] == [warning]
    assert pq.read_table(tmp_path / "out.parquet")["prediction_set"].to_pylist() == [LABELS] * len(ROWS)


@pytest.mark.parametrize("coverage", ["0", "1", "90", "nan"])
def test_a_coverage_that_is_none_ends_with_exit_code_2(repository, rows, tmp_path, coverage):
    command = [rows / "tiny.parquet", tmp_path / "out.parquet", "--model", "tiny", "--coverage", coverage]
    done = dropserve(repository, *command)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: --coverage: found {coverage}, wanted a number between 0 and 1\n"


def test_a_coverage_of_an_uncalibrated_model_ends_with_exit_code_2(repository, rows, tmp_path):
    uncalibrated = repository.with_name(f"{repository.name}-uncalibrated")
    command = [rows / "tiny.parquet", tmp_path / "out.parquet", "--model", "tiny", "--coverage", "0.9"]
    done = dropserve(uncalibrated, *command)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --coverage: found 0.9, wanted none: this model has no calibration scores")
