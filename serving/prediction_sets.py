"""Prediction sets and intervals of any coverage, and abstention, from the scores that the manifest keeps.

Split conformal prediction: `models.contract.ConformalScores` says what the scores are and which of them is the
threshold of a coverage. The signatures carry the sets of the artifact's own coverage; those of another one are made
here, by the same arithmetic in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from models.contract import (
    ABSTAIN,
    DEFAULT_COVERAGE,
    INTERVAL_LOWER,
    INTERVAL_UPPER,
    PREDICTION_SET,
    Abstention,
    ConformalScores,
    Manifest,
    ModelOutput,
    SignatureTensor,
)

Arrays = Mapping[str, np.ndarray]

NO_SCORES = "this model has no calibration scores to promise it by"

# Coverages whose thresholds are kept for each model: people ask for a few; who asks for many gets them made anew.
KEPT_COVERAGES = 64


class PredictionSets:
    """What one model's calibration rows guarantee."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._own = DEFAULT_COVERAGE if manifest.calibration is None else manifest.calibration.coverage
        self._kept: dict[float, Coverage] = {}

    def at(self, coverage: float | None = None) -> Coverage:
        """The sets and intervals of a coverage, of the artifact's own one without.

        Of a model without scores there are none: where a coverage is asked for, the warnings say so.
        """
        value = self._own if coverage is None else coverage
        found = self._kept.get(value)
        if found is None:
            found = self._make(value)
            if len(self._kept) >= KEPT_COVERAGES:
                self._kept.clear()
            self._kept[value] = found
        if coverage is not None and not found.outputs:
            return replace(found, warnings=(f"coverage {coverage:g}: {NO_SCORES}",))
        return found

    def _make(self, value: float) -> Coverage:
        outputs = []
        decisions = []
        for output in self._manifest.outputs:
            calibrated = self._manifest.calibrated(output)
            if calibrated is None:
                continue
            if calibrated.conformal is not None:
                outputs.append(Reach(output, calibrated.conformal, value))
            if calibrated.abstention is not None:
                decisions.append((output, calibrated.abstention))
        several = len(self._manifest.outputs) > 1
        warnings = [f"{reach.output.name}: {text}" if several else text for reach in outputs for text in reach.warnings]
        return Coverage(value, value == self._own, tuple(outputs), tuple(decisions), tuple(warnings))


