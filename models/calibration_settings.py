"""What is asked of a calibration. No TensorFlow: bad values are refused at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# How prediction sets are made: lac and aps as in `models.contract.ConformalScores`; class: LAC with the scores of each
# class on their own, so that the coverage holds for each class.
Sets = Literal["lac", "aps", "class"]


@dataclass(frozen=True)
class CalibrationSettings:
    sets: Sets = "lac"


AS_USUAL = CalibrationSettings()
