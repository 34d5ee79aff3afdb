"""What `dropserve evaluate` says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.table import Table

from models.contract import Manifest, visible
from training.artifact_answers import Places
from training.bootstrap import Bounds
from training.held_out import HeldOut
from training.judged import Figures, Group, Judged
from training.predictive import pit_counts
from training.selection import RiskCoverage

# Shares of the rows: of those answered, and of those rejected, at which curves are written down.
SHARES = tuple(round(0.1 * number, 1) for number in range(1, 11))


def document(manifest: Manifest, held: HeldOut, judged: list[Judged]) -> dict[str, Any]:
    """For a script. With several outputs, or numbers a row, each stands under its name in `outputs`."""
    head = {
        "model": {"name": manifest.name, "version": str(manifest.version)},
        "data": {"name": held.name, "rows": held.rows, "which": held.described, "subgroup": held.subgroup},
        "num_samples": manifest.num_samples,
        "seed": manifest.seed,
        "notes": list(held.notes),
    }
    if len(judged) == 1:
        return head | {**_output(judged[0]), "notes": [*held.notes, *judged[0].notes]}
    return head | {"outputs": {one.output.name: _output(one) for one in judged}}


def _output(judged: Judged) -> dict[str, Any]:
    kinds: dict[str, Any] = {}
    for kind, figures in judged.figures.items():
        kinds[kind] = {**figures, "intervals": judged.intervals[kind]}
        if kind in judged.curves:
            curve = judged.curves[kind]
            kinds[kind]["reliability_curve"] = {
                "confidence": curve.confidence.tolist(),
                "accuracy": curve.accuracy.tolist(),
                judged.unit: curve.rows.tolist(),
            }
        if kind in judged.risk:
            kinds[kind]["risk_coverage"] = {f"{share:g}": judged.risk[kind].at(share) for share in SHARES}
        if judged.output.task == "classification":
            kinds[kind]["accuracy_rejection"] = {
                f"{rejected:g}": accuracy for rejected, accuracy in rejection(judged.risk[kind])
            }
        if kind in judged.pit:
            kinds[kind]["pit_histogram"] = pit_counts(judged.pit[kind]).tolist()
    places = judged.places
    return {
        "task": judged.output.task,
        "places": None if places is None else _places(places),
        "answers": kinds,
        "members": {kind: {"mean": means(each), "each": each} for kind, each in judged.members.items()} or None,
        "differences": {
            "of": judged.best_kind,
            "to": next(iter(judged.figures)),
            **{
                name: {"value": value, "lower": lower, "upper": upper}
                for name, (value, (lower, upper)) in judged.differences.items()
            },
        },
        "coverage": [
            {
                "wanted": coverage.wanted,
                "found": coverage.found,
                "lower": coverage.lower,
                "upper": coverage.upper,
                # JSON has no infinity.
                "size": coverage.size if math.isfinite(coverage.size) else None,
            }
            for coverage in judged.coverage
        ],
        "by_class": _groups(judged.by_class, judged.unit),
        "by_subgroup": _groups(judged.by_subgroup, "rows"),
        "abstention": judged.abstention or None,
        "outliers": judged.outliers,
        "notes": judged.notes,
    }


def _places(places: Places) -> dict[str, Any]:
    return {"shape": list(places.shape), "judged": len(places.judged), "left_out": places.left_out}


def _groups(groups: dict[str, Group], unit: str) -> dict[str, Any]:
    return {
        name: {
            unit: group.rows,
            **{key: value if math.isfinite(value) else None for key, value in group.figures.items()},
        }
        for name, group in groups.items()
    }


def rejection(risk: RiskCoverage) -> list[tuple[float, float]]:
    """The accuracy of what is left when these shares of the rows are rejected."""
    return [(round(1 - share, 1), 1 - risk.at(share)) for share in reversed(SHARES)]


def title(manifest: Manifest, held: HeldOut, judged: Judged, several: bool) -> str:
    output = f", output {judged.output.name}" if several else ""
    each = "" if judged.places is None else f", each of {' x '.join(map(str, judged.places.shape))} places"
    return (
        f"{manifest.name} {manifest.version}{output} on {held.described} of {held.name}{each}; "
        f"{manifest.num_samples:,} draws, seed {manifest.seed}"
    )


def tables(held: HeldOut, judged: Judged) -> Iterator[Table]:
    """For a person."""
    yield figures_table(judged)
    if judged.members:
        yield members_table(judged)
    yield risk_table(judged)
    if judged.coverage:
        yield coverage_table(judged)
    if judged.by_class:
        yield groups_table("class", judged.by_class, judged.unit)
    if judged.by_subgroup:
        yield groups_table(str(held.subgroup), judged.by_subgroup)
    if judged.outliers:
        yield outliers_table(judged)


def figures_table(judged: Judged) -> Table:
    table = _table("", *judged.figures, f"{judged.best_kind} - {next(iter(judged.figures))}")
    names = list(dict.fromkeys(name for figures in judged.figures.values() for name in figures))
    for name in names:
        cells = [
            _with_bounds(figures[name], judged.intervals[kind].get(name)) if name in figures else ""
            for kind, figures in judged.figures.items()
        ]
        difference = ""
        if name in judged.differences:
            value, bounds = judged.differences[name]
            difference = _with_bounds(value, bounds, sign=True)
        table.add_row(name, *cells, difference)
    return table


def means(each: list[Figures]) -> Figures:
    """Of every figure over the members."""
    return {name: float(np.mean([figures[name] for figures in each])) for name in each[0]}


def members_table(judged: Judged) -> Table:
    """What one member alone would be worth, beside the ensemble."""
    count = len(next(iter(judged.members.values())))
    table = _table(
        f"mean ± std of {count} members",
        *[f"one, {kind}" for kind in judged.members],
        *[f"all, {kind}" for kind in judged.figures],
    )
    for name in next(iter(judged.members.values()))[0]:
        own = [[figures[name] for figures in each] for each in judged.members.values()]
        table.add_row(
            name,
            *[f"{np.mean(values):.3g} ± {np.std(values, ddof=1):.2g}" for values in own],
            *[f"{figures[name]:.3g}" for figures in judged.figures.values()],
        )
    return table


def risk_table(judged: Judged) -> Table:
    is_classification = judged.output.task == "classification"
    table = _table(f"most doubtful {judged.unit} rejected", *judged.risk)
    for number, (rejected, _) in enumerate(rejection(next(iter(judged.risk.values())))):
        if rejected in (0.0, 0.1, 0.2, 0.5):
            table.add_row(
                f"{rejected:.0%}: {'accuracy' if is_classification else 'rmse'} of the rest",
                *[
                    f"{rejection(risk)[number][1]:.3f}"
                    if is_classification
                    else f"{math.sqrt(risk.at(1 - rejected)):.3g}"
                    for risk in judged.risk.values()
                ],
            )
    return table


def coverage_table(judged: Judged) -> Table:
    what = "mean set size" if judged.output.task == "classification" else "mean width"
    table = _table("coverage asked", "found", what)
    for one in judged.coverage:
        table.add_row(f"{100 * one.wanted:g}%", _with_bounds(one.found, (one.lower, one.upper)), f"{one.size:.3g}")
    return table


def groups_table(name: str, groups: dict[str, Group], unit: str = "rows") -> Table:
    headings = list(next(iter(groups.values())).figures)
    table = _table(visible(name), unit, *headings)
    for value, group in groups.items():
        table.add_row(visible(value), f"{group.rows:,}", *[f"{group.figures[heading]:.3g}" for heading in headings])
    return table


def outliers_table(judged: Judged) -> Table:
    table = _table("rows unlike these, told by", "auroc", "aupr", "fpr95")
    for kind, by_score in judged.outliers.items():
        for score, figures in by_score.items():
            table.add_row(f"{kind}: {score}", *[f"{figures[key]:.3f}" for key in ("auroc", "aupr", "fpr95")])
    return table


def sentences(held: HeldOut, judged: Judged) -> list[str]:
    """What must be said beside the figures."""
    found = list(held.notes) + judged.notes
    if judged.abstention:
        given = judged.abstention
        rest = f"{given['error']:.3f} of them wrong" if "error" in given else f"rmse {given.get('rmse', math.nan):.3g}"
        found.append(f"at the packaged threshold {given['answered_share']:.1%} of the rows are answered, {rest}")
    found.append(
        "brackets: 95 % intervals, by bootstrap (coverage: Clopper-Pearson); a calibration error of few rows lies high"
    )
    return found


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table


def _with_bounds(value: float, bounds: Bounds | None, *, sign: bool = False) -> str:
    def text(number: float, digits: int) -> str:
        return f"{number:+.{digits}g}" if sign else f"{number:.{digits}g}"

    return text(value, 3) if bounds is None else f"{text(value, 3)} [{text(bounds[0], 2)}, {text(bounds[1], 2)}]"