class Reach:
    """One output's scores at one coverage."""

    def __init__(self, output: ModelOutput, scores: ConformalScores, coverage: float) -> None:
        self.output = output
        self.scores = scores
        self.thresholds = np.array(scores.thresholds(coverage), np.float32)
        self.warnings = self._warnings(coverage)

    def apply(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """The output's set or interval, by tensor."""
        prefix = self.output.prefix
        if self.scores.kind == "interval":
            std = arrays[f"{prefix}std" if f"{prefix}std" in arrays else f"{prefix}epistemic_std"]
            lower, upper = interval(arrays[f"{prefix}mean"], std, self.thresholds)
            return {f"{prefix}{INTERVAL_LOWER}": lower, f"{prefix}{INTERVAL_UPPER}": upper}
        probabilities = arrays[f"{prefix}probabilities"]
        return {f"{prefix}{PREDICTION_SET}": prediction_set(self.scores.kind, probabilities, self.thresholds)}

    def _warnings(self, coverage: float) -> list[str]:
        """What is guaranteed for want of rows, and says nothing."""
        wanted = self.scores.rows_wanted(coverage)
        labels = self.output.labels or [str(index) for index in range(len(self.thresholds))]
        found: list[str] = []
        for index, (scores, threshold) in enumerate(zip(self.scores.scores, self.thresholds.tolist(), strict=True)):
            if math.isinf(threshold):
                if self.scores.kind == "interval" and found:
                    # The numbers of a row have as many calibration rows.
                    break
                rows = f"{wanted} calibration rows wanted, there are {len(scores)}"
                if self.scores.by_class:
                    rows = f"{wanted} calibration rows of {labels[index]!r} wanted, there are {len(scores)}"
                follows = {True: f"{labels[index]!r} is in every set", False: "every set is the full one"}
                result = "intervals have no ends" if self.scores.kind == "interval" else follows[self.scores.by_class]
                found.append(f"coverage {coverage:g}: {rows}; {result}")
        return found


@dataclass(frozen=True)
class Coverage:
    """Sets and intervals of one model at one coverage; nothing where it is not calibrated."""

    value: float
    is_own: bool
    """Whether it is the coverage of the signatures' own sets."""
    outputs: tuple[Reach, ...]
    decisions: tuple[tuple[ModelOutput, Abstention], ...]
    warnings: tuple[str, ...]

    @property
    def tensors(self) -> list[SignatureTensor]:
        """What `apply` sees to."""
        found = []
        for reach in self.outputs:
            prefix, shape = reach.output.prefix, [None, *reach.output.shape]
            if reach.scores.kind == "interval":
                ends = (INTERVAL_LOWER, INTERVAL_UPPER)
                found += [SignatureTensor(name=f"{prefix}{name}", dtype="float32", shape=shape) for name in ends]
            else:
                found.append(SignatureTensor(name=f"{prefix}{PREDICTION_SET}", dtype="bool", shape=shape))
        for output, _ in self.decisions:
            found.append(SignatureTensor(name=f"{output.prefix}{ABSTAIN}", dtype="bool", shape=[None]))
        return found

    def apply(self, arrays: Arrays) -> Arrays:
        """The outputs of draws, with sets, intervals and abstention as the coverage wants them.

        What the signatures carry already, and is right, stays as it is.
        """
        made: dict[str, np.ndarray] = {}
        for reach in self.outputs:
            name = PREDICTION_SET if reach.scores.kind != "interval" else INTERVAL_LOWER
            if not (self.is_own and f"{reach.output.prefix}{name}" in arrays):
                made |= reach.apply(arrays)
        for output, abstention in self.decisions:
            name = f"{output.prefix}{ABSTAIN}"
            if name not in arrays:
                made[name] = withheld(output, abstention, arrays)
        return {**arrays, **made} if made else arrays


def prediction_set(kind: Literal["lac", "aps"], probabilities: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Which classes are in the set: those whose own score is at most the threshold.

    probabilities: float32 [N, K]; thresholds: float32 [1], or [K] for one a class. Returns bool [N, K].
    """
    scores = 1 - probabilities if kind == "lac" else cumulative(probabilities)
    return scores <= thresholds


def cumulative(probabilities: np.ndarray) -> np.ndarray:
    """[N, K] for each class the sum of the probabilities of all that are at least as probable, itself among them.

    Source: Romano, Sesia & Candes 2020, eq. 5 without randomisation.
    """
    order = np.argsort(-probabilities, axis=-1, kind="stable")
    descending = np.take_along_axis(probabilities, order, axis=-1)
    sums = np.cumsum(descending, axis=-1)
    # Equal probabilities share the sum of the last of them.
    ends = np.ones(sums.shape, bool)
    ends[:, :-1] = descending[:, 1:] < descending[:, :-1]
    shared = np.minimum.accumulate(np.where(ends, sums, np.inf)[:, ::-1], axis=-1)[:, ::-1]
    scores = np.empty_like(sums)
    np.put_along_axis(scores, order, shared.astype(sums.dtype), axis=-1)
    return scores


def interval(mean: np.ndarray, std: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of the interval around the mean, in the target's unit; without ends they are infinite.

    mean, std: float32 [N] with thresholds [1], or [N, D] with [D].
    """
    endless = np.isinf(thresholds)
    # Where there is no deviation, too.
    reach = thresholds * np.where(endless, np.float32(1), std)
    return mean - reach, mean + reach


def needed(abstention: Abstention) -> str:
    """The tensor whose values decide."""
    return "probabilities" if abstention.statistic == "confidence" else "std"


def withheld(output: ModelOutput, abstention: Abstention, arrays: Arrays) -> np.ndarray:
    """[N] whether an answer is withheld; the signatures' own word where they have one."""
    own = arrays.get(f"{output.prefix}{ABSTAIN}")
    if own is not None:
        return own
    threshold = np.float32(abstention.threshold)
    values = arrays[f"{output.prefix}{needed(abstention)}"]
    return np.asarray(values.max(axis=-1) < threshold if abstention.statistic == "confidence" else values > threshold)
