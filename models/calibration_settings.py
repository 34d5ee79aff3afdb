"""What is asked of a calibration. No TensorFlow: bad values are refused at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from models.contract import DEFAULT_COVERAGE, ArtifactError

# How prediction sets are made: lac and aps as in `models.contract.ConformalScores`; class: LAC with the scores of each
# class on their own, so that the coverage holds for each class.
Sets = Literal["lac", "aps", "class"]


class SettingsError(ArtifactError):
    """An option of the calibration cannot be honoured. One line: the option, what was found, what is wanted."""


@dataclass(frozen=True)
class CalibrationSettings:
    sets: Sets = "lac"
    # Abstention, classification: among answers that are given at most this share is wrong ...
    max_error: float | None = None
    # ... with this probability over the draw of the calibration rows.
    confidence: float = 0.95
    # Abstention, classification: how many answers withheld a wrong one costs.
    cost_ratio: float | None = None
    # Share of rows whose prediction set or interval holds the truth, where a request names none.
    coverage: float = DEFAULT_COVERAGE

    def __post_init__(self) -> None:
        if not 0 < self.coverage < 1:
            raise SettingsError(f"coverage {self.coverage:g}: wanted a share above 0 and below 1")
        if self.max_error is not None and not 0 < self.max_error < 1:
            raise SettingsError(f"max-error {self.max_error:g}: wanted a share above 0 and below 1")
        if not 0 < self.confidence < 1:
            raise SettingsError(f"confidence {self.confidence:g}: wanted a probability above 0 and below 1")
        if self.cost_ratio is not None and not (1 < self.cost_ratio < math.inf):
            raise SettingsError(f"cost-ratio {self.cost_ratio:g}: wanted a number above 1: a wrong answer costs more")
        if self.max_error is not None and self.cost_ratio is not None:
            raise SettingsError("max-error and cost-ratio: each sets the threshold of abstention; wanted one of them")

    @property
    def asked(self) -> list[str]:
        """The options that mean nothing without calibration rows, of those that are not as usual."""
        usual = {"sets": "lac", "coverage": DEFAULT_COVERAGE, "max-error": None, "cost-ratio": None}
        return [name for name, value in usual.items() if getattr(self, name.replace("-", "_")) != value]

    def check_task(self, is_classification: bool) -> None:
        """Raise SettingsError where what is asked for is only for classes, and there are none."""
        for option, value in (("max-error", self.max_error), ("cost-ratio", self.cost_ratio)):
            if value is not None and not is_classification:
                raise SettingsError(f"{option}: only for classes: the answer of a regression is not right or wrong")

    def check_choice(self, is_one_choice: bool) -> None:
        """Raise SettingsError where what is asked for is only for one class a row, and every row has several places."""
        for option, value in (("max-error", self.max_error), ("cost-ratio", self.cost_ratio)):
            if value is not None and not is_one_choice:
                raise SettingsError(
                    f"{option}: only for one class a row: this model answers with a class for each place of a row"
                )


AS_USUAL = CalibrationSettings()
