"""What held-out rows say of one output, of classes or of a number, and what both are measured with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray
from scipy.stats import binomtest

from models import reliability
from models.contract import DEFAULT_COVERAGE, ModelOutput, OutputCalibration
from training.artifact_answers import Places
from training.bootstrap import Bounds, intervals
from training.selection import RiskCoverage

Array = NDArray[Any]
Figures = dict[str, float]

# Kinds of answers, in the order in which they are shown.
DETERMINISTIC, MC, CALIBRATED = "deterministic", "mc", "mc_calibrated"
# Of prediction sets and intervals, with the manifest's own among them.
COVERAGES = (0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Coverage:
    """How often a set or an interval of one coverage holds the truth."""

    wanted: float
    found: float
    # Of 95 % by Clopper & Pearson: what the rows allow to say of it.
    lower: float
    upper: float
    # Mean number of classes, or mean width in the target's unit. Infinite where rows were too few to calibrate.
    size: float


@dataclass(frozen=True)
class Group:
    """The rows of one class, or places of rows, or the rows of one value of a column."""

    rows: int
    figures: Figures


@dataclass
class Judged:
    """What held-out rows say of one output."""

    output: ModelOutput
    calibration: OutputCalibration | None
    # Where a row has a class for each of several places: all figures are of places then.
    places: Places | None = None
    # By kind of answer.
    figures: dict[str, Figures] = field(default_factory=dict)
    intervals: dict[str, dict[str, Bounds]] = field(default_factory=dict)
    # Of the last kind minus the deterministic one, on the same resamples.
    differences: dict[str, tuple[float, Bounds]] = field(default_factory=dict)
    # Of an ensemble: each member's own, by kind of answer.
    members: dict[str, list[Figures]] = field(default_factory=dict)
    risk: dict[str, RiskCoverage] = field(default_factory=dict)
    # Classification: of the class that is named.
    curves: dict[str, reliability.ReliabilityCurve] = field(default_factory=dict)
    # Regression: [N] of each kind that is a distribution.
    pit: dict[str, Array] = field(default_factory=dict)
    coverage: list[Coverage] = field(default_factory=list)
    by_class: dict[str, Group] = field(default_factory=dict)
    by_subgroup: dict[str, Group] = field(default_factory=dict)
    # Of sets and intervals where a request names none.
    default_coverage: float = DEFAULT_COVERAGE
    # Of answers that are given at the packaged threshold.
    abstention: Figures = field(default_factory=dict)
    # By kind of outlier, then by the score that should tell them.
    outliers: dict[str, dict[str, Figures]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def unit(self) -> str:
        """What is judged, one by one."""
        return "rows" if self.places is None else "places"

    @property
    def best_kind(self) -> str:
        """The kind that is served."""
        return list(self.figures)[-1]


def coverages(judged: Judged) -> list[float]:
    """Those that are judged, the packaged one among them."""
    return sorted({*COVERAGES, judged.default_coverage})


def with_intervals(
    judged: Judged, kinds: Mapping[str, Callable[[Array], Figures]], rows: int, *, places: int = 1
) -> None:
    """Fills in bootstrap intervals of each kind, and of the last one's differences to the first, on the same rows.

    kinds: each one's figures of so many rows, by their numbers.
    """
    first, last = next(iter(kinds)), list(kinds)[-1]

    def figures(chosen: Array) -> Figures:
        found = {f"{kind}/{name}": value for kind, of in kinds.items() for name, value in of(chosen).items()}
        both = {name for name in judged.figures[first] if f"{last}/{name}" in found and f"{first}/{name}" in found}
        return found | {f"/{name}": found[f"{last}/{name}"] - found[f"{first}/{name}"] for name in sorted(both)}

    for key, bounds in intervals(figures, rows, places=places).items():
        kind, _, name = key.partition("/")
        if kind:
            judged.intervals.setdefault(kind, {})[name] = bounds
        else:
            judged.differences[name] = (judged.figures[last][name] - judged.figures[first][name], bounds)


def groups(values: Array, columns: Mapping[str, Array], order: list[str] | None = None) -> dict[str, Group]:
    """The means of columns [N] over the rows of each value."""
    found = {}
    for value in order if order is not None else sorted(set(values.tolist())):
        chosen = values == value
        if chosen.any():
            found[str(value)] = Group(
                int(chosen.sum()), {name: float(column[chosen].mean()) for name, column in columns.items()}
            )
    return found


def coverage_of(wanted: float, holds: Array, size: float) -> Coverage:
    allowed = binomtest(int(holds.sum()), len(holds)).proportion_ci(0.95, method="exact")
    return Coverage(wanted, float(holds.mean()), float(allowed.low), float(allowed.high), size)
