"""Two calibrated models whose signatures know nothing of it: their manifests are given scores by hand."""

from pathlib import Path

import numpy as np

from models.artifact import publish
from models.contract import Abstention, Calibration, ConformalScores, OutputCalibration, UncertaintyReference
from tests.models.networks import regression_net, tiny_net
from tests.serving.versions import publish_as

LABELS = ["ant", "bee", "cat"]
ROWS = np.random.default_rng(0).normal(size=(60, 4)).round(3).tolist()
SIDES = [
    {"left": left, "right": right}
    for left, right in zip(
        np.random.default_rng(1).normal(size=(40, 3)).round(3).tolist(),
        np.random.default_rng(2).normal(size=(40, 2)).round(3).tolist(),
        strict=True,
    )
]
SCORES = np.linspace(0.2, 0.8, 99).tolist()
WIDTHS = np.linspace(0.1, 3, 39).tolist()
THRESHOLD = 0.6


def publish_calibrated(root: Path) -> Path:
    """A repository with `tiny`, three classes, and `branches`, a regression of two inputs; each is version 1."""
    made = root.with_name(f"{root.name}-uncalibrated")
    for net, labels, output, known in (
        (
            tiny_net(),
            LABELS,
            "answer",
            OutputCalibration(
                conformal=ConformalScores(kind="lac", scores=[SCORES]),
                abstention=Abstention(statistic="confidence", threshold=THRESHOLD, answered_share=0.9, error=0.1),
                reference=UncertaintyReference(abstention_share=0.1),
            ),
        ),
        (
            regression_net(),
            None,
            "target",
            OutputCalibration(conformal=ConformalScores(kind="interval", scores=[WIDTHS])),
        ),
    ):
        folder = publish(net, name=net.name, repository=made, labels=labels)
        publish_as(folder, root, 1, calibration=Calibration(rows=99, outputs={output: known}))
    return root
