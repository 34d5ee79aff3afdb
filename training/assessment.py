"""How far a published model can be trusted: its deterministic, Monte Carlo and calibrated answers to held-out rows.

held = held_out.read("digits", manifest)
[judged] = assess(Artifact(folder, manifest), held)
judged.figures["mc"]["nll"], judged.intervals["mc"]["nll"]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from models import reliability
from models.contract import DEFAULT_COVERAGE, NO_CLASS, ModelOutput, OutputCalibration, Temperature
from training import outliers, predictive, scores
from training.artifact_answers import Alone, Answers, Artifact, Places, has_places
from training.bootstrap import Bounds, intervals
from training.class_outcomes import Outcomes
from training.errors import InputError
from training.held_out import HeldOut
from training.outlier_scores import outlier_scores
from training.selection import RiskCoverage, risk_coverage

Array = NDArray[Any]
Figures = dict[str, float]

# Kinds of answers, in the order in which they are shown.
DETERMINISTIC, MC, CALIBRATED = "deterministic", "mc", "mc_calibrated"
# Of prediction sets and intervals, with the manifest's own among them.
COVERAGES = (0.8, 0.9, 0.95)
# Statistics that should be high for rows unlike the data.
STRANGENESS = ("predictive_entropy", "mutual_information", "epistemic_std", "novelty")


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


class CannotJudge(InputError):
    def __init__(self, name: str, output: ModelOutput) -> None:
        found = f"{name}: output {output.name!r} answers with {output.shape} numbers a row"
        wanted = "an .npz file whose y has a class for each place" if has_places(output) else "one class or one number"
        super().__init__(f"{found}; wanted {wanted}")


def assess(
    artifact: Artifact, held: HeldOut, named_outliers: Mapping[str, Mapping[str, Array]] | None = None
) -> list[Judged]:
    """Every output, in the manifest's order. Raises CannotJudge.

    named_outliers: inputs by the name of their rows, beside those that are made.
    """
    manifest = artifact.manifest
    for output, y in zip(manifest.outputs, held.targets, strict=True):
        if y.ndim != max(len(output.shape), 1) or (output.task == "regression" and output.shape):
            raise CannotJudge(manifest.name, output)
    answers = artifact.answers(held.inputs, held.targets)
    strange = {**outliers.made(manifest, held.inputs), **(named_outliers or {})}
    strangers = {kind: artifact.served(inputs) for kind, inputs in strange.items()}
    found = []
    members = artifact.members(held.inputs)
    for given, y in zip(answers, held.targets, strict=True):
        judged = Judged(given.output, manifest.calibrated(given.output), given.places)
        if manifest.calibration is not None:
            judged.default_coverage = manifest.calibration.coverage
        judge = _classification if given.is_classification else _regression
        judge(judged, given, y, held)
        judged.members = _members(members, y, given.is_classification)
        judged.outliers = _outliers(given, strangers)
        judged.notes += _of_places(judged, held.rows)
        judged.notes += [f"{name}: {_count(inputs):,} outliers" for name, inputs in (named_outliers or {}).items()]
        judged.notes += judged.calibration.warnings if judged.calibration is not None else []
        if judged.calibration is None:
            judged.notes.append("not calibrated: it was packaged without held-out rows, so no sets and no abstention")
        found.append(judged)
    return found


def _of_places(judged: Judged, rows: int) -> list[str]:
    """What must be known of figures of places."""
    if judged.places is None:
        return []
    count, every = len(judged.places.judged), int(np.prod(judged.places.shape, dtype=int))
    which = f"{every:,} of each row" if count == every else f"{count:,} of {every:,} of each row, at random"
    found, left_out = f"figures are of places: {which}, {rows * count:,} in all", judged.places.left_out
    if left_out:
        found += f", of which {left_out:,} have no class (y is {NO_CLASS}) and are left out"
    said = [f"{found}; intervals are of other rows, not other places, as the places of a row depend on each other"]
    if left_out and judged.outliers:
        said.append("of rows unlike these all places count: nobody says which of them were padded")
    return said


def _classification(judged: Judged, answers: Answers, y: Array, held: HeldOut) -> None:
    kinds = {DETERMINISTIC: normalised(answers.deterministic)}
    served = normalised(answers.served["probabilities"])
    if answers.uncalibrated is None:
        kinds[MC] = served
    else:
        kinds |= {MC: normalised(answers.uncalibrated), CALIBRATED: served}
    if answers.places is not None:
        y = answers.places.chosen(y)
    has_class = y != NO_CLASS
    # No resample can be made of rows without any.
    some = has_class.reshape(len(y), -1).any(axis=1)
    rows = int(some.sum())
    resampled = {kind: Outcomes(values[some], y[some]).figures for kind, values in kinds.items()}
    every = by_answer(answers.served["probabilities"])[has_class.ravel()]
    kinds = {kind: by_answer(values)[has_class.ravel()] for kind, values in kinds.items()}
    served, y = by_answer(served)[has_class.ravel()], y[has_class]
    for kind, probabilities in kinds.items():
        confidence, right = reliability.named(probabilities, y)
        judged.risk[kind] = risk_coverage(1 - confidence, ~right)
        judged.curves[kind] = reliability.top_label_curve(probabilities, y)
        judged.figures[kind] = {
            **resampled[kind](),
            **reliability.brier_parts(probabilities, y),
            "sharpness": reliability.mean_entropy(probabilities),
        }
    _with_intervals(judged, resampled, rows, places=-(-len(y) // rows))
    confidence, right = reliability.named(served, y)
    sets = _set_sizes(judged, every, y)
    columns = {"accuracy": right, "confidence": confidence, "nll": scores.nll(served, y), **sets}
    labels = np.array(answers.output.labels or [str(number) for number in range(served.shape[1])], object)
    judged.by_class = _groups(labels[y], columns, list(labels))
    if held.groups is not None:
        judged.by_subgroup = _groups(held.groups, columns)
    known = judged.calibration.abstention if judged.calibration is not None else None
    if known is not None:
        given = confidence >= known.threshold
        judged.abstention = {"answered_share": float(given.mean())}
        judged.abstention |= {"error": float((~right[given]).mean())} if given.any() else {}
    fit = judged.calibration.fit if judged.calibration is not None else None
    if isinstance(fit, Temperature) and fit.value != 1:
        judged.notes.append(f"mc_calibrated is what is served: every draw at the temperature {fit.value:.3g}")


def _set_sizes(judged: Judged, probabilities: Array, y: Array) -> dict[str, Array]:
    """Fills in the coverage of prediction sets; returns for the default coverage whether each row's set holds the
    truth, and its size, [N].
    """
    known = judged.calibration.conformal if judged.calibration is not None else None
    if known is None:
        return {}
    # float32, as in the graph.
    every = class_scores(probabilities, known.kind)
    shown: dict[str, Array] = {}
    for wanted in _coverages(judged):
        inside = every <= np.asarray(known.thresholds(wanted), np.float32)
        holds = inside[np.arange(len(y)), y]
        judged.coverage.append(_coverage(wanted, holds, float(inside.sum(axis=1).mean())))
        if wanted == judged.default_coverage:
            shown = {"coverage": holds, "set_size": inside.sum(axis=1)}
    return shown


def _coverages(judged: Judged) -> list[float]:
    return sorted({*COVERAGES, judged.default_coverage})


def class_scores(probabilities: Array, kind: str) -> Array:
    """Each class's conformal score [N, K], as `models.contract.ConformalScores` defines it."""
    if kind == "lac":
        return 1 - probabilities
    ordered = -np.sort(-probabilities, axis=1)
    total = np.cumsum(ordered, axis=1, dtype=probabilities.dtype)
    not_less = (probabilities[:, None, :] >= probabilities[:, :, None]).sum(axis=2)
    return np.take_along_axis(total, not_less - 1, axis=1)


