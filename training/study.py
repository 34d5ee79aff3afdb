"""Does dropout help on this problem? A net without it, with it here or there, and at a tuned level, on the same folds.

Every network of a fold has the same initial weights and shuffles, so that a difference is dropout's own. The tuned
level is chosen anew in every fold, by a cross-validation within its training rows: no test row has a say in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from models.contract import Task, counted
from models.reliability import expected_calibration_error
from training import scores
from training.collapse import is_constant
from training.datasets import Dataset
from training.errors import InputError
from training.folds import Index, Job, OnProgress, Outcome, fit_and_keep, fit_jobs, inner_folds, repeated_folds
from training.paired import Interval, corrected_interval
from training.recipes import Recipe, changed

Mode = Literal["deterministic", "monte_carlo"]
MODES: tuple[Mode, ...] = ("deterministic", "monte_carlo")

BASELINE, TUNED = "baseline", "tuned"
# Where the recipe of the data has no dropout of its own.
DEFAULT_VISIBLE, DEFAULT_HIDDEN = 0.1, 0.2
# Highest hidden rate that is tried: the half of Srivastava et al. 2014.
MAX_HIDDEN = 0.5
# Two inner folds and seven levels are fourteen fits a fold: what fits into two minutes for Sonar.
INNER_FOLDS = 2
# Differences below this are arithmetic's.
ROUNDING = 1e-6
# A variance of the noise is never taken as less than this share of the squared errors.
LEAST_NOISE = 0.01


class TooFewRows(InputError):
    def __init__(self, data: Dataset, folds: int, found: str) -> None:
        super().__init__(f"{data.name}: {found}; wanted enough rows for {folds} folds, and {INNER_FOLDS} within each")


@dataclass(frozen=True)
class Comparison:
    """A variant against the deterministic baseline, on the same folds: its figure minus the baseline's."""

    variant: str
    mode: Mode
    metric: str
    difference: Interval

    @property
    def verdict(self) -> str:
        if not self.difference.excludes_zero:
            return "no difference shown"
        return "better" if (self.difference.mean > 0) == (self.metric == "accuracy") else "worse"


@dataclass(frozen=True)
class Study:
    """What was found."""

    data: Dataset
    folds: int
    repeats: int
    num_samples: int
    seed: int
    # The fixed variants.
    recipes: dict[str, Recipe]
    # What the tuned level was chosen from, and how many folds chose each: (visible, hidden) -> folds.
    chosen: dict[tuple[float, float], int]
    # variant -> mode -> metric -> one figure a fold, [folds * repeats], repeat after repeat.
    figures: dict[str, dict[Mode, dict[str, NDArray[np.float64]]]]
    # variant -> mode -> mean over the repeats of the error of all rows' answers together; classification only.
    calibration_error: dict[str, dict[Mode, float]]
    # variant -> epochs, mean loss of the training rows and of the held-out ones, dropout off.
    curves: dict[str, tuple[list[int], NDArray[np.float64], NDArray[np.float64]]]

    @property
    def test_share(self) -> float:
        """Test rows by training rows."""
        return 1 / (self.folds - 1)

    def interval(self, variant: str, mode: Mode, metric: str) -> Interval:
        return corrected_interval(self.figures[variant][mode][metric], self.test_share)

    def comparisons(self) -> list[Comparison]:
        """Everything against the baseline with dropout off; the baseline itself has nothing to draw."""
        base = self.figures[BASELINE]["deterministic"]
        return [
            Comparison(variant, mode, metric, corrected_interval(_difference(values, base[metric]), self.test_share))
            for variant, modes in self.figures.items()
            if variant != BASELINE
            for mode, metrics in modes.items()
            for metric, values in metrics.items()
        ]


def _difference(values: NDArray[np.float64], base: NDArray[np.float64]) -> NDArray[np.float64]:
    """Without what float32 makes of the same answer computed as one and as a mean of equal draws."""
    difference = values - base
    return np.where(np.abs(difference) < ROUNDING, 0.0, difference)


def variants(base: Recipe) -> dict[str, Recipe]:
    """The recipe without dropout, with it on the visible layer, on the hidden layers, and on both."""
    visible, hidden = base.visible_dropout or DEFAULT_VISIBLE, base.hidden_dropout or DEFAULT_HIDDEN
    return {
        BASELINE: changed(base, visible_dropout=0.0, hidden_dropout=0.0),
        "visible": changed(base, visible_dropout=visible, hidden_dropout=0.0),
        "hidden": changed(base, visible_dropout=0.0, hidden_dropout=hidden),
        "both": changed(base, visible_dropout=visible, hidden_dropout=hidden),
    }


