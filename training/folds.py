"""Fit many networks of the same data on many choices of rows, as stacks of replicas, and answer their held-out rows."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import RepeatedStratifiedKFold

from models.contract import Task
from training import cores, replicas
from training.datasets import Dataset
from training.errors import InputError
from training.preprocessing import Preprocessor
from training.recipes import Recipe
from training.splits import target_bins

Index = NDArray[np.int64]
# Called with the share of the work that is done.
OnProgress = Callable[[float], None]
# Called with the epochs done and the mean loss of the held-out rows of all jobs there; None before all are there.
OnLook = Callable[[int, float | None], None]
# What is kept of an outcome.
Kept = TypeVar("Kept")

# Searches make their folds in several threads, and Python's filters of warnings are everyone's.
_filters = threading.Lock()


class TooManyFolds(InputError):
    def __init__(self, folds: int, task: Task, most: int) -> None:
        group = "largest class" if task == "classification" else "fullest tenth of the target's values"
        super().__init__(f"{folds} folds, but {most:,} training rows of the {group}; wanted at most {most:,} folds")


@dataclass(frozen=True)
class Job:
    """One network to fit. Preprocessing and the target's scale are those of its own training rows."""

    recipe: Recipe
    train_rows: Index
    # Whose answers are wanted.
    held_out: Index
    seed: int
    # Rows that stop it early, where there is a patience.
    stop_rows: Index | None = None


@dataclass
class Outcome:
    """What became of a job."""

    # Dropout off: probabilities float64 [n, K], or the target [n] in its own unit.
    answer: NDArray[np.float64]
    # The mean of the draws' probabilities [n, K], or all draws [T, n]; None where none were asked for.
    monte_carlo: NDArray[np.float64] | None
    # Epochs trained.
    epochs: int
    # Epochs at which the curves were looked at, and the losses of the training rows and of the held-out ones there,
    # dropout off: nats, or squared standard deviations of the target.
    curve_epochs: list[int] = field(default_factory=list)
    train_curve: list[float] = field(default_factory=list)
    held_out_curve: list[float] = field(default_factory=list)


def repeated_folds(
    y: NDArray[np.float32], task: Task, *, folds: int, repeats: int, seed: int
) -> list[tuple[Index, Index]]:
    """Training and test rows of every fold, repeat after repeat, stratified by class or by decile of the target.

    Raises TooManyFolds.
    """
    groups = y if task == "classification" else target_bins(y)
    if (most := int(np.bincount(groups).max())) < folds:
        raise TooManyFolds(folds, task, most)
    splitter = RepeatedStratifiedKFold(n_splits=folds, n_repeats=repeats, random_state=seed)
    with _filters:
        # Of classes with fewer rows than folds: `tune` says so itself, once and by name, and `study` refuses them.
        warnings.filterwarnings("ignore", "The least populated class in y has only", UserWarning)
        return [(train, test) for train, test in splitter.split(np.zeros(len(y)), groups)]


def inner_folds(
    y: NDArray[np.float32], task: Task, train: Index, *, folds: int, seed: int
) -> list[tuple[Index, Index]]:
    """Folds of the training rows alone."""
    return [
        (train[fit], train[held]) for fit, held in repeated_folds(y[train], task, folds=folds, repeats=1, seed=seed)
    ]


def fit_jobs(data: Dataset, jobs: Sequence[Job], **settings: Any) -> list[Outcome]:
    """`fit_and_keep` with all that became of the jobs kept."""
    return fit_and_keep(data, jobs, lambda job, outcome: outcome, **settings)