def _regression(judged: Judged, answers: Answers, y: Array, held: HeldOut) -> None:
    assert answers.draws is not None
    draws = answers.draws.astype(np.float64)
    served = {name: values.astype(np.float64) for name, values in answers.served.items() if values.dtype.kind == "f"}
    mean, epistemic = served["mean"], served["epistemic_std"]
    deterministic = answers.deterministic.astype(np.float64)
    rows: dict[str, dict[str, Array]] = {
        DETERMINISTIC: {"square": np.square(deterministic - y), "crps": np.abs(deterministic - y)},
        MC: {"square": np.square(mean - y), "crps": predictive.draws_crps(draws, y)},
    }
    judged.pit[MC] = predictive.draws_pit(draws, y)
    stds = {MC: epistemic}
    if "aleatoric_std" in served:
        nll, crps = scores.mixture(draws, served["aleatoric_std"], y)
        rows[CALIBRATED] = {"square": rows[MC]["square"], "crps": crps, "nll": nll}
        judged.pit[CALIBRATED] = predictive.mixture_pit(draws, served["aleatoric_std"], y)
        stds[CALIBRATED] = served["std"]
        judged.notes.append("mc_calibrated is what is served: the draws with the target's own noise")
    else:
        judged.notes.append("the target's own noise is not known: the draws say how sure the model is of its mean only")
    for kind, columns in rows.items():
        figures = value_figures(columns)
        if kind in judged.pit:
            figures["pit_distance"] = predictive.pit_distance(judged.pit[kind])
            figures["sharpness"] = predictive.sharpness(stds[kind])
            judged.risk[kind] = risk_coverage(stds[kind], columns["square"])
            figures["aurc"] = judged.risk[kind].area
        judged.figures[kind] = figures
    resampled = {kind: partial(value_figures, columns) for kind, columns in rows.items()}
    _with_intervals(judged, resampled, len(y))
    width = _intervals(judged, served, y)
    shown = {"square": rows[judged.best_kind]["square"], "std": stds[judged.best_kind], **width}
    if held.groups is not None:
        judged.by_subgroup = {
            name: Group(group.rows, {"rmse": float(np.sqrt(group.figures.pop("square"))), **group.figures})
            for name, group in _groups(held.groups, shown).items()
        }
    known = judged.calibration.abstention if judged.calibration is not None else None
    if known is not None:
        given = stds[judged.best_kind] <= known.threshold
        judged.abstention = {"answered_share": float(given.mean())}
        judged.abstention |= {"rmse": float(np.sqrt(shown["square"][given].mean()))} if given.any() else {}