def levels(fixed: dict[str, Recipe]) -> list[Recipe]:
    """What the tuned level is chosen from: the fixed variants, gentler ones and stronger ones. No two are the same."""
    both = fixed["both"]
    visible, hidden = both.visible_dropout, both.hidden_dropout
    # Not more: at twice Sonar's hidden rate its narrow layers end at a constant answer.
    strong = min(1.5 * hidden, MAX_HIDDEN)
    others = [(visible / 2, hidden / 2), (visible / 2, strong), (visible, strong)]
    more = [replace(both, visible_dropout=v, hidden_dropout=h) for v, h in others]
    return list(dict.fromkeys([*fixed.values(), *more]))


def study(
    data: Dataset,
    base: Recipe,
    *,
    folds: int = 10,
    repeats: int = 10,
    num_samples: int = 50,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Study:
    """Carry it out. Raises TooFewRows, ConstantTarget. on_progress: called with the share that is done."""
    check_rows(data, folds)
    progress = on_progress if on_progress is not None else lambda share: None
    fixed = variants(base)
    candidates = levels(fixed)
    splits = repeated_folds(data.y, data.task, folds=folds, repeats=repeats, seed=seed)
    # Fits of the inner folds, which have half the rows, and of the outer ones.
    inner_work, outer_work = len(candidates) * INNER_FOLDS / 2, len(fixed) + 1.0
    total = inner_work + outer_work

    inner, choice = choose(data, splits, candidates, num_samples, seed, lambda s: progress(s * inner_work / total))
    wanted = [list(dict.fromkeys([*fixed.values(), candidates[best]])) for best in choice]
    jobs = [
        Job(recipe, train, test, seed=seed + number)
        for number, (train, test) in enumerate(splits)
        for recipe in wanted[number]
    ]
    fitted = iter(
        fit_jobs(
            data,
            jobs,
            num_samples=num_samples,
            curves=True,
            on_progress=lambda s: progress((inner_work + s * outer_work) / total),
        )
    )
    outcomes = [{recipe: next(fitted) for recipe in recipes} for recipes in wanted]

    chosen = {(one.visible_dropout, one.hidden_dropout): 0 for one in candidates}
    for best in choice:
        chosen[candidates[best].visible_dropout, candidates[best].hidden_dropout] += 1
    named = {
        **{name: [by[recipe] for by in outcomes] for name, recipe in fixed.items()},
        TUNED: [by[candidates[best]] for by, best in zip(outcomes, choice, strict=True)],
    }
    noises = {
        **{name: [of[recipe] for of in inner] for name, recipe in fixed.items()},
        TUNED: [of[candidates[best]] for of, best in zip(inner, choice, strict=True)],
    }
    return Study(
        data,
        folds,
        repeats,
        num_samples,
        seed,
        fixed,
        chosen,
        figures={name: _figures(data, splits, own, noises[name], name) for name, own in named.items()},
        calibration_error={name: _calibration(data, splits, own, repeats, name) for name, own in named.items()},
        curves={name: _curves(own) for name, own in named.items()},
    )


def check_rows(data: Dataset, folds: int) -> None:
    """Raise TooFewRows where a fold, or a fold within one, would lack a class."""
    if data.task == "classification":
        counts = np.bincount(data.y, minlength=len(data.labels))
        rarest = int(counts.argmin())
        if counts[rarest] < max(folds, 2 * INNER_FOLDS):
            raise TooFewRows(data, folds, f"{counted(int(counts[rarest]), 'row')} of class {data.labels[rarest]!r}")
    elif len(data.y) < 10 * max(folds, 2 * INNER_FOLDS):
        raise TooFewRows(data, folds, counted(len(data.y), "row"))


# Mean squared errors of the inner folds, dropout off and of the mean of the draws, and the draws' mean variance.
Noise = dict[Mode, float]


def choose(
    data: Dataset,
    splits: list[tuple[Index, Index]],
    candidates: list[Recipe],
    num_samples: int,
    seed: int,
    on_progress: OnProgress,
) -> tuple[list[dict[Recipe, Noise]], list[int]]:
    """For each split, what the inner folds say of every candidate's noise, and which one has the smallest loss there.

    The loss is the negative log-likelihood of the mean of the draws, or its squared error. A candidate with a net that
    answers the same to every row is chosen only where the others have as many: the loss alone prefers such a net to one
    that is sure of its errors.
    """
    within = [
        inner_folds(data.y, data.task, train, folds=INNER_FOLDS, seed=seed + number)
        for number, (train, _) in enumerate(splits)
    ]
    jobs = [
        Job(recipe, fit, held, seed=seed + number)
        for number, parts in enumerate(within)
        for fit, held in parts
        for recipe in candidates
    ]
    judged = fit_and_keep(
        data, jobs, lambda job, outcome: _inner(data, job, outcome), num_samples=num_samples, on_progress=on_progress
    )
    shape = len(splits), INNER_FOLDS, len(candidates)
    losses = np.array([one.loss for one in judged]).reshape(shape)
    dead = np.array([one.is_dead for one in judged]).reshape(shape)
    noises: list[dict[Recipe, Noise]] = []
    for number in range(len(splits)):
        first = number * INNER_FOLDS * len(candidates)
        noises.append(
            {
                recipe: _noise([judged[first + part * len(candidates) + place] for part in range(INNER_FOLDS)])
                for place, recipe in enumerate(candidates)
            }
        )
    return noises, np.lexsort((losses.mean(axis=1), dead.sum(axis=1)))[:, 0].tolist()


@dataclass(frozen=True)
class _Inner:
    """What is kept of a network of an inner fold: its draws would be most of a study's memory."""

    loss: float
    # Whether it answers the same to every row.
    is_dead: bool
    # Of a regression.
    squares: dict[Mode, float]


def _inner(data: Dataset, job: Job, outcome: Outcome) -> _Inner:
    is_dead = is_constant(outcome.answer, data, job.held_out)
    return _Inner(_loss(data, job, outcome), is_dead, _squares(data, job, outcome))


def _loss(data: Dataset, job: Job, outcome: Outcome) -> float:
    y, answer = data.y[job.held_out], outcome.monte_carlo
    assert answer is not None
    if data.task == "regression":
        return float(np.mean(np.square(answer.mean(axis=0) - y)))
    return scores.classification(answer, y)["nll"]


def _squares(data: Dataset, job: Job, outcome: Outcome) -> dict[Mode, float]:
    """Variances of a regression's noise: from errors on rows that the network did not see.

    For the mixture around the draws their own variance is taken off: the two add up to the squared error.
    """
    if data.task == "classification":
        return {}
    y, draws = data.y[job.held_out], outcome.monte_carlo
    assert draws is not None
    error = float(np.mean(np.square(y - draws.mean(axis=0))))
    return {
        "deterministic": float(np.mean(np.square(y - outcome.answer))),
        "monte_carlo": max(error - float(draws.var(axis=0).mean()), LEAST_NOISE * error),
    }


def _noise(parts: list[_Inner]) -> Noise:
    """Standard deviations of the noise over the inner folds."""
    return {mode: float(np.sqrt(np.mean([part.squares[mode] for part in parts]))) for mode in parts[0].squares}


def _modes(name: str) -> tuple[Mode, ...]:
    return ("deterministic",) if name == BASELINE else MODES


def _figures(
    data: Dataset, splits: list[tuple[Index, Index]], outcomes: list[Outcome], noises: list[Noise], name: str
) -> dict[Mode, dict[str, NDArray[np.float64]]]:
    figures: dict[Mode, dict[str, NDArray[np.float64]]] = {}
    for mode in _modes(name):
        folds = [
            _score(data, outcome, data.y[test], noise, mode)
            for outcome, noise, (_, test) in zip(outcomes, noises, splits, strict=True)
        ]
        figures[mode] = {metric: np.array([fold[metric] for fold in folds]) for metric in folds[0]}
    return figures


def _score(data: Dataset, outcome: Outcome, y: NDArray[Any], noise: Noise, mode: Mode) -> dict[str, float]:
    answer = _answer(outcome, mode)
    if data.task == "classification":
        return scores.classification(answer, y)
    return scores.regression(answer if answer.ndim == 2 else answer[None], noise[mode], y.astype(np.float64))


def _answer(outcome: Outcome, mode: Mode) -> NDArray[np.float64]:
    answer = outcome.answer if mode == "deterministic" else outcome.monte_carlo
    assert answer is not None
    return answer


def _calibration(
    data: Dataset, splits: list[tuple[Index, Index]], outcomes: list[Outcome], repeats: int, name: str
) -> dict[Mode, float]:
    """A fold has too few rows for bins; the folds of a repeat together have every row once."""
    if data.task == "regression":
        return {}
    folds = len(splits) // repeats
    errors: dict[Mode, float] = {}
    for mode in _modes(name):
        errors[mode] = float(
            np.mean(
                [
                    expected_calibration_error(
                        np.concatenate([_answer(one, mode) for one in outcomes[first : first + folds]]),
                        np.concatenate([data.y[test] for _, test in splits[first : first + folds]]),
                    )
                    for first in range(0, len(splits), folds)
                ]
            )
        )
    return errors


def _curves(outcomes: list[Outcome]) -> tuple[list[int], NDArray[np.float64], NDArray[np.float64]]:
    """Means over the folds. Folds may have chosen recipes of other lengths: only epochs that all have are shown."""
    count = min(len(outcome.curve_epochs) for outcome in outcomes)
    return (
        outcomes[0].curve_epochs[:count],
        np.mean([outcome.train_curve[:count] for outcome in outcomes], axis=0),
        np.mean([outcome.held_out_curve[:count] for outcome in outcomes], axis=0),
    )


def metrics_of(task: Task) -> tuple[str, ...]:
    return ("accuracy", "nll", "brier") if task == "classification" else ("rmse", "nll", "crps")