def fit_and_keep(
    data: Dataset,
    jobs: Sequence[Job],
    keep: Callable[[Job, Outcome], Kept],
    *,
    num_samples: int | None = None,
    patience: int | None = None,
    curves: bool = False,
    on_progress: OnProgress | None = None,
    on_look: OnLook | None = None,
) -> list[Kept]:
    """Fit all jobs, of one kind of network, in stacks of about as many as `replicas.most_at_once` says.

    Raises ConstantTarget before any of them is fitted.

    As many stacks are trained at once as `cores.stacks_at_once` says; one after another where `on_look` is given.

    keep: what to keep of a job's outcome, whose draws may be many; called as soon as its stack is trained, maybe from
    several threads.
    num_samples: draws of Monte Carlo dropout for each held-out row; None for none.
    on_progress: called with the share that is done, maybe from several threads.
    on_look: called now and then, with losses with dropout off; it may raise to end it all.
    """
    for job in jobs:
        data.target_scale(job.train_rows)
    # All stacks have the same size, so that one graph serves them all; what is missing is filled with the last job.
    most = max(1, replicas.most_at_once(jobs[0].recipe, image_shape(data)))
    at_once = cores.stacks_at_once() if on_look is None else 1
    count = min(len(jobs), -(-len(jobs) // (most * at_once)) * at_once)
    size = -(-len(jobs) // count)
    stacks = [jobs[first : first + size] for first in range(0, len(jobs), size)]
    longest = max(job.recipe.epochs for job in jobs)
    done = [0] * len(stacks)
    # Of the jobs that got there, by epoch.
    losses: dict[int, list[float]] = {}

    def fit(number: int, go_on: Callable[[], None]) -> list[Kept]:
        def advance(epochs: int) -> None:
            go_on()
            done[number] = epochs
            if on_progress is not None:
                on_progress(sum(done) / (longest * len(stacks)))

        own = list(stacks[number])

        def look(epochs: int, held_out: list[float]) -> None:
            if on_look is not None:
                there = losses.setdefault(epochs, [])
                there += held_out[: len(own)]
                on_look(epochs, float(np.mean(there)) if len(there) == len(jobs) else None)

        padded = own + [own[-1]] * (size - len(own))
        looked = None if on_look is None else look
        outcomes = _fit_stack(data, padded, num_samples, patience, curves, advance, looked)
        return [keep(job, outcome) for job, outcome in zip(own, outcomes, strict=False)]

    return [kept for stack in cores.side_by_side(fit, len(stacks), at_once) for kept in stack]


def _fit_stack(
    data: Dataset,
    jobs: list[Job],
    num_samples: int | None,
    patience: int | None,
    curves: bool,
    advance: Callable[[int], None],
    on_look: Callable[[int, list[float]], None] | None,
) -> list[Outcome]:
    rows, scales, groups = encode(data, [job.train_rows for job in jobs])
    stack = [
        replicas.Replica(job.recipe, job.train_rows, group, job.seed, job.stop_rows)
        for job, group in zip(jobs, groups, strict=True)
    ]
    looked_at: list[int] = []
    seen: list[tuple[list[float], list[float]]] = []

    def look(done: int, now: Callable[[], replicas.Trained]) -> None:
        advance(done)
        if on_look is not None:
            on_look(done, now().loss([job.held_out for job in jobs]))
        if curves:
            trained = now()
            looked_at.append(done)
            seen.append((trained.loss([job.train_rows for job in jobs]), trained.loss([job.held_out for job in jobs])))

    trained = replicas.train_stack(rows, stack, patience=patience, on_block=look)
    held_out = [job.held_out for job in jobs]
    answers = trained.predict(held_out)
    draws = None if num_samples is None else trained.draws(held_out, num_samples)
    outcomes = []
    for number, answer in enumerate(answers):
        scale = scales[groups[number]]
        own = None if draws is None else _in_units(draws[number].astype(np.float64), data, scale)
        if own is not None and data.task == "classification":
            own = own.mean(axis=0)
        outcomes.append(
            Outcome(
                _in_units(answer.astype(np.float64), data, scale),
                own,
                int(trained.epochs[number]),
                looked_at,
                [train[number] for train, _ in seen],
                [held[number] for _, held in seen],
            )
        )
    return outcomes


def _in_units(answer: NDArray[np.float64], data: Dataset, scale: tuple[float, float]) -> NDArray[np.float64]:
    """The network's answer [..., outputs] as probabilities [..., K], or as the target [...] in its own unit."""
    if data.task == "regression":
        return answer[..., 0] * scale[1] + scale[0]
    if len(data.labels) == 2:
        return np.concatenate([1 - answer, answer], axis=-1)
    return answer / answer.sum(axis=-1, keepdims=True)


def encode(data: Dataset, choices: Sequence[Index]) -> tuple[replicas.Rows, list[tuple[float, float]], list[int]]:
    """All rows of the data, once for every different choice of training rows, preprocessed as fitted on those.

    Returns the rows, each group's (mean, scale) of the target, and the group of each choice. Raises ConstantTarget.
    """
    keys: dict[bytes, int] = {}
    # Pixels are scaled as they always are, whichever rows train: one encoding does.
    image = image_shape(data)
    groups = [keys.setdefault(b"" if image else choice.tobytes(), len(keys)) for choice in choices]
    first = [choices[groups.index(group)] for group in range(len(keys))]
    encoded = [_encoded(data, rows) for rows in first]
    # One fold may know a category more than another: columns of zeros fill up, which no weight can make speak.
    features = tuple(x.shape[1] for x in encoded)
    x = np.stack([np.pad(one, ((0, 0), (0, max(features) - one.shape[1]))) for one in encoded])
    scales = [data.target_scale(rows) for rows in first]
    y = np.stack([(data.y - mean) / scale for mean, scale in scales]).astype(np.float32)
    if data.task == "regression":
        return replicas.Rows(x, y, "linear", features=features), scales, groups
    if len(data.labels) == 2:
        return replicas.Rows(x, y, "sigmoid", image=image, features=features), scales, groups
    return replicas.Rows(x, y, "softmax", len(data.labels), image, features), scales, groups


def image_shape(data: Dataset) -> tuple[int, int, int] | None:
    """Height, width and channels of the rows; None of a table."""
    if data.columns:
        return None
    height, width, channels = data.x.shape[1:]
    return height, width, channels


def _encoded(data: Dataset, rows: Index) -> NDArray[np.float32]:
    """All rows [N, F'] as the network's preprocessing fitted on `rows` gives them."""
    preprocessor = Preprocessor.fit(data, rows)
    if preprocessor.mean is not None and preprocessor.variance is not None and not data.kinds and not data.nullable:
        # A table of numbers: the same in NumPy, without a Keras graph for each of hundreds of folds.
        return ((data.x - preprocessor.mean) / np.sqrt(preprocessor.variance)).astype(np.float32)
    return preprocessor.encode(data.x).reshape(len(data.x), -1)
