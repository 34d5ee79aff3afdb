"""A manifest that no artifact belongs to, for what reads nothing else."""

from collections.abc import Sequence
from typing import Any

from models.contract import Calibration, Manifest, ModelInput, ModelOutput


def made_up_manifest(
    inputs: Sequence[ModelInput] = (),
    outputs: Sequence[ModelOutput] = (),
    calibration: dict[str, Any] | None = None,
) -> Manifest:
    return Manifest(
        name="some",
        version=1,
        created="2026-01-01T00:00:00+00:00",
        inputs=list(inputs),
        outputs=list(outputs),
        stochastic_layers=[],
        num_samples=100,
        seed=0,
        signatures={},
        examples=[],
        library_versions={},
        files={},
        calibration=None if calibration is None else Calibration.model_validate(calibration),
    )
