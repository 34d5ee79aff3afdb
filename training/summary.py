"""What `dropserve train` says when it is done."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from rich.table import Table

from models import findings
from models.contract import counted, listed, visible
from training.datasets import MISSING, Dataset
from training.pipeline import Published
from training.scores import share_error

# Categories and classes that a line names.
SHOWN = 5
# Columns that the table has rows for, and of those that are ignored.
SHOWN_COLUMNS, SHOWN_IGNORED = 30, 10


def understood(data: Dataset) -> str:
    """For a person, before the training: what the data were taken for."""
    what = "is a quantity (regression)"
    if data.task == "classification":
        what = f"has {len(data.labels):,} classes "
        what += f"({'binary' if len(data.labels) == 2 else 'multi-class'} classification): "
        what += listed(data.labels, SHOWN)
    return f"{data.name}: {counted(len(data.x), 'row')}; the target {data.target!r} {what}"


def columns(data: Dataset) -> Table:
    """For a person, before the training: the type of each column of a table, and of what is left out, why."""
    table = Table(box=None, pad_edge=False)
    for heading in ("column", "type", "values"):
        table.add_column(heading)
    table.add_column("missing", justify="right")
    kinds, nullable = dict(data.kinds), set(data.nullable)
    for number, name in enumerate(data.columns[:SHOWN_COLUMNS]):
        values = data.x[name] if data.kinds else data.x[:, number]
        kind = kinds.get(name, "numeric")
        missing = values == MISSING if kind == "categorical" else np.isnan(values)
        if kind == "categorical":
            seen = listed(sorted(set(values.tolist()) - {MISSING}), SHOWN)
        elif kind == "boolean":
            seen = "false, true"
        else:
            seen = f"{np.fmin.reduce(values):g} to {np.fmax.reduce(values):g}"
        described = f"{kind}, nullable" if name in nullable else kind
        table.add_row(visible(name), described, seen, f"{int(missing.sum()):,}" if missing.any() else "")
    if others := data.columns[SHOWN_COLUMNS:]:
        found = Counter(f"{'nullable ' * (name in nullable)}{kinds.get(name, 'numeric')}" for name in others)
        what = ", ".join(f"{count:,} {kind}" for kind, count in found.most_common())
        table.add_row(f"and {len(others):,} more", "", what, "")
    for name, reason in data.ignored[:SHOWN_IGNORED]:
        table.add_row(visible(name), "ignored", reason, "")
    if len(data.ignored) > SHOWN_IGNORED:
        table.add_row(f"and {len(data.ignored) - SHOWN_IGNORED:,} more", "ignored", "", "")
    return table


def document(published: Published) -> dict[str, Any]:
    """For a script: what was published, and the figures of every network that was fitted, on the test rows."""
    kept = {"name", "version", "num_samples", "seed", "stochastic_layers", "metrics", "training_data", "training"}
    manifest = published.manifest
    features = [feature for item in manifest.inputs for feature in item.features or ()]
    return manifest.model_dump(mode="json", include=kept | {"members"}) | {
        "task": manifest.outputs[0].task,
        "labels": manifest.outputs[0].labels,
        "columns": [feature.model_dump(mode="json", include={"name", "kind", "nullable"}) for feature in features],
        "ignored_columns": dict(published.ignored),
        "folder": str(published.folder),
        "bento_tag": published.bento_tag,
        "variants": [variant.summary() for variant in published.variants],
        "mc_metrics": published.mc_metrics,
        "constant_metrics": published.constant_metrics,
        "collapsed": published.collapsed > 0,
        "collapsed_networks": published.collapsed,
    }


def sentences(published: Published) -> str:
    """For a person, before the table."""
    manifest, data = published.manifest, published.training_data
    lines = findings.sentences(manifest.calibration) if manifest.calibration is not None else []
    calibration = "".join(f"  {line}\n" for line in lines)
    warning = ""
    if published.collapsed:
        which, answers = "The network has", "it answers"
        if manifest.members > 1:
            several = published.collapsed > 1
            which = f"{published.collapsed} of the {manifest.members} networks {'have' if several else 'has'}"
            answers = "they answer" if several else "it answers"
        warning = (
            f"{which} collapsed: {answers} the same to every row. Wanted lower rates, a lower learning rate or another "
            "--seed.\n"
        )
    members = ""
    if manifest.members > 1:
        members = f"An ensemble of {manifest.members} networks: they draw in turn; dropout off, their mean answers.\n"
    return warning + (
        f"Published {manifest.name} {manifest.version} in {published.folder}, "
        f"and in BentoML's store as {published.bento_tag}.\n"
        f"{members}"
        f"{counted(data.train_rows, 'row')} trained it, {data.calibration_rows:,} calibrate it, "
        f"{data.test_rows:,} test it.\n"
        f"{calibration}"
    )


def table(published: Published) -> Table:
    """For a person: one row a network; the published one first, with dropout off and as the mean of its draws.

    The last row is what knowing nothing of the inputs gives: a collapsed network is seen at once.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("dropout in")
    table.add_column("visible", justify="right")
    table.add_column("hidden", justify="right")
    table.add_column("in the test")
    for metric in published.mc_metrics:
        table.add_column(metric, justify="right")
    rows = published.training_data.test_rows
    for number, variant in enumerate(published.variants):
        described = (variant.name, f"{variant.recipe.visible_dropout:g}", f"{variant.recipe.hidden_dropout:g}")
        table.add_row(*described, "off", *figures(variant.metrics, rows))
        if number == 0:
            draws = counted(published.manifest.num_samples, "draw")
            table.add_row(*described, draws, *figures(published.mc_metrics, rows))
    table.add_row("(a constant answer)", "", "", "", *figures(published.constant_metrics, rows))
    return table


def figures(metrics: dict[str, float], rows: int) -> list[str]:
    """Metrics to three digits; an accuracy with its standard error, so that nobody reads noise as a difference."""
    return [
        f"{value:.3f} ± {share_error(value, rows):.3f}" if metric == "accuracy" else f"{value:.3g}"
        for metric, value in metrics.items()
    ]
