"""What `dropserve train` says of the network that it publishes: the sections of its report.html.

Everything is computed from the artifact's own signatures, as a server would answer, on test rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray
from scipy.stats import fisher_exact
from sklearn.metrics import confusion_matrix

from models.contract import MC_DRAWS, MIN_NUM_SAMPLES, NUM_SAMPLES, SEED, TrainingData, listed, visible
from models.sampling import some
from training import trust_sections
from training.artifact_answers import Artifact
from training.assessment import assess
from training.comparison import Variant
from training.datasets import Dataset
from training.evaluation import figures
from training.held_out import HeldOut
from training.report import COLOURS, LINES, Figure, Grid, Section, draw, page
from training.scores import share_error
from training.splits import Split

Array = NDArray[Any]

# Test rows that are looked at one by one: at most.
MAX_ROWS = 2_000
# Rows in each of the tables of the most and the least certain.
SHOWN_ROWS = 5
# Draws of the figure that shows how the answer settles.
MOST_DRAWS = 1_000
# Classes whose confusion matrix has its numbers written in.
MAX_WRITTEN_CLASSES = 12
# Of Fisher's exact test: the greatest chance of a difference that is called one.
SIGNIFICANT = 0.05
# Columns of a table that are listed.
MAX_COLUMNS = 100


@dataclass(frozen=True)
class Evidence:
    """What a report is made of."""

    name: str
    data: Dataset
    rows: Split
    # The published network first, then those set beside it.
    variants: Sequence[Variant]
    constant_metrics: dict[str, float]
    training_data: TrainingData
    num_samples: int
    # Of the draws, not of the training.
    seed: int
    training_seed: int
    # Networks of the ensemble; 1: none.
    members: int = 1


@dataclass(frozen=True)
class Drawn:
    """The artifact's own answers to test rows."""

    # Row numbers in the data.
    rows: NDArray[np.int64]
    # Outputs of `mc_predict`, [n, ...] by name.
    outputs: dict[str, Array]
    # Draws of three rows, the most certain, one in the middle, the least certain: [3, T], the probability of the class
    # that is named, or the value.
    draws: Array
    # The number of each of the three among `rows`.
    drawn: list[int]

    @property
    def is_classification(self) -> bool:
        return "probabilities" in self.outputs

    @property
    def doubt(self) -> Array:
        """[n] what rows are ordered by: nats of predictive entropy, or a standard deviation in the target's unit."""
        if self.is_classification:
            return self.outputs["predictive_entropy"]
        return self.outputs["std"] if "std" in self.outputs else self.outputs["epistemic_std"]


def html(evidence: Evidence, artifact: Artifact, more: Sequence[Section] = ()) -> str:
    """The page for the artifact; `more` stands before the data and settings."""
    drawn = draw_rows(evidence, artifact)
    more = [*trust(evidence, drawn, artifact), *more]
    *first, last = sections(evidence, drawn)
    subtitle = f"{evidence.data.task} of {evidence.data.target} · {evidence.data.name} · {evidence.num_samples} draws"
    return page(f"{evidence.name}: how far to trust it", subtitle, [*first, *more, last])


