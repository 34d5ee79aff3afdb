"""How accurate can a tuned dropout net be on Sonar? Every choice is made within the training rows of each fold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training import scores
from training.datasets import Dataset
from training.folds import Index, Job, Outcome, fit_jobs, inner_folds, repeated_folds
from training.recipes import DEFAULTS, Recipe

FOLDS, INNER_FOLDS = 10, 3
# Draws of a choice and of an answer.
NUM_SAMPLES = 50
# Nets of an ensemble, all of the chosen recipe.
MEMBERS = 5
CHOSEN, ENSEMBLE, SEVERAL = "chosen net, draws", f"{MEMBERS} of it, draws", f"best {MEMBERS} recipes, draws"


def space() -> list[Recipe]:
    """Wider nets than the tutorial's under Adam, and the tutorial's own, at gentle and strong rates."""
    own = DEFAULTS["sonar"]
    adam = replace(own, max_norm=None, optimizer="adam", learning_rate=2e-3, epochs=100, momentum=0.0)
    rates = [(visible, hidden) for visible in (0.0, 0.1, 0.3) for hidden in (0.2, 0.5)]
    wide = [
        replace(adam, hidden_units=widths, visible_dropout=visible, hidden_dropout=hidden)
        for widths in ((128,), (256,), (128, 64))
        for visible, hidden in rates
    ]
    narrow = [
        replace(own, learning_rate=0.03, visible_dropout=visible, hidden_dropout=hidden)
        for visible, hidden in ((0.0, 0.1), (0.1, 0.1), (0.1, 0.2), (0.2, 0.2))
    ]
    return [*wide, *narrow]


@dataclass(frozen=True)
class Nested:
    """accuracy: way to answer -> one figure a fold, repeat after repeat. chosen: recipe -> folds that chose it."""

    accuracy: dict[str, NDArray[np.float64]]
    chosen: dict[Recipe, int]


def nested(data: Dataset, *, repeats: int, seed: int, on_step: Callable[[str], None]) -> Nested:
    """10-fold cross-validations; in each fold the recipe with the least NLL of three folds within its training rows."""
    splits = repeated_folds(data.y, data.task, folds=FOLDS, repeats=repeats, seed=seed)
    recipes = space()
    parts = [inner_folds(data.y, data.task, train, folds=INNER_FOLDS, seed=seed) for train, _ in splits]
    cells = [
        (fold, number, Job(recipe, fit, held, seed=seed + part))
        for number, recipe in enumerate(recipes)
        for fold, inner in enumerate(parts)
        for part, (fit, held) in enumerate(inner)
    ]
    losses = np.zeros((len(splits), len(recipes)))
    for (fold, number, job), outcome in zip(cells, _fit(data, [job for *_, job in cells]), strict=True):
        assert outcome.monte_carlo is not None
        loss = scores.classification(outcome.monte_carlo, data.y[job.held_out])["nll"]
        losses[fold, number] += loss / INNER_FOLDS
    on_step(f"{len(cells)} nets of the inner folds are fitted")

    ranks = losses.argsort(axis=1)
    chosen = [recipes[order[0]] for order in ranks]
    same = [
        (fold, Job(chosen[fold], train, test, seed=seed + 100 * member + fold))
        for member in range(MEMBERS)
        for fold, (train, test) in enumerate(splits)
    ]
    several = [
        (fold, Job(recipes[number], train, test, seed=seed + 100 * place + fold))
        for fold, (train, test) in enumerate(splits)
        for place, number in enumerate(ranks[fold, :MEMBERS])
    ]
    outcomes = _fit(data, [job for _, job in (*same, *several)])
    answers: dict[str, list[list[Any]]] = {key: [[] for _ in splits] for key in (ENSEMBLE, SEVERAL)}
    for number, ((fold, _), outcome) in enumerate(zip((*same, *several), outcomes, strict=True)):
        answers[ENSEMBLE if number < len(same) else SEVERAL][fold].append(outcome.monte_carlo)
    ways = {
        CHOSEN: [members[0] for members in answers[ENSEMBLE]],
        **{key: [np.mean(members, axis=0) for members in folds] for key, folds in answers.items()},
    }
    accuracy = {
        way: np.array([np.mean(p.argmax(axis=1) == data.y[test]) for p, (_, test) in zip(own, splits, strict=True)])
        for way, own in ways.items()
    }
    return Nested(accuracy, {recipe: chosen.count(recipe) for recipe in recipes if recipe in chosen})


def support_vectors(data: Dataset, *, repeats: int, seed: int) -> NDArray[np.float64]:
    """scikit-learn's RBF-SVC, its C chosen by the same number of inner folds, on the same outer ones."""
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    splits: list[tuple[Index, Index]] = repeated_folds(data.y, data.task, folds=FOLDS, repeats=repeats, seed=seed)
    model = GridSearchCV(make_pipeline(StandardScaler(), SVC()), {"svc__C": [1.0, 10.0, 100.0]}, cv=INNER_FOLDS)
    return np.array([model.fit(data.x[a], data.y[a]).score(data.x[b], data.y[b]) for a, b in splits])


def _fit(data: Dataset, jobs: Sequence[Job]) -> list[Outcome]:
    """In the order of the jobs; nets of one kind share stacks."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for number, job in enumerate(jobs):
        recipe = job.recipe
        kind = (recipe.hidden_units, recipe.optimizer, recipe.batch_size)
        kinds.setdefault(kind, []).append(number)
    found: dict[int, Outcome] = {}
    for numbers in kinds.values():
        outcomes = fit_jobs(data, [jobs[number] for number in numbers], num_samples=NUM_SAMPLES)
        found.update(zip(numbers, outcomes, strict=True))
    return [found[number] for number in range(len(jobs))]
