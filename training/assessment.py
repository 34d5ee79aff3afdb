"""How far a published model can be trusted: its deterministic, Monte Carlo and calibrated answers to held-out rows.

held = held_out.read("digits", manifest)
[judged] = assess(Artifact(folder, manifest), held)
judged.figures["mc"]["nll"], judged.intervals["mc"]["nll"]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models import reliability
from models.contract import NO_CLASS, Manifest, ModelOutput, OutputCalibration, Temperature
from training import outliers, regression_assessment, scores
from training.artifact_answers import Alone, Answers, Artifact, has_places
from training.class_outcomes import Outcomes
from training.errors import InputError
from training.held_out import HeldOut
from training.judged import (
    CALIBRATED,
    DETERMINISTIC,
    MC,
    Figures,
    Judged,
    coverage_of,
    coverages,
    groups,
    with_intervals,
)
from training.numbers import Numbers, calibration_of
from training.outlier_scores import outlier_scores
from training.selection import risk_coverage

Array = NDArray[Any]

# Statistics that should be high for rows unlike the data.
STRANGENESS = ("predictive_entropy", "mutual_information", "epistemic_std", "novelty")


class CannotJudge(InputError):
    def __init__(self, name: str, output: ModelOutput) -> None:
        found = f"{name}: output {output.name!r} answers with {output.shape} numbers a row"
        wanted = "a class for each place" if has_places(output) else "all of them"
        super().__init__(f"{found}; wanted an .npz file whose y has {wanted}")


def assess(
    artifact: Artifact, held: HeldOut, named_outliers: Mapping[str, Mapping[str, Array]] | None = None
) -> list[Judged]:
    """Every output, in the manifest's order, and of several numbers a row each one by itself. Raises CannotJudge.

    named_outliers: inputs by the name of their rows, beside those that are made.
    """
    manifest = artifact.manifest
    for output, y in zip(manifest.outputs, held.targets, strict=True):
        if y.ndim != (len(output.shape) if output.task == "classification" else 1 + len(output.shape)):
            raise CannotJudge(manifest.name, output)
    answers = artifact.answers(held.inputs, held.targets)
    strange = {**outliers.made(manifest, held.inputs), **(named_outliers or {})}
    numbers = [given.numbers for given in answers]
    strangers = {kind: artifact.served(inputs, numbers) for kind, inputs in strange.items()}
    members = artifact.members(held.inputs, held.targets)
    outlier_notes = [f"{name}: {_count(inputs):,} outliers" for name, inputs in (named_outliers or {}).items()]
    found = []
    for given, y in zip(answers, held.targets, strict=True):
        known = manifest.calibrated(given.output)
        for one in _one_by_one(_Evidence(given, known, y, members, strangers)):
            judged = _judged(one, held, manifest)
            judged.notes += _of_places(judged, held.rows) + _of_numbers(given.numbers) + outlier_notes
            judged.notes += _warnings(judged)
            found.append(judged)
    return found


@dataclass(frozen=True)
class _Evidence:
    """What an output is judged by."""

    answers: Answers
    calibration: OutputCalibration | None
    y: Array
    # Of an ensemble.
    members: Sequence[Alone]
    # By kind of outlier: what `mc_predict` says of them.
    strangers: Mapping[str, Mapping[str, Array]]


def _one_by_one(output: _Evidence) -> Iterator[_Evidence]:
    """The output, or of several numbers a row each one that is judged, as an output of its own."""
    numbers, prefix = output.answers.numbers, output.answers.output.prefix
    if numbers is None:
        yield output
        return
    y = numbers.chosen(output.y)
    for number, answers in enumerate(output.answers.by_number()):
        yield _Evidence(
            answers,
            calibration_of(output.calibration, number),
            y[:, number],
            [member.number(number) for member in output.members],
            {kind: numbers.served(values, number, prefix) for kind, values in output.strangers.items()},
        )


def _judged(evidence: _Evidence, held: HeldOut, manifest: Manifest) -> Judged:
    answers, y = evidence.answers, evidence.y
    judged = Judged(answers.output, evidence.calibration, answers.places)
    if manifest.calibration is not None:
        judged.default_coverage = manifest.calibration.coverage
    judge = _classification if answers.is_classification else regression_assessment.judge
    judge(judged, answers, y, held)
    judged.members = _members(evidence.members, y, answers.is_classification)
    judged.outliers = _outliers(answers, evidence.strangers)
    return judged


def _warnings(judged: Judged) -> list[str]:
    if judged.calibration is None:
        return ["not calibrated: it was packaged without held-out rows, so no sets and no abstention"]
    return judged.calibration.warnings


def _of_numbers(numbers: Numbers | None) -> list[str]:
    """What must be known where not all numbers of a row are judged."""
    if numbers is None or not numbers.left_out:
        return []
    every = numbers.judged + numbers.left_out
    return [
        f"of the {every:,} numbers of a row the first {numbers.judged} are judged: {numbers.left_out:,} are left out"
    ]


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
    with_intervals(judged, resampled, rows, places=-(-len(y) // rows))
    confidence, right = reliability.named(served, y)
    sets = _set_sizes(judged, every, y)
    columns = {"accuracy": right, "confidence": confidence, "nll": scores.nll(served, y), **sets}
    labels = np.array(answers.output.labels or [str(number) for number in range(served.shape[1])], object)
    judged.by_class = groups(labels[y], columns, list(labels))
    if held.groups is not None:
        judged.by_subgroup = groups(held.groups, columns)
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
    for wanted in coverages(judged):
        inside = every <= np.asarray(known.thresholds(wanted), np.float32)
        holds = inside[np.arange(len(y)), y]
        judged.coverage.append(coverage_of(wanted, holds, float(inside.sum(axis=1).mean())))
        if wanted == judged.default_coverage:
            shown = {"coverage": holds, "set_size": inside.sum(axis=1)}
    return shown


def class_scores(probabilities: Array, kind: str) -> Array:
    """Each class's conformal score [N, K], as `models.contract.ConformalScores` defines it."""
    if kind == "lac":
        return 1 - probabilities
    ordered = -np.sort(-probabilities, axis=1)
    total = np.cumsum(ordered, axis=1, dtype=probabilities.dtype)
    not_less = (probabilities[:, None, :] >= probabilities[:, :, None]).sum(axis=2)
    return np.take_along_axis(total, not_less - 1, axis=1)


