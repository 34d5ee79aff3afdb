"""The best dropout rates for a data set, and an honest figure of how good they are.

The rates are searched by cross-validation within the training rows. The best figure of a search is too good: it was
chosen for being the best. So the whole search is repeated inside each of a few outer folds, and what it finds there is
judged on rows that it never saw: that is the reported score. The winner is then trained on all training rows.

A trial in which the net of any fold answers the same to every row has collapsed. It wins only where all others did too.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import optuna
from numpy.typing import NDArray

from training import cores, scores, search
from training.collapse import TRIES, constant_answer, is_constant
from training.datasets import Dataset
from training.errors import InputError
from training.folds import Index, Job, OnLook, Outcome, fit_jobs, inner_folds
from training.paired import Interval, corrected_interval
from training.recipes import Recipe

Objective = Literal["nll", "accuracy", "brier", "rmse"]
OBJECTIVES: dict[str, tuple[Objective, ...]] = {
    "classification": ("nll", "accuracy", "brier"),
    "regression": ("rmse",),
}
# What can be searched besides the two rates.
DIMENSIONS = ("width", "max-norm", "learning-rate", "epochs")

MAX_VISIBLE, MAX_HIDDEN, RATE_STEP = 0.5, 0.6, 0.05
# A network without dropout has nothing to draw and cannot be published.
MIN_HIDDEN = 0.05
WIDTHS = (0.5, 1.0, 2.0, 4.0)
MAX_NORMS = (0.0, 1.0, 2.0, 3.0, 4.0)
# Draws of a trial's score.
SCORE_DRAWS = 30
# Epochs before a trial may be pruned, as a share of the recipe's.
WARMUP_SHARE = 0.3


class ObjectiveError(InputError):
    def __init__(self, objective: str, data: Dataset) -> None:
        wanted = ", ".join(OBJECTIVES[data.task])
        super().__init__(f"objective {objective!r} for the {data.task} of {data.name}; wanted one of {wanted}")


class DimensionError(InputError):
    def __init__(self, name: str) -> None:
        super().__init__(f"--search {name!r}; wanted some of {','.join(DIMENSIONS)}")


class NoTrial(InputError):
    def __init__(self, timeout_s: float | None) -> None:
        super().__init__(f"no trial was completed within {timeout_s:g} s; wanted a longer --timeout, or fewer --epochs")


@dataclass(frozen=True)
class Space:
    """Where to look: around a recipe."""

    base: Recipe
    dimensions: tuple[str, ...] = ()

    def first(self) -> dict[str, Any]:
        """The recipe itself, as nearly as the space has it."""
        base, wanted = self.base, self.base.max_norm
        bound = 0.0 if wanted is None else min(MAX_NORMS[1:], key=lambda norm: abs(norm - wanted))
        searched = {"width": 1.0, "max-norm": bound, "learning-rate": base.learning_rate, "epochs": base.epochs}
        return {
            "visible_dropout": min(_step(base.visible_dropout), MAX_VISIBLE),
            "hidden_dropout": min(max(_step(base.hidden_dropout), MIN_HIDDEN), MAX_HIDDEN),
            **{name.replace("-", "_"): searched[name] for name in self.dimensions},
        }

    def suggest(self, trial: optuna.Trial | optuna.trial.FixedTrial) -> Recipe:
        base = self.base
        chosen = replace(
            base,
            visible_dropout=trial.suggest_float("visible_dropout", 0.0, MAX_VISIBLE, step=RATE_STEP),
            hidden_dropout=trial.suggest_float("hidden_dropout", MIN_HIDDEN, MAX_HIDDEN, step=RATE_STEP),
        )
        if "width" in self.dimensions:
            factor = trial.suggest_categorical("width", WIDTHS)
            chosen = replace(chosen, hidden_units=tuple(max(1, round(n * factor)) for n in base.hidden_units))
        if "max-norm" in self.dimensions:
            bound = trial.suggest_categorical("max_norm", MAX_NORMS)
            chosen = replace(chosen, max_norm=bound or None)
        if "learning-rate" in self.dimensions:
            rate = trial.suggest_float("learning_rate", base.learning_rate / 10, base.learning_rate * 10, log=True)
            chosen = replace(chosen, learning_rate=rate)
        if "epochs" in self.dimensions:
            epochs = trial.suggest_int("epochs", max(1, base.epochs // 4), max(1, 2 * base.epochs), log=True)
            chosen = replace(chosen, epochs=epochs)
        return chosen

    def recipe(self, parameters: dict[str, Any]) -> Recipe:
        return self.suggest(optuna.trial.FixedTrial(parameters))


def _step(rate: float) -> float:
    return round(round(rate / RATE_STEP) * RATE_STEP, 10)


@dataclass(frozen=True)
class Settings:
    """One `dropserve tune`."""

    space: Space
    objective: Objective
    # Of each search: there is one for the winner, and one in each outer fold.
    trials: int
    # Folds of a trial, and outer ones; none of these: no nested estimate.
    folds: int
    outer_folds: int
    # Draws of the score.
    num_samples: int
    seed: int
    timeout_s: float | None
    storage: str
    # Of the Optuna studies.
    name: str


@dataclass(frozen=True)
class Tuned:
    """What was found."""

    recipe: Recipe
    # The winner's own figure, which is too good: it was selected for it.
    selected_score: float
    # What the search finds, on rows that it never saw; None where time did not suffice for two outer folds.
    nested: Interval | None
    nested_scores: tuple[float, ...]
    # The recipe that the search began with, on the same outer folds.
    start: Interval | None
    # The same of one answer to every row, made of the training targets alone.
    constant_score: float
    # Of the winner's search: how many trials ended how, and in how many of the completed ones a net collapsed.
    completed: int
    pruned: int
    collapsed: int
    # Whether the winner is one of those, since there was no other.
    winner_collapsed: bool
    # Outer folds whose net was a constant with every seed: their scores are in the nested estimate.
    collapsed_outer: int


def check(data: Dataset, objective: str | None, dimensions: tuple[str, ...]) -> Objective:
    """The objective, the task's first where none is named. Raises ObjectiveError, DimensionError."""
    for name in dimensions:
        if name not in DIMENSIONS:
            raise DimensionError(name)
    allowed = OBJECTIVES[data.task]
    for one in allowed:
        if objective in (None, one):
            return one
    raise ObjectiveError(str(objective), data)