def draw_rows(evidence: Evidence, artifact: Artifact) -> Drawn:
    """Ask the artifact about test rows."""
    data, rows = evidence.data, some(evidence.rows.test, MAX_ROWS)
    outputs = artifact.served(data.tensors(rows))
    drawn = Drawn(rows, outputs, np.zeros((0, 0)), [])
    order = np.argsort(drawn.doubt, kind="stable")
    chosen = [int(order[0]), int(order[len(order) // 2]), int(order[-1])]
    scalars = {
        NUM_SAMPLES: tf.constant(max(MOST_DRAWS, evidence.num_samples)),
        SEED: tf.constant(evidence.seed, tf.int64),
    }
    inputs = {name: tf.constant(values) for name, values in data.tensors(rows[chosen]).items()}
    draws = artifact.signatures[MC_DRAWS](**inputs, **scalars)["draws"].numpy().astype(np.float64)
    if drawn.is_classification:
        named = outputs["probabilities"][chosen].argmax(axis=1)
        draws = draws[np.arange(len(chosen)), :, named]
    return Drawn(rows, outputs, draws, chosen)


def trust(evidence: Evidence, drawn: Drawn, artifact: Artifact) -> list[Section]:
    """What `dropserve evaluate` says of the same rows."""
    data = evidence.data
    y = data.y[drawn.rows].astype(np.int64 if drawn.is_classification else np.float64)
    described = f"{len(drawn.rows):,} test rows"
    held = HeldOut(data.name, described, data.tensors(drawn.rows), [y])
    [judged] = assess(artifact, held)
    return trust_sections.sections(judged, held.rows)


def sections(evidence: Evidence, drawn: Drawn) -> list[Section]:
    """The report's sections in order, the data and settings last."""
    return [
        Section("In plain words", paragraphs=[plain_words(evidence, drawn)]),
        results(evidence, drawn),
        learning_curves(evidence),
        errors(evidence, drawn),
        certainty(evidence, drawn),
        convergence(evidence, drawn),
        settings(evidence),
    ]


def plain_words(evidence: Evidence, drawn: Drawn) -> str:
    """One paragraph for somebody who will never read the rest; it claims no difference that the rows do not show."""
    data, count = evidence.data, len(evidence.rows.test)
    metrics, constant = evidence.variants[0].metrics, evidence.constant_metrics
    count_trained = f"{evidence.training_data.train_rows:,} rows of {data.name}"
    said = [f"This network was trained on {count_trained} to "]
    if evidence.members > 1:
        said = [f"These {evidence.members} networks answer together, and were each trained on {count_trained} to "]
    half = len(drawn.rows) // 2
    order = np.argsort(drawn.doubt, kind="stable")
    certain, uncertain = order[:half], order[len(order) - half :]
    if data.task == "classification":
        classes = f"{len(data.labels)} classes" if len(data.labels) > 5 else listed(data.labels)
        accuracy = metrics["accuracy"]
        said.append(
            f"tell {data.target} ({classes}). Of {count:,} test rows that it never saw it gets "
            f"{percent(accuracy)} right (give or take {percent(share_error(accuracy, count))}), where always "
            f"naming the commonest class gets {percent(constant['accuracy'])}. "
        )
        right = right_rows(data, drawn)
        high, low = right[certain].mean(), right[uncertain].mean()
        said.append(
            "Does it know when it is guessing? In the half of the rows of which it is most certain, "
            f"{percent(high)} are right; in the other half, {percent(low)}. "
        )
        gap = high - low
        counts = [[int(right[chosen].sum()), int((~right[chosen]).sum())] for chosen in (certain, uncertain)]
        is_shown = fisher_exact(counts).pvalue < SIGNIFICANT
    else:
        said.append(
            f"predict {data.target}. On {count:,} test rows that it never saw it is off by {metrics['mae']:.3g} on "
            f"average (root mean square {metrics['rmse']:.3g}), where always naming the training mean is off by "
            f"{constant['mae']:.3g} ({constant['rmse']:.3g}). "
        )
        off = np.abs(residuals(data, drawn))
        high, low = off[certain].mean(), off[uncertain].mean()
        said.append(
            f"Does it know when it is guessing? In the half of the rows of which it is most certain it is off by "
            f"{high:.3g}; in the other half, by {low:.3g}. "
        )
        gap = low - high
        is_shown = half > 1 and abs(gap) > 2 * math.hypot(
            *(off[chosen].std(ddof=1) / math.sqrt(half) for chosen in (certain, uncertain))
        )
    if is_shown and gap > 0:
        said.append("So its doubt is worth listening to. ")
    elif is_shown:
        said.append("So its doubt points the wrong way here: do not rely on it. ")
    else:
        said.append("That is no difference that so few rows could show: its doubt is not proven to say much here. ")
    said.append(overfitting(evidence.variants[0]))
    return "".join(said)


def overfitting(variant: Variant) -> str:
    """What the held-out curve says of the number of epochs, smoothed: the lowest point of a noisy one is luck."""
    if not np.isfinite(variant.held_out_losses).all():
        return "The loss on held-out rows was no number in some epochs."
    window = max(1, len(variant.held_out_losses) // 20)
    curve = np.convolve(variant.held_out_losses, np.full(window, 1 / window), mode="valid")
    best, lowest = int(curve.argmin()), curve.min()
    if best >= 0.9 * len(curve) or curve[-1] <= lowest + 0.05 * abs(lowest):
        return "The loss on held-out rows had not risen by the end of the training."
    return (
        f"The loss on held-out rows was lowest around epoch {best + 1 + window // 2} of {len(variant.held_out_losses)} "
        f"({lowest:.3g}) and {curve[-1]:.3g} at the end: it was trained for too long, or with too little dropout."
    )


def results(evidence: Evidence, drawn: Drawn) -> Section:
    data, count = evidence.data, len(evidence.rows.test)
    answer = drawn.outputs["probabilities" if drawn.is_classification else "mean"]
    first = evidence.variants[0]

    def described(variant: Variant) -> list[str]:
        return [variant.name, f"{variant.recipe.visible_dropout:g}", f"{variant.recipe.hidden_dropout:g}"]

    rows = [[*described(variant), "off", *shown(variant.metrics, count)] for variant in evidence.variants]
    of_draws = shown(figures(answer, data, drawn.rows), len(drawn.rows))
    drawn_row = [*described(first), f"{evidence.num_samples} draws", *of_draws]
    constant = ["(a constant answer)", "", "", "", *shown(evidence.constant_metrics, count)]
    note = {
        "classification": "nll is the mean negative log-likelihood in nats, brier the squared error summed over the "
        "classes: less is better. An accuracy has its standard error beside it; differences of less than two of them "
        "are none.",
        "regression": f"rmse and mae are in the unit of {data.target}: less is better.",
    }[data.task]
    few = f" Draws are judged on the first {len(drawn.rows):,} of them." if len(drawn.rows) < count else ""
    grid = Grid(
        ["dropout in", "visible", "hidden", "in the test", *first.metrics],
        [rows[0], drawn_row, *rows[1:], constant],
        f"On {count:,} test rows, which neither training nor calibration saw.{few}",
    )
    return Section("Results", paragraphs=[note], grids=[grid])


def learning_curves(evidence: Evidence) -> Section:
    """Training and held-out loss of the published network, and beside it of the others."""

    def on(canvas: Canvas) -> None:
        axes = canvas.subplots(1, len(evidence.variants), sharey=True, squeeze=False)[0]
        for number, (axis, variant) in enumerate(zip(axes, evidence.variants, strict=True)):
            epochs = np.arange(1, len(variant.losses) + 1)
            axis.plot(epochs, variant.losses, label="training rows, dropout on")
            axis.plot(epochs, variant.held_out_losses, label="held-out rows, dropout off")
            axis.set_xlabel("epoch")
            if len(axes) > 1:
                axis.set_title(variant.name)
            if number == 0:
                axis.set_ylabel("loss")
                canvas.legend(loc="outside upper left", ncols=2)
        limits = loss_limits([loss for one in evidence.variants for loss in (*one.losses, *one.held_out_losses)])
        if limits is not None:
            axes[0].set_ylim(*limits)

    caption = "Loss after each epoch, in squared standard deviations of the target."
    if evidence.data.task == "classification":
        caption = "Loss after each epoch, in nats."
    elif evidence.variants[0].recipe.heteroscedastic:
        caption = "Loss after each epoch: beta-NLL of the target in its standard deviations, which may be below 0."
    return Section(
        "Learning curves",
        paragraphs=[
            "The held-out rows are those kept for calibration; they had no say in the training. Where their curve "
            "turns upwards while the other falls, the network learns its training rows by heart. With dropout the "
            "training curve may lie above the other: it is taken with a part of the network switched off."
        ],
        figures=[draw(caption, on)],
    )


def loss_limits(losses: Sequence[float]) -> tuple[float, float] | None:
    """The loss axis: from 0, or from below the least loss where that is less, to above nearly all of them.

    None where the losses that are finite have no range.
    """
    finite = np.array(losses)[np.isfinite(losses)]
    if not len(finite):
        return None
    least, most = min(0.0, float(finite.min())), float(np.quantile(finite, 0.99))
    if most <= least:
        return None
    margin = 0.1 * (most - least)
    return least - margin if least < 0 else least, most + margin


def errors(evidence: Evidence, drawn: Drawn) -> Section:
    data = evidence.data
    if not drawn.is_classification:
        return Section("Residuals", figures=[residual_figure(data, drawn)])
    truth, named = data.y[drawn.rows], drawn.outputs["probabilities"].argmax(axis=1)
    counts = confusion_matrix(truth, named, labels=np.arange(len(data.labels)))

    def on(canvas: Canvas) -> None:
        axis = canvas.subplots()
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if len(counts) <= MAX_WRITTEN_CLASSES:
            for (row, column), count in np.ndenumerate(counts):
                dark = shares[row, column] > 0.5
                axis.text(column, row, f"{count}", ha="center", va="center", color="white" if dark else "black")
            axis.set_xticks(range(len(counts)), data.labels, rotation=45 if max(map(len, data.labels)) > 6 else 0)
            axis.set_yticks(range(len(counts)), data.labels)
        axis.set_xlabel("named")
        axis.set_ylabel("true")

    side = min(2.4 + 0.35 * len(counts), 5.5)
    caption = f"Rows of each true class by the class that the mean of {evidence.num_samples} draws names."
    return Section("Confusion matrix", figures=[draw(caption, on, width=6.6, height=side)])


def residual_figure(data: Dataset, drawn: Drawn) -> Figure:
    mean, off = drawn.outputs["mean"], residuals(data, drawn)

    def on(canvas: Canvas) -> None:
        left, right = canvas.subplots(1, 2)
        left.scatter(mean, data.y[drawn.rows], s=9, alpha=0.6, linewidths=0)
        ends = [min(mean.min(), data.y[drawn.rows].min()), max(mean.max(), data.y[drawn.rows].max())]
        left.plot(ends, ends, color="black", linestyle=":", linewidth=1)
        left.set_xlabel(f"predicted {data.target}")
        left.set_ylabel(f"true {data.target}")
        right.scatter(drawn.doubt, np.abs(off), s=9, alpha=0.6, linewidths=0, color=COLOURS[1])
        right.set_xlabel("standard deviation of the answer")
        right.set_ylabel("size of the error")

    return draw("Left: truth against prediction. Right: the size of the error against the reported doubt.", on)


def certainty(evidence: Evidence, drawn: Drawn) -> Section:
    """Tables of the rows of which the network is most and least certain, and for images the images."""
    order = np.argsort(drawn.doubt, kind="stable")
    count = min(SHOWN_ROWS, len(order) // 2)
    least, most = order[::-1][:count], order[:count]
    headings = ["row", f"true {evidence.data.target}", "answer"]
    headings += ["its probability", "entropy", "mutual information"] if drawn.is_classification else ["std", "error"]
    grids = [
        Grid(headings, [described(evidence.data, drawn, int(number)) for number in chosen], caption)
        for chosen, caption in ((least, "Least certain test rows."), (most, "Most certain test rows."))
    ]
    shown_images = [] if evidence.data.columns else [images(evidence.data, drawn, least, most)]
    text = "Rows are numbered from 1 in the order of the data."
    if drawn.is_classification:
        text += (
            " Entropy is all of the doubt, in nats; mutual information is the part of it in which the draws disagree, "
            "which more data of the kind could remove."
        )
    return Section("The least and the most certain rows", [text], shown_images, grids)


def described(data: Dataset, drawn: Drawn, number: int) -> list[str]:
    row = drawn.rows[number]
    if not drawn.is_classification:
        mean = drawn.outputs["mean"][number]
        values = (data.y[row], mean, drawn.doubt[number], data.y[row] - mean)
        return [str(row + 1), *(f"{value:.4g}" for value in values)]
    probabilities = drawn.outputs["probabilities"][number]
    named = int(probabilities.argmax())
    wrong = "" if named == data.y[row] else " (wrong)"
    return [
        str(row + 1),
        data.labels[data.y[row]],
        data.labels[named] + wrong,
        f"{probabilities[named]:.3f}",
        f"{drawn.outputs['predictive_entropy'][number]:.3f}",
        f"{drawn.outputs['mutual_information'][number]:.3f}",
    ]


def images(data: Dataset, drawn: Drawn, least: Array, most: Array) -> Figure:
    def on(canvas: Canvas) -> None:
        axes = canvas.subplots(2, len(least), squeeze=False)
        for line, chosen in zip(axes, (least, most), strict=True):
            for axis, number in zip(line, chosen, strict=True):
                pixels = data.x[drawn.rows[number]] / data.white
                axis.imshow(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1)
                axis.set_title(described(data, drawn, int(number))[2], fontsize=8)
                axis.axis("off")

    return draw("Above the least certain images, below the most certain ones, each with the answer.", on, height=2.9)


def convergence(evidence: Evidence, drawn: Drawn) -> Section:
    """How the mean settles with the number of draws, for three rows."""
    total = drawn.draws.shape[1]
    # As many as the eye can tell apart on a logarithmic axis.
    steps = np.unique(np.append(np.geomspace(MIN_NUM_SAMPLES, total, 150).astype(int), evidence.num_samples))
    means = np.stack([drawn.draws[:, :step].mean(axis=1) for step in steps], axis=1)
    error = np.stack([drawn.draws[:, :step].std(axis=1, ddof=1) / math.sqrt(step) for step in steps], axis=1)
    names = ("most certain", "in the middle", "least certain")
    what = "probability of the named class" if drawn.is_classification else f"mean of {evidence.data.target}"

    def on(canvas: Canvas) -> None:
        left, right = canvas.subplots(1, 2)
        for number, name in enumerate(names):
            look: dict[str, Any] = {"color": COLOURS[number], "linestyle": LINES[number]}
            left.plot(steps, means[number], label=name, **look)
            low, high = (means[number] + side * 2 * error[number] for side in (-1, 1))
            left.fill_between(steps, low, high, color=COLOURS[number], alpha=0.15, linewidth=0)
            right.plot(steps, error[number], **look)
        for axis in (left, right):
            axis.set_xscale("log")
            axis.set_xlabel("draws")
            axis.axvline(evidence.num_samples, color="black", linewidth=0.8, linestyle=":")
        left.set_ylabel(what)
        if drawn.is_classification:
            left.set_ylim(-0.03, 1.03)
        right.set_ylabel("standard error of it")
        if error.min() > 0:
            right.set_yscale("log")
        left.legend()

    at = int(np.searchsorted(steps, evidence.num_samples))
    worst = float(drawn.outputs["standard_error"].max())
    text = (
        "An answer is a mean over draws, and a mean over few draws is itself uncertain. At the "
        f"{evidence.num_samples} draws of a default answer the standard error is {error[:, at].max():.2g} at most "
        "for the three rows below, and "
        f"{worst:.2g} at most for the {len(drawn.rows):,} test rows; four times the draws halve it."
    )
    caption = "The answer (with two standard errors) and its standard error against draws; dotted, the default number."
    return Section("How the answer settles", [text], [draw(caption, on)])


def settings(evidence: Evidence) -> Section:
    data, described_data = evidence.data, evidence.training_data
    facts = [
        ["data", data.name],
        ["origin", data.attribution],
        ["rows", f"{described_data.rows:,}"],
        ["of them to train / calibrate / test", " / ".join(f"{part:,}" for part in split_sizes(described_data))],
        ["target", data.target],
        ["task", data.task],
        *([["classes", listed(data.labels, len(data.labels))]] if data.labels else []),
        ["SHA-256 of the data", described_data.sha256],
    ]
    recipe = {**asdict(evidence.variants[0].recipe), "training seed": evidence.training_seed}
    if evidence.members > 1:
        recipe["members of the ensemble"] = evidence.members
    recipe |= {"draws": evidence.num_samples, "seed of the draws": evidence.seed}
    return Section(
        "Data and settings",
        grids=[
            Grid(["data", ""], facts),
            Grid(["training", ""], [[key.replace("_", " "), setting(value)] for key, value in recipe.items()]),
            *columns(data, evidence.rows),
        ],
    )


def columns(data: Dataset, rows: Split) -> list[Grid]:
    features = data.features(rows.train)
    if features is None:
        return []
    lines = []
    for feature in features[:MAX_COLUMNS]:
        seen = "" if feature.categories is None else listed(feature.categories, 8)
        if feature.minimum is not None and feature.maximum is not None:
            seen = f"{feature.minimum:g} to {feature.maximum:g} {feature.unit or ''}".strip()
        lines.append([visible(feature.name), f"{feature.kind}, nullable" if feature.nullable else feature.kind, seen])
    lines += [[visible(name), "ignored", reason] for name, reason in data.ignored[:MAX_COLUMNS]]
    more = f" The first {MAX_COLUMNS} of {len(features):,}." if len(features) > MAX_COLUMNS else ""
    if len(data.ignored) > MAX_COLUMNS:
        more += f" Of {len(data.ignored):,} ignored ones the first {MAX_COLUMNS}."
    return [Grid(["column", "type", "in the training rows"], lines, f"Columns.{more}")]


def right_rows(data: Dataset, drawn: Drawn) -> Array:
    return drawn.outputs["probabilities"].argmax(axis=1) == data.y[drawn.rows]


def residuals(data: Dataset, drawn: Drawn) -> Array:
    """[n] truth minus prediction."""
    return data.y[drawn.rows].astype(np.float64) - drawn.outputs["mean"]


def split_sizes(described_data: TrainingData) -> tuple[int, int, int]:
    return described_data.train_rows, described_data.calibration_rows, described_data.test_rows


def setting(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def shown(metrics: dict[str, float], rows: int) -> list[str]:
    """Metrics to three digits; an accuracy in per cent with its standard error."""
    return [
        f"{100 * value:.1f} ± {100 * share_error(value, rows):.1f} %" if name == "accuracy" else f"{value:.3g}"
        for name, value in metrics.items()
    ]


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"
