"""The numbers of a row, of a regression that answers with several: each is judged as if it had a network of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.contract import ModelOutput, OutputCalibration, TargetNoises

Array = NDArray[Any]

# Numbers of a row that are judged at most: more judgements than these nobody reads.
MOST = 16
# What a signature says of each of them, and is judged.
STATISTICS = ("mean", "epistemic_std", "aleatoric_std", "std")
# What calibration says of one of the numbers.
_WARNING = re.compile(r"number (\d+): (.*)", re.DOTALL)


@dataclass(frozen=True)
class Numbers:
    """Those of one output; the first ones are judged."""

    rows: int
    # As the answers have them: (D,) or (H, W).
    shape: tuple[int, ...]

    @classmethod
    def of(cls, output: ModelOutput, target: Array) -> Numbers | None:
        """None where the output has one number a row, or is no regression. target: the true answers [N, ...]."""
        return cls(len(target), target.shape[1:]) if has_numbers(output) else None

    @property
    def judged(self) -> int:
        return min(prod(self.shape), MOST)

    @property
    def left_out(self) -> int:
        return prod(self.shape) - self.judged

    def chosen(self, values: Array, before: int = 1) -> Array:
        """[N, ..., J] those that are judged, of values with the numbers' axes behind the first `before`."""
        flat = values.reshape(*values.shape[:before], -1)
        # A copy, as a view would keep the rest in memory.
        return flat[..., : self.judged].copy() if self.left_out else flat

    def served(self, values: Mapping[str, Array], number: int, prefix: str = "") -> dict[str, Array]:
        """What a signature gives, of the statistics [N, J] with this prefix only those of one number, [N]."""
        own = {prefix + name for name in STATISTICS}
        return {name: array[:, number] if name in own else array for name, array in values.items()}

    def output(self, output: ModelOutput, number: int) -> ModelOutput:
        """One of the numbers as an output of its own: `size[0]`, or `map[1, 2]`."""
        place = ", ".join(str(index) for index in np.unravel_index(number, self.shape))
        return output.model_copy(update={"name": f"{output.name}[{place}]", "shape": []})


def has_numbers(output: ModelOutput) -> bool:
    """Whether a row has several numbers."""
    return output.task == "regression" and bool(output.shape)


def calibration_of(known: OutputCalibration | None, number: int) -> OutputCalibration | None:
    """What the calibration of all numbers says of one: its own noise, scores and warnings."""
    if known is None:
        return None
    fit, conformal = known.fit, known.conformal
    if isinstance(fit, TargetNoises):
        fit = fit.targets[number]
    if conformal is not None:
        conformal = conformal.model_copy(update={"scores": [conformal.scores[number]]})
    warnings = [own for warning in known.warnings if (own := _of_number(warning, number)) is not None]
    return known.model_copy(update={"fit": fit, "conformal": conformal, "warnings": warnings})


def _of_number(warning: str, number: int) -> str | None:
    """A warning of this number or of all; None where it is another number's."""
    found = _WARNING.fullmatch(warning)
    if found is None:
        return warning
    return found[2] if int(found[1]) == number else None