def rare_classes(data: Dataset, rows: Index, settings: Settings) -> list[str]:
    """What to say of a search with `rows` that has more folds than a class has rows: some folds have none of it.

    Raises TooManyFolds, ConstantTarget.
    """
    parts = _parts(data, rows, settings)
    if data.task != "classification":
        # Of a quantity the folds share out tenths, and a tenth has neighbours.
        return []
    counts = np.array([np.bincount(data.y[train], minlength=len(data.labels)) for _, train, _ in parts])
    found = []
    for fewest, folds, rows_of, folds_of, option in (
        (counts.min(axis=0), settings.folds, "rows in a search", f"its {settings.folds} folds", "--folds"),
        (counts[0], settings.outer_folds, "training rows", f"the {settings.outer_folds} outer folds", "--outer-folds"),
    ):
        label, most = data.labels[fewest.argmin()], int(fewest.min())
        if most < folds:
            advice = f" ({option} {most} has it in each)" if most > 1 else ""
            found.append(f"class {label!r} has {most} {rows_of}: some of {folds_of} are judged without it{advice}")
    return found


def _parts(data: Dataset, rows: Index, settings: Settings) -> list[tuple[str, Index, Index]]:
    """The searches by name, each with the rows that it searches with and those that it never sees; the winner's first.

    Raises TooManyFolds, ConstantTarget.
    """
    parts = [("winner", rows, rows[:0])]
    if settings.outer_folds > 1:
        outer = inner_folds(data.y, data.task, rows, folds=settings.outer_folds, seed=settings.seed)
        parts += [(f"outer-{number}", train, held) for number, (train, held) in enumerate(outer)]
    for _, train, _ in parts:
        for fit, _ in inner_folds(data.y, data.task, train, folds=settings.folds, seed=settings.seed):
            data.target_scale(fit)
    return parts


