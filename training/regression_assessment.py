"""How far an answer of one number a row can be trusted: CRPS, PIT, risk, and the coverage of its intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training import predictive, scores
from training.artifact_answers import Alone, Answers
from training.held_out import HeldOut
from training.judged import (
    CALIBRATED,
    DETERMINISTIC,
    MC,
    Figures,
    Group,
    Judged,
    coverage_of,
    coverages,
    groups,
    with_intervals,
)
from training.selection import risk_coverage

Array = NDArray[Any]


def judge(judged: Judged, answers: Answers, y: Array, held: HeldOut) -> None:
    """Fills in what the answers [N] say of the truths y [N]."""
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
    with_intervals(judged, resampled, len(y))
    width = _intervals(judged, served, y)
    shown = {"square": rows[judged.best_kind]["square"], "std": stds[judged.best_kind], **width}
    if held.groups is not None:
        judged.by_subgroup = {
            name: Group(group.rows, {"rmse": float(np.sqrt(group.figures.pop("square"))), **group.figures})
            for name, group in groups(held.groups, shown).items()
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
    for wanted in coverages(judged):
        [threshold] = known.thresholds(wanted)
        holds = off <= threshold
        judged.coverage.append(coverage_of(wanted, holds, float((2 * threshold * std).mean())))
        if wanted == judged.default_coverage:
            shown = {"coverage": holds, "width": 2 * threshold * std}
    return shown


def of_members(members: Sequence[Alone], y: Array) -> dict[str, list[Figures]]:
    """Of each member of an ensemble, by kind of answer."""
    points = [one.deterministic.astype(np.float64) - y for one in members]
    draws = [one.drawn.astype(np.float64) for one in members]
    return {
        DETERMINISTIC: [value_figures({"square": np.square(off), "crps": np.abs(off)}) for off in points],
        MC: [
            value_figures({"square": np.square(own.mean(axis=0) - y), "crps": predictive.draws_crps(own, y)})
            for own in draws
        ],
    }
