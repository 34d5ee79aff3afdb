"""What `dropserve tune` says when it is done."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from training.collapse import TRIES
from training.paired import Interval
from training.tune import Settings, Tuned


def document(found: Tuned, settings: Settings) -> dict[str, Any]:
    """For a script."""
    return {
        "objective": settings.objective,
        "recipe": asdict(found.recipe),
        "selected_score": found.selected_score,
        "nested_score": None if found.nested is None else found.nested.document(),
        "nested_scores": list(found.nested_scores),
        "start_score": None if found.start is None else found.start.document(),
        "constant_score": found.constant_score,
        "trials": {"completed": found.completed, "pruned": found.pruned, "collapsed": found.collapsed},
        "winner_collapsed": found.winner_collapsed,
        "collapsed_outer_folds": found.collapsed_outer,
        "storage": settings.storage,
    }


def sentences(found: Tuned, settings: Settings) -> str:
    """For a person."""
    recipe, objective = found.recipe, settings.objective
    changes = [
        f"{label} {value}"
        for label, value, before in (
            (
                "hidden units",
                "-".join(map(str, recipe.hidden_units)),
                "-".join(map(str, settings.space.base.hidden_units)),
            ),
            ("max-norm", recipe.max_norm, settings.space.base.max_norm),
            ("learning rate", f"{recipe.learning_rate:.3g}", f"{settings.space.base.learning_rate:.3g}"),
            ("epochs", recipe.epochs, settings.space.base.epochs),
        )
        if value != before
    ]
    lines = [
        f"Best of {found.completed} trials ({found.pruned} more were pruned): visible {recipe.visible_dropout:g}, "
        f"hidden {recipe.hidden_dropout:g}{''.join(', ' + change for change in changes)}.",
        f"Its {objective} of {found.selected_score:.3f} is too good: it was selected for it. "
        f"The same answer to every row has {found.constant_score:.3f}.",
    ]
    if found.winner_collapsed:
        lines.append(
            "Every trial had nets that collapsed: they answer the same to every row. Lower rates are not in the space; "
            "a lower learning rate is, with --search learning-rate."
        )
    elif found.collapsed:
        lines.append(
            f"In {found.collapsed} of the trials a net collapsed: it answers the same to every row. None of them could "
            "win, whatever its score."
        )
    if not found.winner_collapsed and not _beats_constant(found, objective):
        lines.append(f"No trial without collapsed nets has a better {objective} than that one answer.")
    if found.nested is not None:
        lines.append(
            f"What such a search finds has, on rows that it never saw, {objective} {_span(found.nested)} "
            f"({found.nested.folds} outer folds)."
        )
        if found.collapsed_outer:
            lines.append(f"In {found.collapsed_outer} of them the net collapsed with each of {TRIES} seeds.")
    else:
        lines.append("There are not two outer folds to judge the search by: its real score is not known.")
    if found.start is not None:
        lines.append(f"The recipe that it started from, on the same rows: {_span(found.start)}.")
    return "\n".join(lines) + "\n"


def _beats_constant(found: Tuned, objective: str) -> bool:
    gain = found.constant_score - found.selected_score
    return gain < 0 if objective == "accuracy" else gain > 0


def _span(interval: Interval) -> str:
    return f"{interval.mean:.3f} ({interval.lower:.3f} to {interval.upper:.3f} at 95 %)"
