"""The study as a page: what was found in words, fold by fold, over the epochs, and every interval."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure as Canvas

from training import report, study_summary
from training.study import BASELINE, TUNED, Study, metrics_of

# The metric that a page draws: a proper score, of the answer as it is served.
DRAWN = {"classification": "nll", "regression": "nll"}


def page(study: Study) -> str:
    """One HTML page that needs nothing else."""
    return report.page(
        f"Does dropout help on {study.data.name}?",
        f"{len(study.data.x):,} rows, {study.repeats} x {study.folds}-fold cross-validation, the same folds for all",
        [findings(study), figures(study), differences(study), curves(study), levels(study)],
    )


def findings(study: Study) -> report.Section:
    return report.Section(
        "Findings",
        paragraphs=(
            *study_summary.sentences(study).splitlines(),
            "“No difference shown” is not “no difference”: it says that these rows cannot tell.",
        ),
    )


def figures(study: Study) -> report.Section:
    metrics = metrics_of(study.data.task)
    headings = ["dropout in", "in the test", *metrics]
    rows = []
    for name, modes in study.figures.items():
        for mode in modes:
            spans = [study.interval(name, mode, metric) for metric in metrics]
            cells = [f"{span.mean:.3f} ({span.lower:.3f} to {span.upper:.3f})" for span in spans]
            error = study.calibration_error[name]
            rows.append([name, study_summary.MODE_NAMES[mode], *cells, *([f"{error[mode]:.3f}"] if error else [])])
    if study.data.task == "classification":
        headings.append("ece")
    caption = "Means over all folds with 95 % intervals (corrected, Nadeau & Bengio); ece over all rows of a repeat."
    return report.Section("Figures", grids=(report.Grid(headings, rows, caption),))


def differences(study: Study) -> report.Section:
    """Fold by fold against the baseline, and every interval."""
    metric = DRAWN[study.data.task]
    base = study.figures[BASELINE]["deterministic"][metric]
    names = [name for name in study.figures if name != BASELINE]

    def paired(canvas: Canvas) -> None:
        axes = canvas.subplots()
        axes.axhline(0, color="0.6", linewidth=0.8)
        for place, name in enumerate(names):
            difference = study.figures[name]["monte_carlo"][metric] - base
            # Beside each other, so that folds with the same difference are all seen.
            spread = place + np.linspace(-0.3, 0.3, len(difference))
            axes.plot(spread, difference, ".", markersize=3, color=report.COLOURS[0], alpha=0.5)
            [shown] = [
                one.difference
                for one in study.comparisons()
                if (one.variant, one.mode, one.metric) == (name, "monte_carlo", metric)
            ]
            axes.errorbar(
                place,
                shown.mean,
                yerr=[[shown.mean - shown.lower], [shown.upper - shown.mean]],
                fmt="o",
                color=report.COLOURS[1],
                capsize=4,
                linestyle="none",
            )
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel(f"{metric} minus the baseline's")

    rows = [
        [
            one.variant,
            study_summary.MODE_NAMES[one.mode],
            one.metric,
            f"{one.difference.mean:+.3f}",
            f"{one.difference.lower:+.3f} to {one.difference.upper:+.3f}",
            one.verdict,
        ]
        for one in study.comparisons()
    ]
    caption = f"Mean of {study.num_samples} draws against the net without dropout: dots are folds, bars are intervals."
    return report.Section(
        "Fold by fold, against the baseline",
        figures=(report.draw(caption, paired),),
        grids=(report.Grid(["dropout in", "in the test", "metric", "difference", "95 % interval", ""], rows),),
    )


def curves(study: Study) -> report.Section:
    """Overfitting, made visible."""

    def losses(canvas: Canvas) -> None:
        left, right = canvas.subplots(1, 2, sharey=True)
        for place, (name, (epochs, train, held_out)) in enumerate(study.curves.items()):
            style = {"color": report.COLOURS[place], "linestyle": report.LINES[place], "label": name}
            left.plot(epochs, train, **style)
            right.plot(epochs, held_out, **style)
        left.set_title("rows that trained it")
        right.set_title("rows held out")
        left.set_ylabel("loss, dropout off")
        for axes in (left, right):
            axes.set_xlabel("epoch")
        # The training losses end low, and leave room above them.
        left.legend()

    return report.Section(
        "Over the epochs",
        paragraphs=tuple(study_summary.overfitting(study).splitlines()),
        figures=(
            report.draw("Mean loss over the folds: where the two part, the net learns its rows by heart.", losses),
        ),
    )


def levels(study: Study) -> report.Section:
    rows = [[f"{visible:g}", f"{hidden:g}", str(folds)] for (visible, hidden), folds in study.chosen.items()]
    return report.Section(
        "The tuned level",
        paragraphs=(
            f"For “{TUNED}”, every fold chose its rates within its own training rows; no test row had a say in it.",
        ),
        grids=(report.Grid(["visible", "hidden", "folds that chose it"], rows),),
    )