def _members(members: Sequence[Alone], y: Array, is_classification: bool) -> dict[str, list[Figures]]:
    if not members:
        return {}
    if is_classification:
        return {
            DETERMINISTIC: [Outcomes(normalised(one.deterministic), y).figures() for one in members],
            MC: [Outcomes(normalised(one.drawn), y).figures() for one in members],
        }
    return regression_assessment.of_members(members, y)


def _count(inputs: Mapping[str, Array]) -> int:
    return len(next(iter(inputs.values())))


def _outliers(answers: Answers, strangers: Mapping[str, Mapping[str, Array]]) -> dict[str, dict[str, Figures]]:
    prefix = answers.output.prefix
    own = {name: values for name, values in answers.served.items() if name in STRANGENESS and values.ndim == 1}
    if answers.places is not None:
        own = {name: values[answers.places.rows_with_class] for name, values in own.items()}
    return {
        kind: {
            name: outlier_scores(own[name], strange[prefix + name])
            for name in STRANGENESS
            # Rows of another length may have other numbers.
            if name in own and prefix + name in strange
        }
        for kind, strange in strangers.items()
    }


def normalised(probabilities: Array) -> Array:
    """float64 [N, ..., K]: a float32 softmax sums to 1 within 1e-7 only."""
    found = probabilities.astype(np.float64)
    return found / found.sum(axis=-1, keepdims=True)


def by_answer(probabilities: Array) -> Array:
    """[N, K] as they are; those of places [N, P, K] one below the other."""
    return probabilities.reshape(-1, probabilities.shape[-1])