def value_figures(columns: Mapping[str, Array], rows: Array | None = None) -> Figures:
    """Of rows: squared errors, CRPS and, where there is a density, negative log-likelihoods.

    rows: numbers of rows, some of them more than once; None for every row once.
    """
    if rows is not None:
        columns = {name: values[rows] for name, values in columns.items()}
    found = {"rmse": float(np.sqrt(columns["square"].mean())), "crps": float(columns["crps"].mean())}
    return found | ({"nll": float(columns["nll"].mean())} if "nll" in columns else {})


def _intervals(judged: Judged, served: Mapping[str, Array], y: Array) -> dict[str, Array]:
    """Fills in the coverage of intervals; returns for the default coverage whether each row's holds the truth, [N]."""
    known = judged.calibration.conformal if judged.calibration is not None else None
    if known is None:
        return {}
    std = served.get("std", served["epistemic_std"])
    off = np.abs(y - served["mean"]) / std
    shown: dict[str, Array] = {}
    for wanted in _coverages(judged):
        [threshold] = known.thresholds(wanted)
        holds = off <= threshold
        judged.coverage.append(_coverage(wanted, holds, float((2 * threshold * std).mean())))
        if wanted == judged.default_coverage:
            shown = {"coverage": holds, "width": 2 * threshold * std}
    return shown


def _with_intervals(
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


def _groups(values: Array, columns: Mapping[str, Array], order: list[str] | None = None) -> dict[str, Group]:
    """The means of columns [N] over the rows of each value."""
    found = {}
    for value in order if order is not None else sorted(set(values.tolist())):
        chosen = values == value
        if chosen.any():
            found[str(value)] = Group(
                int(chosen.sum()), {name: float(column[chosen].mean()) for name, column in columns.items()}
            )
    return found


def _coverage(wanted: float, holds: Array, size: float) -> Coverage:
    allowed = binomtest(int(holds.sum()), len(holds)).proportion_ci(0.95, method="exact")
    return Coverage(wanted, float(holds.mean()), float(allowed.low), float(allowed.high), size)


def _members(members: list[Alone], y: Array, is_classification: bool) -> dict[str, list[Figures]]:
    if not members:
        return {}
    if is_classification:
        return {
            DETERMINISTIC: [Outcomes(normalised(one.deterministic), y).figures() for one in members],
            MC: [Outcomes(normalised(one.drawn), y).figures() for one in members],
        }
    points = [one.deterministic.astype(np.float64) - y for one in members]
    draws = [one.drawn.astype(np.float64) for one in members]
    return {
        DETERMINISTIC: [value_figures({"square": np.square(off), "crps": np.abs(off)}) for off in points],
        MC: [
            value_figures({"square": np.square(own.mean(axis=0) - y), "crps": predictive.draws_crps(own, y)})
            for own in draws
        ],
    }


def _count(inputs: Mapping[str, Array]) -> int:
    return len(next(iter(inputs.values())))


def _outliers(answers: Answers, strangers: Mapping[str, Mapping[str, Array]]) -> dict[str, dict[str, Figures]]:
    prefix = answers.output.prefix
    own = {name: values for name, values in answers.served.items() if name in STRANGENESS and values.ndim == 1}
    if answers.places is not None:
        own = {name: values[answers.places.rows_with_class] for name, values in own.items()}
    return {
        kind: {name: outlier_scores(own[name], strange[prefix + name]) for name in STRANGENESS if name in own}
        for kind, strange in strangers.items()
    }


def normalised(probabilities: Array) -> Array:
    """float64 [N, ..., K]: a float32 softmax sums to 1 within 1e-7 only."""
    found = probabilities.astype(np.float64)
    return found / found.sum(axis=-1, keepdims=True)


def by_answer(probabilities: Array) -> Array:
    """[N, K] as they are; those of places [N, P, K] one below the other."""
    return probabilities.reshape(-1, probabilities.shape[-1])
