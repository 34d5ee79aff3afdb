"""What `dropserve study` says when it is done."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from training.study import BASELINE, TUNED, Comparison, Mode, Study, metrics_of

MODE_NAMES: dict[Mode, str] = {"deterministic": "off", "monte_carlo": "draws"}


def document(study: Study) -> dict[str, Any]:
    """For a script."""
    return {
        "data": study.data.name,
        "rows": len(study.data.x),
        "task": study.data.task,
        "folds": study.folds,
        "repeats": study.repeats,
        "num_samples": study.num_samples,
        "seed": study.seed,
        "variants": {
            name: {
                **({} if name == TUNED else _rates(study, name)),
                **{
                    mode: {
                        **{metric: study.interval(name, mode, metric).document() for metric in metrics},
                        **({"ece": study.calibration_error[name][mode]} if study.calibration_error[name] else {}),
                    }
                    for mode, metrics in modes.items()
                },
                "fold_figures": {
                    mode: {metric: values.tolist() for metric, values in metrics.items()}
                    for mode, metrics in modes.items()
                },
                "curves": dict(
                    zip(
                        ("epochs", "train_loss", "held_out_loss"),
                        [list(map(float, values)) for values in study.curves[name]],
                        strict=True,
                    )
                ),
            }
            for name, modes in study.figures.items()
        },
        "tuned_levels": [
            {"visible_dropout": visible, "hidden_dropout": hidden, "folds": folds}
            for (visible, hidden), folds in study.chosen.items()
        ],
        "comparisons": [
            {
                "variant": one.variant,
                "mode": one.mode,
                "metric": one.metric,
                "difference": one.difference.document(),
                "verdict": one.verdict,
            }
            for one in study.comparisons()
        ],
    }


def _rates(study: Study, name: str) -> dict[str, float]:
    recipe = study.recipes[name]
    return {"visible_dropout": recipe.visible_dropout, "hidden_dropout": recipe.hidden_dropout}


def figures_table(study: Study) -> Table:
    """Means over all folds."""
    metrics = metrics_of(study.data.task)
    table = Table(box=None, pad_edge=False)
    table.add_column("dropout in")
    table.add_column("visible", justify="right")
    table.add_column("hidden", justify="right")
    table.add_column("test")
    for metric in metrics:
        table.add_column(metric, justify="right")
    if study.data.task == "classification":
        table.add_column("ece", justify="right")
    for name, modes in study.figures.items():
        rates = ("chosen", "in each fold") if name == TUNED else tuple(f"{r:g}" for r in _rates(study, name).values())
        for mode in modes:
            means = [f"{study.interval(name, mode, metric).mean:.3f}" for metric in metrics]
            errors = [f"{study.calibration_error[name][mode]:.3f}"] if study.calibration_error[name] else []
            label = f"{study.num_samples} draws" if mode == "monte_carlo" else MODE_NAMES[mode]
            table.add_row(name, *rates, label, *means, *errors)
    return table


def comparisons_table(study: Study) -> Table:
    """Each variant minus the baseline (dropout off), with the interval of the difference."""
    table = Table(box=None, pad_edge=False, title="minus the baseline", title_justify="left")
    for header in ("dropout in", "test", "metric"):
        table.add_column(header, no_wrap=True)
    for header in ("difference", "95 % interval"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for one in study.comparisons():
        interval = one.difference
        span = f"{interval.lower:+.3f} .. {interval.upper:+.3f}"
        table.add_row(one.variant, MODE_NAMES[one.mode], one.metric, f"{interval.mean:+.3f}", span, one.verdict)
    return table


def sentences(study: Study) -> str:
    """The findings in plain words."""
    data = study.data
    lines = [
        f"{data.name}, {len(data.x):,} rows: {study.repeats} x {study.folds}-fold cross-validation, the same folds for "
        "all; intervals by Nadeau & Bengio's correction, each at 95 % by itself.",
    ]
    metrics = metrics_of(data.task)
    by_variant = {name: [one for one in study.comparisons() if one.variant == name] for name in study.figures}
    for name, comparisons in by_variant.items():
        if name == BASELINE:
            continue
        lines.append(f"{name}: {_finding(comparisons, metrics)}")
    return "\n".join(lines)


def _finding(comparisons: list[Comparison], metrics: tuple[str, ...]) -> str:
    clauses = []
    for verdict in ("better", "worse"):
        shown = [
            f"{one.metric} by {abs(one.difference.mean):.3f} ({MODE_NAMES[one.mode]})"
            for one in comparisons
            if one.verdict == verdict and one.metric in metrics
        ]
        if shown:
            clauses.append(f"{verdict} in {', '.join(shown)}")
    return "; ".join(clauses) + "." if clauses else "no difference shown."


def overfitting(study: Study) -> str:
    """What the learning curves say: where the held-out loss was lowest, and where it ended."""
    lines = []
    for name, (epochs, train, held_out) in study.curves.items():
        best = int(held_out.argmin())
        lines.append(
            f"{name}: held-out loss lowest at epoch {epochs[best]} ({held_out[best]:.3f}), "
            f"{held_out[-1]:.3f} at the end, where the training rows' is {train[-1]:.3f}"
        )
    return "\n".join(lines)
