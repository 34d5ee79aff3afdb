"""Whether calibrated Monte Carlo answers beat one softmax, on rows like the training rows and on rows that are not.

    .venv/bin/python -m benchmarks.calibration [--epochs N] [--json]

Trains digits and breast_cancer as `dropserve train` does, and prints what their artifacts' own signatures say: of the
held-out test rows, of the digits rotated and noised, and of images that are no digits.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.ndimage import rotate

from models.contract import Manifest, read_manifest
from training import held_out, scores
from training.artifact_answers import Artifact
from training.assessment import assess, normalised
from training.bootstrap import intervals
from training.judged import Judged
from training.plan import plan
from training.progress import Reporter

Array = NDArray[Any]

ANGLES = (0, 15, 30, 45, 60, 75, 90)
# Standard deviations of noise on pixels of 0 to 16.
NOISES = (1, 2, 4, 8)


def main(
    epochs: Annotated[int | None, typer.Option(help="Of training; default: the recipe's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    document: dict[str, Any] = {}
    console = Console(stderr=as_json)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BENTOML_HOME"] = f"{folder}/bentoml"
        for name in ("digits", "breast_cancer"):
            artifact, held = trained(name, Path(folder), epochs)
            [judged] = assess(artifact, held)
            document[name] = compared(judged)
            console.print(
                table(f"{name}: {judged.best_kind} minus deterministic, {held.rows} test rows", document[name])
            )
            if name == "digits":
                document["shift"] = shift(artifact, held)
                console.print(table("digits shifted: nll, calibrated draws beside dropout off", document["shift"]))
                document["outliers"] = judged.outliers
                console.print(table("digits or not: AUROC", aurocs(judged)))
    if as_json:
        print(json.dumps(document, indent=2))


def trained(name: str, repository: Path, epochs: int | None) -> tuple[Artifact, held_out.HeldOut]:
    request = plan(name, repository=repository, seed=0, num_samples=100, epochs=epochs)
    # BentoML reads BENTOML_HOME when it is imported.
    from training.pipeline import train

    folder = train(request, Reporter(quiet=True)).folder
    manifest: Manifest = read_manifest(folder)
    return Artifact(folder, manifest), held_out.read(name, manifest)


def compared(judged: Judged) -> dict[str, dict[str, Any]]:
    """Differences with their intervals, and in words what they show."""
    return {
        name: {
            "deterministic": judged.figures["deterministic"][name],
            "served": judged.figures[judged.best_kind][name],
            "lower": lower,
            "upper": upper,
            "shown": "better" if upper < 0 else "worse" if lower > 0 else "no difference",
        }
        for name, (_, (lower, upper)) in judged.differences.items()
        if name in ("nll", "ece", "adaptive_ece", "brier")
    }


def shift(artifact: Artifact, held: held_out.HeldOut) -> dict[str, dict[str, Any]]:
    """NLL of the digits rotated, and noised."""
    images, y = held.inputs["image"], held.targets[0]
    generator = np.random.default_rng(0)
    shifted = {f"{angle} degrees": rotate(images, angle, axes=(1, 2), reshape=False, order=1) for angle in ANGLES}
    for noise in NOISES:
        shifted[f"noise {noise}"] = np.clip(images + generator.normal(0, noise, images.shape), 0, 16)
    found = {}
    for name, values in shifted.items():
        [answers] = artifact.answers({"image": values.astype(np.float32)}, held.targets)
        off, on = (normalised(p) for p in (answers.deterministic, answers.served["probabilities"]))

        def figures(rows: Array, off: Array = off, on: Array = on) -> dict[str, float]:
            return {
                "": scores.classification(on[rows], y[rows])["nll"] - scores.classification(off[rows], y[rows])["nll"]
            }

        lower, upper = intervals(figures, len(y))[""]
        found[name] = {
            "deterministic": nll(off, y),
            "served": nll(on, y),
            "lower": lower,
            "upper": upper,
            "shown": "better" if upper < 0 else "worse" if lower > 0 else "no difference",
        }
    return found


def nll(probabilities: Array, y: Array) -> float:
    return scores.classification(probabilities, y)["nll"]


def aurocs(judged: Judged) -> dict[str, dict[str, Any]]:
    return {
        kind: {score: figures["auroc"] for score, figures in by_score.items()}
        for kind, by_score in judged.outliers.items()
    }


def table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    made = Table(title=title, title_justify="left")
    made.add_column("")
    for heading in next(iter(rows.values())):
        made.add_column(heading, justify="right")
    for name, row in rows.items():
        made.add_row(name, *[value if isinstance(value, str) else f"{value:.4g}" for value in row.values()])
    return made


if __name__ == "__main__":
    typer.run(main)