def tune(
    data: Dataset, rows: Index, settings: Settings, on_progress: Callable[[str, int], None] = lambda what, done: None
) -> Tuned:
    """Search with `rows` of the data alone. Raises StorageError, NoTrial, TooManyFolds, ConstantTarget.

    The searches are independent of each other, and as many are carried out at once as `cores.stacks_at_once` says.

    on_progress: called with what is searched for, and how many of its trials are finished, maybe from several threads.
    """
    # Before a database is made: there may be too few rows.
    parts = _parts(data, rows, settings)
    storage = search.open_storage(settings.storage)
    at_once = cores.stacks_at_once()
    started = time.monotonic()

    def searched(number: int, go_on: Callable[[], None]) -> optuna.Study:
        part, train, _ = parts[number]
        deadline = None
        if settings.timeout_s is not None:
            # Every search gets its share; what one leaves over is the next ones'.
            left = started + settings.timeout_s - time.monotonic()
            deadline = time.monotonic() + left / -(-(len(parts) - number) // at_once)
        return search.run(
            _search(data, settings, storage, part),
            _objective(data, train, settings, go_on),
            deadline=deadline,
            on_trial=lambda done: on_progress(part, done),
        )

    names = [part for part, _, _ in parts]
    found = dict(zip(names, cores.side_by_side(searched, len(parts), at_once), strict=True))
    winner = found["winner"]
    completed = search.count(winner, optuna.trial.TrialState.COMPLETE)
    if not completed:
        raise NoTrial(settings.timeout_s)
    best = search.best(winner)
    judged = [
        (settings.space.recipe(search.best(found[part]).params), train, held)
        for part, train, held in parts[1:]
        if search.count(found[part], optuna.trial.TrialState.COMPLETE)
    ]
    tried = [_held_out_score(data, recipe, train, held, settings) for recipe, train, held in judged]
    nested = [score for score, _ in tried]
    start = [_held_out_score(data, settings.space.base, train, held, settings)[0] for _, train, held in judged]
    share = 1 / (settings.outer_folds - 1) if settings.outer_folds > 1 else 0.0
    parts_of_trial = inner_folds(data.y, data.task, rows, folds=settings.folds, seed=settings.seed)
    assert best.value is not None
    return Tuned(
        settings.space.recipe(best.params),
        best.value,
        corrected_interval(np.array(nested), share) if len(nested) > 1 else None,
        tuple(nested),
        corrected_interval(np.array(start), share) if len(start) > 1 else None,
        float(np.mean([_constant_score(data, train, held, settings) for train, held in parts_of_trial])),
        completed,
        search.count(winner, optuna.trial.TrialState.PRUNED),
        sum(search.is_collapsed(trial) for trial in winner.get_trials(states=[optuna.trial.TrialState.COMPLETE])),
        search.is_collapsed(best),
        sum(collapsed for _, collapsed in tried),
    )


def _search(data: Dataset, settings: Settings, storage: optuna.storages.BaseStorage, part: str) -> search.Search:
    # Other data, folds or spaces must not be mixed into one study.
    what = [
        data.sha256,
        asdict(settings.space),
        settings.objective,
        settings.folds,
        settings.outer_folds,
        settings.seed,
    ]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
    return search.Search(
        f"{settings.name}/{digest}/{part}",
        storage,
        "maximize" if settings.objective == "accuracy" else "minimize",
        settings.trials,
        settings.seed,
        round(WARMUP_SHARE * settings.space.base.epochs),
        settings.space.first(),
    )


def _objective(data: Dataset, rows: Index, settings: Settings, go_on: Callable[[], None]) -> Callable[..., float]:
    parts = inner_folds(data.y, data.task, rows, folds=settings.folds, seed=settings.seed)
    most = float(np.mean([_constant_loss(data, train, held) for train, held in parts]))

    def objective(trial: optuna.Trial, look: OnLook) -> float:
        def on_look(epoch: int, loss: float | None) -> None:
            go_on()
            # A net that is sure of its errors has a greater loss than a dead one, and must not be pruned for that.
            look(epoch, None if loss is None else min(loss, most))

        recipe = settings.space.suggest(trial)
        jobs = [Job(recipe, train, held, seed=settings.seed + number) for number, (train, held) in enumerate(parts)]
        outcomes = fit_jobs(
            data,
            jobs,
            num_samples=settings.num_samples,
            on_look=on_look,
        )
        search.set_collapsed(
            trial, sum(is_constant(one.answer, data, held) for one, (_, held) in zip(outcomes, parts, strict=True))
        )
        scores_of_folds = [
            _score(data, held, _served(outcome), settings) for (_, held), outcome in zip(parts, outcomes, strict=True)
        ]
        return float(np.mean(scores_of_folds))

    return objective


def _held_out_score(data: Dataset, recipe: Recipe, train: Index, held: Index, settings: Settings) -> tuple[float, bool]:
    """As the winner is trained: anew with the next seed where the net is a constant on its own training rows.

    Returns the score, and whether the last net was a constant as well.
    """
    for number in range(TRIES):
        job = Job(recipe, train, np.concatenate([held, train]), seed=settings.seed + number)
        [outcome] = fit_jobs(data, [job], num_samples=settings.num_samples)
        collapsed = is_constant(outcome.answer[len(held) :], data, train)
        if not collapsed:
            break
    return _score(data, held, _served(outcome)[: len(held)], settings), collapsed


def _served(outcome: Outcome) -> NDArray[np.float64]:
    """The mean of the draws: what is served as uncertainty's own answer. [n, K] or [n]."""
    assert outcome.monte_carlo is not None
    # Of a regression all draws are there: [T, n].
    return outcome.monte_carlo if outcome.answer.ndim == 2 else outcome.monte_carlo.mean(axis=0)


def _score(data: Dataset, rows: Index, answer: NDArray[np.float64], settings: Settings) -> float:
    y = data.y[rows]
    if data.task == "regression":
        return float(np.sqrt(np.mean(np.square(answer - y))))
    return scores.classification(answer, y)[settings.objective]


def _constant_score(data: Dataset, train: Index, held: Index, settings: Settings) -> float:
    return _score(data, held, constant_answer(data, train, len(held)), settings)


def _constant_loss(data: Dataset, train: Index, held: Index) -> float:
    """In the units of the training's own loss: nats, or squared standard deviations of the target."""
    answer, y = constant_answer(data, train, len(held)), data.y[held]
    if data.task == "regression":
        _, scale = data.target_scale(train)
        return float(np.mean(np.square((answer - y) / scale)))
    return scores.classification(answer, y)["nll"]
