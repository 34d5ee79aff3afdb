"""The report's page on uncertainty: is confidence right, what is withholding worth, do sets hold, what is strange?

Drawn from what `training.assessment` found on test rows.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from training.bootstrap import Bounds
from training.judged import CALIBRATED, DETERMINISTIC, MC, Judged
from training.predictive import PIT_BINS, pit_counts
from training.report import COLOURS, LINES, Figure, Grid, Section, draw
from training.selection import RiskCoverage

# How kinds of answers are called, and drawn: always in the same colour and line.
NAMES = {DETERMINISTIC: "dropout off", MC: "draws", CALIBRATED: "draws, calibrated"}
STYLES: dict[str, dict[str, Any]] = {
    kind: {"color": COLOURS[place], "linestyle": LINES[place]} for place, kind in enumerate(NAMES)
}
# Figures that the page shows; what a regression or a classification does not have is left out.
SHOWN = (
    *("nll", "brier", "reliability", "resolution", "ece", "adaptive_ece"),
    *("rmse", "crps", "pit_distance", "sharpness", "aurc"),
)
# Fewer rows than this in a bin say little: its point is drawn small.
FEW_ROWS = 10


def sections(judged: Judged, rows: int) -> list[Section]:
    """One section, and one more where outliers could be made."""
    figures = [risk_figure(judged)]
    if judged.curves:
        figures.insert(0, reliability_figure(judged))
    if judged.pit:
        figures.insert(0, pit_figure(judged, rows))
    grids = [figures_grid(judged), *([members_grid(judged)] if judged.members else [])]
    if judged.coverage:
        grids.append(coverage_grid(judged))
    if judged.by_class and "coverage" in next(iter(judged.by_class.values())).figures:
        grids.append(class_grid(judged))
    found = [Section("Can the uncertainty be trusted?", [in_words(judged, rows)], figures, grids)]
    return found + ([outlier_section(judged)] if judged.outliers else [])


def in_words(judged: Judged, rows: int) -> str:
    served = NAMES[judged.best_kind]
    said = [f"On {rows:,} test rows, with 95 % bootstrap intervals in brackets. "]
    for name, called in (("nll", "negative log-likelihood"), ("ece", "calibration error"), ("crps", "CRPS")):
        if name in judged.differences:
            value, (lower, upper) = judged.differences[name]
            verdict = "lower" if upper < 0 else "higher" if lower > 0 else "not shown to differ"
            said.append(
                f"The {called} of the answer that is served ({served}) is {verdict} "
                f"{'than' if verdict != 'not shown to differ' else 'from'} that with dropout off "
                f"({value:+.3g} [{lower:+.2g}, {upper:+.2g}]). "
            )
    return "".join([*said, *[f"{said_of(note)}. " for note in judged.notes]]).strip()


def said_of(note: str) -> str:
    """A note as a sentence of the page."""
    told = note.replace(f"{CALIBRATED} is", "The calibrated answer is")
    return told[0].upper() + told[1:]


def figures_grid(judged: Judged) -> Grid:
    names = [name for name in SHOWN if any(name in figures for figures in judged.figures.values())]
    lines = [
        [
            name.replace("_", " "),
            *[
                with_bounds(figures[name], judged.intervals[kind].get(name)) if name in figures else ""
                for kind, figures in judged.figures.items()
            ],
        ]
        for name in names
    ]
    caption = (
        "Less is better for all but resolution; sharpness is how narrow answers are, right or not (mean entropy in "
        "nats, or the root of the mean variance). reliability and resolution are parts of the Brier score; ece has 15 "
        "bins of equal width, adaptive ece 15 of as many rows each; aurc is the area under the risk-coverage curve."
    )
    return Grid(["", *[NAMES[kind] for kind in judged.figures]], lines, caption)


def members_grid(judged: Judged) -> Grid:
    each = list(judged.members.values())
    lines = []
    for name in (name for name in SHOWN if name in each[0][0]):
        own = [[figures[name] for figures in one] for one in each]
        alone = [f"{np.mean(values):.3g} ± {np.std(values, ddof=1):.2g}" for values in own]
        lines.append([name.replace("_", " "), *alone, *[f"{figures[name]:.3g}" for figures in judged.figures.values()]])
    headings = [f"one, {NAMES[kind]}" for kind in judged.members] + [f"all, {NAMES[kind]}" for kind in judged.figures]
    caption = (
        f"What the ensemble is worth: its {len(each[0])} members alone, mean and standard deviation over them, each "
        "with as many draws as the ensemble answers with; and all together."
    )
    return Grid(["", *headings], lines, caption)


def coverage_grid(judged: Judged) -> Grid:
    is_sets = judged.output.task == "classification"
    what = "mean number of classes in the set" if is_sets else "mean width of the interval"
    lines = [
        [
            f"{100 * one.wanted:g} %",
            f"{100 * one.found:.1f} %",
            f"{100 * one.lower:.0f} to {100 * one.upper:.0f} %",
            f"{one.size:.3g}" if math.isfinite(one.size) else "infinite: too few calibration rows",
        ]
        for one in judged.coverage
    ]
    caption = "How often the truth lies within, and what these rows allow to say of that share (95 %, Clopper-Pearson)."
    return Grid(["coverage asked", "found", "may be", what], lines, caption)


def class_grid(judged: Judged) -> Grid:
    lines = [
        [
            name,
            f"{group.rows:,}",
            *[f"{group.figures[key]:.3f}" for key in ("accuracy", "confidence", "coverage", "set_size")],
        ]
        for name, group in judged.by_class.items()
    ]
    headings = ["true class", "rows", "accuracy", "mean confidence", "coverage of the sets", "mean set size"]
    coverage = f"{100 * judged.default_coverage:g} %"
    return Grid(headings, lines, f"By class, at a coverage of {coverage}, which holds over all classes, not for each.")


def reliability_figure(judged: Judged) -> Figure:
    def on(canvas: Canvas) -> None:
        axes = canvas.subplots(1, len(judged.curves), sharey=True, squeeze=False)[0]
        for axis, (kind, curve) in zip(axes, judged.curves.items(), strict=True):
            axis.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1)
            # Two standard errors of each bin's share, by its confidence.
            error = 2 * np.sqrt(curve.confidence * (1 - curve.confidence) / curve.rows)
            axis.errorbar(
                curve.confidence, curve.accuracy, error, color=COLOURS[5], linestyle="none", linewidth=0.8, zorder=1
            )
            axis.plot(curve.confidence, curve.accuracy, **STYLES[kind])
            size = np.where(curve.rows < FEW_ROWS, 6, 26)
            axis.scatter(curve.confidence, curve.accuracy, size, color=STYLES[kind]["color"], zorder=3)
            axis.set(title=NAMES[kind], xlabel="confidence", xlim=(0, 1.02), ylim=(0, 1.05))
        axes[0].set_ylabel("share of right answers")

    caption = (
        "Reliability: how often answers of a confidence are right. On the dotted line confidence is right, above it "
        f"too low, below it too high. Small points are bins of fewer than {FEW_ROWS} rows; bars, two standard errors."
    )
    return draw(caption, on, height=2.6)


def risk_figure(judged: Judged) -> Figure:
    is_classification = judged.output.task == "classification"

    def on(canvas: Canvas) -> None:
        left, right = canvas.subplots(1, 2)
        for kind, curve in judged.risk.items():
            risk = curve.risk if is_classification else np.sqrt(curve.risk)
            left.plot(curve.coverage, risk, label=NAMES[kind], **STYLES[kind])
        left.set(xlabel="share of rows answered", ylim=(0, None))
        left.set_ylabel("share wrong" if is_classification else "rmse")
        canvas.legend(loc="outside upper left", ncols=3)
        (accuracy_rejection if is_classification else rejection)(right, judged.risk)

    caption = "Risk and coverage: the error among answers when the most doubtful rows are withheld; right, the rest."
    return draw(caption, on, height=2.8)


def accuracy_rejection(axis: Axes, risk: dict[str, RiskCoverage]) -> None:
    for kind, curve in risk.items():
        axis.plot(1 - curve.coverage, 1 - curve.risk, **STYLES[kind])
    axis.set(xlabel="share of rows rejected", ylabel="accuracy of the rest", xlim=(0, 1))


def rejection(axis: Axes, risk: dict[str, RiskCoverage]) -> None:
    for kind, curve in risk.items():
        whole = math.sqrt(curve.risk[-1])
        axis.plot(1 - curve.coverage, np.sqrt(curve.risk) / whole, **STYLES[kind])
    axis.set(xlabel="share of rows rejected", ylabel="error of the rest / of all", xlim=(0, 1), ylim=(0, None))


def pit_figure(judged: Judged, rows: int) -> Figure:
    def on(canvas: Canvas) -> None:
        axes = canvas.subplots(1, len(judged.pit), sharey=True, squeeze=False)[0]
        for axis, (kind, values) in zip(axes, judged.pit.items(), strict=True):
            counts = pit_counts(values)
            edges = np.linspace(0, 1, PIT_BINS + 1)
            axis.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=STYLES[kind]["color"], alpha=0.7)
            axis.axhline(rows / PIT_BINS, color="black", linestyle=":", linewidth=1)
            axis.set(title=NAMES[kind], xlabel="where the truth lies in the answer's distribution")
        axes[0].set_ylabel("rows")

    caption = (
        "Probability integral transform: flat, on the dotted line, where the distributions are right; high at both "
        "ends where they are too narrow."
    )
    return draw(caption, on, height=2.5)


def outlier_section(judged: Judged) -> Section:
    kinds = list(judged.outliers)
    scores = list(next(iter(judged.outliers.values())))

    def on(canvas: Canvas) -> None:
        axis = canvas.subplots()
        height = 0.8 / len(scores)
        for place, score in enumerate(scores):
            values = [judged.outliers[kind][score]["auroc"] for kind in kinds]
            at = np.arange(len(kinds)) + (place - (len(scores) - 1) / 2) * height
            axis.barh(at, values, height * 0.9, color=COLOURS[place], label=score.replace("_", " "))
        axis.axvline(0.5, color="black", linestyle=":", linewidth=1)
        axis.set(xlim=(0, 1.02), xlabel="AUROC")
        axis.set_yticks(range(len(kinds)), kinds)
        axis.invert_yaxis()
        canvas.legend(loc="outside upper left", ncols=3)

    lines = [
        [kind, score.replace("_", " "), *[f"{figures[key]:.3f}" for key in ("auroc", "aupr", "fpr95")]]
        for kind, by_score in judged.outliers.items()
        for score, figures in by_score.items()
    ]
    text = (
        "Rows that are unlike the data were made: images of noise, of one grey, of strokes; table rows far outside, "
        "and rows whose columns do not belong together. Each score should be higher for them than for the test rows. "
        "Draws of one network are weak far from its data: where a bar is short, the model does not notice."
    )
    caption = "AUROC: how often a made row has the higher score of a pair; 0.5, dotted, is chance."
    grid = Grid(
        ["rows", "told by", "AUROC", "AUPR", "false alarms at 95 % found"],
        lines,
        "AUPR: area under precision and recall of the made rows.",
    )
    return Section("Does it notice what it has never seen?", [text], [draw(caption, on, height=2.4)], [grid])


def with_bounds(value: float, bounds: Bounds | None) -> str:
    return f"{value:.3g}" if bounds is None else f"{value:.3g} [{bounds[0]:.2g}, {bounds[1]:.2g}]"
