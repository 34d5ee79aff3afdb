"""Training many small nets at once against the loop of Keras fits; tuned dropout against scikit-learn.

    python -m benchmarks.training search [--keras-fits 2]    10 folds x 8 rates x 300 epochs on Sonar: seconds, ratio
    python -m benchmarks.training study [--repeats 10]       five variants x 10 folds on Sonar: seconds
    python -m benchmarks.training protocols [--repeats 1]    the tutorial's three protocols on Sonar
    python -m benchmarks.training sonar [--repeats 1]        the best that is reachable on Sonar, nested
    python -m benchmarks.training peers [--data wine]        nested folds, against the best of four scikit-learn models
    python -m benchmarks.training ensembles                  one net against five that take turns, with as many draws
    python -m benchmarks.training images [--side 28]         convolutional nets as a stack, and one by one
    python -m benchmarks.training table [--rows 1000000]     memory that a Parquet file of 30 columns takes to train

Each ends with a line for what it is held to: met or missed.

The Keras side of `search` is measured on a few whole fits and scaled to 80, and so says the output.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from models.contract import DEFAULT_SEED
from training.datasets import Dataset, load
from training.paired import corrected_interval
from training.recipes import DEFAULTS, Recipe, recipe

FOLDS = 10
RATES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
# Brownlee's tutorial: mean and standard deviation over ten folds, in per cent.
PUBLISHED = {"baseline": (86.04, 4.58), "visible": (83.52, 7.68), "hidden": (83.59, 7.31)}
PEERS = ("breast_cancer", "wine", "digits")
# What is held to.
FASTER, STUDY_S, TUNED_ACCURACY, TABLE_GB = 100, 120.0, 0.88, 4.0
# Per cent: where the tutorial's settings should come out, from one ten-fold run each.
SPAN = {"baseline": (86.0, 87.0), "visible": (83.0, 85.0), "hidden": (83.0, 85.0)}
# Data sets with dense nets and classes, the nets of each, and how many of them an ensemble has.
STACKED = ("sonar", "breast_cancer", "wine")
NETS, MEMBERS = 100, 5

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)


@app.command()
def search(
    keras_fits: Annotated[int, typer.Option(min=1, help="Whole Keras fits to time; the rest is scaled.")] = 2,
) -> None:
    """Every rate on the visible layer, ten folds each: ours all at once, Keras one after another."""
    from training.cores import one_thread_an_operation
    from training.folds import Job, fit_jobs, repeated_folds

    one_thread_an_operation()
    data = load("sonar")
    recipes = [recipe("sonar", visible_dropout=rate, hidden_dropout=0.0) for rate in RATES]
    splits = repeated_folds(data.y, data.task, folds=FOLDS, repeats=1, seed=DEFAULT_SEED)
    cells = [(one, train, test) for one in recipes for train, test in splits]

    start, cpu = time.perf_counter(), time.process_time()
    jobs = [Job(one, train, test, seed=number % FOLDS) for number, (one, train, test) in enumerate(cells)]
    outcomes = fit_jobs(data, jobs)
    ours, ours_cpu = time.perf_counter() - start, time.process_time() - cpu
    right = [accuracy(outcome.answer, data, test) for outcome, (_, _, test) in zip(outcomes, cells, strict=True)]

    # Spread over the rates.
    timed = [number * len(cells) // keras_fits for number in range(keras_fits)]
    start, cpu = time.perf_counter(), time.process_time()
    theirs = [keras_fit(data, *cells[number]) for number in timed]
    share = len(cells) / len(timed)
    keras, keras_cpu = (time.perf_counter() - start) * share, (time.process_time() - cpu) * share

    print(f"80 fits of 300 epochs, load average before {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores")
    print(f"ours, compilation included: {ours:.1f} s, {ours_cpu:.1f} s of CPU")
    print(f"Keras, {len(timed)} fits measured and scaled to 80: {keras:.0f} s, {keras_cpu:.0f} s of CPU")
    print(f"ratio: {keras / ours:.0f}, of CPU time {keras_cpu / ours_cpu:.0f}")
    verdict(
        f"at least {FASTER} times faster than the loop of Keras fits", keras / ours >= FASTER, f"{keras / ours:.0f}"
    )
    table = Table("visible rate", "accuracy (deviation over folds)", box=None, pad_edge=False)
    for number, rate in enumerate(RATES):
        own = np.array(right[number * FOLDS : (number + 1) * FOLDS])
        table.add_row(f"{rate:g}", f"{100 * own.mean():.2f} % ({100 * own.std():.2f})")
    Console().print(table)
    pairs = ", ".join(f"{100 * right[at]:.1f} / {100 * other:.1f}" for at, other in zip(timed, theirs, strict=True))
    print(f"accuracy of the fits that both made, ours / Keras's, in per cent: {pairs}")


@app.command()
def protocols(repeats: Annotated[int, typer.Option(min=1, help="Ten-fold cross-validations.")] = 1) -> None:
    """Baseline, dropout on the visible layer, dropout on the hidden layers, as the tutorial has them."""
    from training.folds import Job, fit_jobs, repeated_folds
    from training.study import variants

    data = load("sonar")
    splits = repeated_folds(data.y, data.task, folds=FOLDS, repeats=repeats, seed=DEFAULT_SEED)
    named = {name: one for name, one in variants(DEFAULTS["sonar"]).items() if name in PUBLISHED}
    jobs = [Job(one, *split, seed=number) for one in named.values() for number, split in enumerate(splits)]
    outcomes = fit_jobs(data, jobs)
    right = np.array(
        [accuracy(outcome.answer, data, job.held_out) for job, outcome in zip(jobs, outcomes, strict=True)]
    )
    table = Table("protocol", "accuracy (deviation over folds)", "95 % interval", "published", box=None, pad_edge=False)
    grouped = dict(zip(named, right.reshape(len(named), -1), strict=True))
    for name, own in grouped.items():
        published = "{:.2f} % ({:.2f})".format(*PUBLISHED[name])
        table.add_row(name, f"{100 * own.mean():.2f} % ({100 * own.std():.2f})", span(own, FOLDS), published)
    Console().print(table)
    for name, own in grouped.items():
        low, high = SPAN[name]
        found = corrected_interval(100 * own, 1 / (FOLDS - 1))
        verdict(
            f"{name}: {low:g} to {high:g} %, within the interval of what is found",
            found.lower <= high and found.upper >= low,
            f"{100 * own.mean():.2f} %",
        )


@app.command()
def study(
    repeats: Annotated[int, typer.Option(min=1, help="Ten-fold cross-validations.")] = 10,
) -> None:
    """Baseline, visible, hidden, both, and the tuned level chosen within each fold."""
    from training.cores import one_thread_an_operation
    from training.study import study as carry_out

    one_thread_an_operation()
    start, cpu = time.perf_counter(), time.process_time()
    found = carry_out(load("sonar"), DEFAULTS["sonar"], folds=FOLDS, repeats=repeats, seed=DEFAULT_SEED)
    took, took_cpu = time.perf_counter() - start, time.process_time() - cpu
    for variant in found.figures:
        print(f"{variant}: {span(found.figures[variant]['deterministic']['accuracy'], FOLDS)}")
    print(f"{took_cpu:.0f} s of CPU, load average {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores")
    verdict(f"{repeats} x {FOLDS} folds x 5 variants in under {STUDY_S:g} s", took < STUDY_S, f"{took:.0f} s")


@app.command()
def sonar(repeats: Annotated[int, typer.Option(min=1, help="Ten-fold cross-validations.")] = 1) -> None:
    """The recipe chosen anew within each fold, from wider nets too; ensembles of it; scikit-learn's SVC beside it."""
    from benchmarks.sonar import ENSEMBLE, nested, support_vectors

    data = load("sonar")
    found = nested(data, repeats=repeats, seed=DEFAULT_SEED, on_step=lambda what: print(what, flush=True))
    ways = found.accuracy | {"RBF SVC, C tuned": support_vectors(data, repeats=repeats, seed=DEFAULT_SEED)}
    table = Table("nested", "accuracy", "95 % interval", box=None, pad_edge=False)
    for way, own in ways.items():
        table.add_row(way, f"{100 * own.mean():.2f} %", span(own, FOLDS))
    Console().print(table)
    for chosen, folds in sorted(found.chosen.items(), key=lambda item: -item[1]):
        widths = "-".join(map(str, chosen.hidden_units))
        print(
            f"chosen in {folds} folds: {widths}, visible {chosen.visible_dropout:g}, hidden {chosen.hidden_dropout:g}"
        )
    # Fixed beforehand: what `tune` with an ensemble would publish. The best of the ways would be chosen by test rows.
    mean = float(found.accuracy[ENSEMBLE].mean())
    verdict(f"at least {TUNED_ACCURACY:.0%}, nested", mean >= TUNED_ACCURACY, f"{100 * mean:.2f} % ({ENSEMBLE})")


@app.command()
def table(rows: Annotated[int, typer.Option(min=1000, help="Of the file.")] = 1_000_000) -> None:
    """`dropserve train` on a made Parquet file: 27 columns of numbers and three of texts, one pass over the rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    generator = np.random.default_rng(0)
    columns: dict[str, Any] = {f"n{i}": generator.normal(size=rows).astype(np.float32) for i in range(27)}
    words = np.array([f"town {i}" for i in range(50)])
    columns |= {f"t{i}": words[generator.integers(0, 50, rows)] for i in range(3)}
    columns["y"] = np.where(columns["n0"] + columns["n1"] > generator.normal(size=rows), "yes", "no")
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.table(columns), Path(folder) / "table.parquet")
        command = [sys.executable, str(Path(__file__).parents[1] / "dropserve.py"), "train", "table.parquet"]
        start = time.perf_counter()
        subprocess.run([*command, "--target", "y", "--epochs", "1"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        took = time.perf_counter() - start
    # Kilobytes on Linux, of the greatest child.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    print(f"{rows:,} rows of 30 columns, one pass: {took:.0f} s")
    verdict(f"peak resident memory under {TABLE_GB:g} GB", peak < TABLE_GB, f"{peak:.2f} GB")


@app.command()
def ensembles(
    draws: Annotated[int, typer.Option(min=MEMBERS, help="Of one net, and of five together.")] = 100,
) -> None:
    """A hundred nets with dropout, one by one and as twenty ensembles of five: test NLL, dropout off and with draws."""
    from training import replicas, scores
    from training.folds import encode
    from training.splits import split

    table = Table("data", "answer", "NLL, nats", "better than", "accuracy", title=f"{MEMBERS} members, {draws} draws")
    for name in STACKED:
        data = load(name)
        rows = split(data.y, data.task)
        encoded, _, groups = encode(data, [rows.train] * NETS)
        chosen = recipe(name)
        stack = [replicas.Replica(chosen, rows.train, groups[seed], seed) for seed in range(NETS)]
        start = time.perf_counter()
        trained = replicas.train_stack(encoded, stack)
        seconds = time.perf_counter() - start
        test = [rows.test] * NETS
        # [nets, draws, rows, outputs].
        drawn, plain = np.stack(trained.draws(test, draws)), np.stack(trained.predict(test))
        own = draws // MEMBERS
        answers = {
            "one net, dropout off": plain,
            f"one net, {draws} draws": drawn.mean(axis=1),
            f"{MEMBERS} nets, dropout off": _of_members(plain),
            f"{MEMBERS} nets, {own} draws each": _of_members(drawn[:, :own].mean(axis=1)),
        }
        singles: Any = None
        for answer, outputs in answers.items():
            found = [_scored(one.astype(np.float64), data.y[rows.test], scores.classification) for one in outputs]
            nll, accuracy_ = np.array([(one["nll"], one["accuracy"]) for one in found]).T
            singles = nll if answer.startswith("one net") else singles
            share = "" if answer.startswith("one net") else f"{np.mean(singles[:, None] > nll[None]):.0%}"
            table.add_row(name, answer, f"{nll.mean():.3f} ± {nll.std(ddof=1):.3f}", share, f"{accuracy_.mean():.3f}")
        print(f"{name}: {NETS} nets trained together in {seconds:.1f} s, {len(rows.test)} test rows")
    Console().print(table)
    print("± is the standard deviation over the nets, or ensembles; the share: of the nets with draws that it beats")


@app.command()
def images(
    members: Annotated[int, typer.Option(min=2, max=50, help="Of the ensemble.")] = 5,
    side: Annotated[
        int, typer.Option(min=8, max=64, help="Pixels: the digits are enlarged by nearest neighbours.")
    ] = 8,
    epochs: Annotated[int, typer.Option(min=1)] = 40,
) -> None:
    """An ensemble of the digits' convolutional net: one stack against one Keras fit after another."""
    from dataclasses import replace

    from training.ensemble import fit_members
    from training.splits import split

    data = load("digits")
    nearest = np.arange(side) * data.x.shape[1] // side
    data = replace(data, x=data.x[:, nearest][:, :, nearest])
    rows, chosen = split(data.y, data.task), recipe("digits", epochs=epochs)

    def fitted(most_encoded_bytes: int) -> tuple[float, float]:
        """Seconds of processor time, and the ensemble's accuracy on the test rows."""
        start = time.process_time()
        found = fit_members(data, rows.train, chosen, members, seed=DEFAULT_SEED, most_encoded_bytes=most_encoded_bytes)
        took = time.process_time() - start
        return took, accuracy(np.asarray(found.model(data.x[rows.test])), data, rows.test)

    # TensorFlow's own start is in neither.
    fit_members(data, rows.train, recipe("digits", epochs=1), 2, seed=DEFAULT_SEED, most_encoded_bytes=0)
    (theirs, their_accuracy), (ours, our_accuracy) = fitted(0), fitted(2**31)
    print(f"{members} nets on {len(rows.train)} images of {side} x {side} pixels, {epochs} epochs; s of processor time")
    print(f"one Keras fit after another: {theirs:.1f} s, test accuracy {100 * their_accuracy:.2f} %")
    print(f"as stacks, compilation included: {ours:.1f} s, {100 * our_accuracy:.2f} %; ratio {theirs / ours:.2f}")


def _of_members(answers: np.ndarray) -> np.ndarray:
    """The mean of each five: [nets, ...] -> [nets / 5, ...]."""
    return answers.reshape(-1, MEMBERS, *answers.shape[1:]).mean(axis=1)


def _scored(answer: np.ndarray, y: np.ndarray, score: Any) -> Any:
    """answer [rows, outputs]."""
    return score(np.hstack([1 - answer, answer]) if answer.shape[1] == 1 else answer, y)


@app.command()
def peers(
    data: Annotated[list[str], typer.Option(help="Data sets.")] = list(PEERS),  # noqa: B006
    folds: Annotated[int, typer.Option(min=2, help="Outer folds; three within each.")] = 5,
) -> None:
    """Accuracy on outer folds: our tuned net, its mean of draws, and scikit-learn's models, each tuned within."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import GridSearchCV

    # 300 epochs are what the MLP gets, as ours has its own.
    warnings.simplefilter("ignore", ConvergenceWarning)
    from training.folds import repeated_folds
    from training.study import study

    table = Table("data", "model", "accuracy", "standard error", box=None, pad_edge=False)
    findings = []
    for name in data:
        rows = load(name)
        found = study(rows, DEFAULTS[name], folds=folds, repeats=1, seed=DEFAULT_SEED)
        scores = {
            "ours, dropout off": found.figures["tuned"]["deterministic"]["accuracy"],
            "ours, mean of draws": found.figures["tuned"]["monte_carlo"]["accuracy"],
        }
        # Fixed beforehand: the better of the two would have been chosen by the test rows.
        ours = "ours, mean of draws"
        splits = repeated_folds(rows.y, rows.task, folds=folds, repeats=1, seed=DEFAULT_SEED)
        x = rows.x.reshape(len(rows.x), -1)
        for model, (estimator, grid) in estimators().items():
            searched = GridSearchCV(estimator, grid, cv=3)
            scores[model] = np.array([searched.fit(x[a], rows.y[a]).score(x[b], rows.y[b]) for a, b in splits])
            # It takes minutes.
            print(f"{name}: {model} {scores[model].mean():.4f}", flush=True)
        for model, own in scores.items():
            table.add_row(name, model, f"{own.mean():.4f}", f"{error(own):.4f}")
        best = max((model for model in scores if "ours" not in model), key=lambda model: scores[model].mean())
        gap, allowed = scores[best].mean() - scores[ours].mean(), error(scores[best])
        found_both = f"{scores[ours].mean():.4f}, {best} {scores[best].mean():.4f} ± {allowed:.4f}"
        findings.append(
            (f"{name}: within one standard error of scikit-learn's best, or above", gap <= allowed, found_both)
        )
    Console().print(table)
    for finding in findings:
        verdict(*finding)


def estimators() -> dict[str, tuple[Any, dict[str, list[Any]]]]:
    """scikit-learn's models and the grids that they are tuned on."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    def scaled(estimator: Any) -> Any:
        return make_pipeline(StandardScaler(), estimator)

    return {
        "logistic regression": (
            scaled(LogisticRegression(max_iter=2000)),
            {"logisticregression__C": [0.01, 0.1, 1.0, 10.0]},
        ),
        "MLP": (
            scaled(MLPClassifier(max_iter=300, early_stopping=False, random_state=0)),
            {"mlpclassifier__alpha": [1e-4, 1e-2, 1.0]},
        ),
        "RBF SVC": (scaled(SVC()), {"svc__C": [1.0, 10.0, 100.0]}),
        "gradient boosting": (HistGradientBoostingClassifier(random_state=0), {"max_leaf_nodes": [7, 31]}),
    }


def verdict(wanted: str, is_met: bool, found: str) -> None:
    print(f"{'met   ' if is_met else 'MISSED'}  {wanted}: {found}")


def span(values: Any, folds: int) -> str:
    """Corrected 95 % interval of the mean of accuracies, one a fold."""
    found = corrected_interval(100 * np.asarray(values), 1 / (folds - 1))
    return f"{found.mean:.2f} % ({found.lower:.2f} to {found.upper:.2f})"


def accuracy(answer: Any, data: Dataset, rows: Any) -> float:
    return float(np.mean(answer.argmax(axis=1) == data.y[rows]))


def error(values: Any) -> float:
    """Standard error of the mean over folds."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def keras_fit(data: Dataset, chosen: Recipe, train: Any, test: Any) -> float:
    """One fit as a tutorial has it; returns the accuracy on the test rows."""
    import keras

    mean, deviation = data.x[train].mean(axis=0), data.x[train].std(axis=0)
    layers: list[Any] = [keras.Input([data.x.shape[1]]), keras.layers.Dropout(chosen.visible_dropout)]
    for units in chosen.hidden_units:
        bound = None if chosen.max_norm is None else keras.constraints.MaxNorm(chosen.max_norm)
        layers.append(keras.layers.Dense(units, activation="relu", kernel_constraint=bound))
    model = keras.Sequential([*layers, keras.layers.Dense(1, activation="sigmoid")])
    model.compile(keras.optimizers.SGD(chosen.learning_rate, momentum=chosen.momentum), "binary_crossentropy")
    x = (data.x - mean) / deviation
    model.fit(x[train], data.y[train], epochs=chosen.epochs, batch_size=chosen.batch_size, verbose=0)
    answer = np.asarray(model(x[test]))
    return float(np.mean((answer[:, 0] > 0.5) == data.y[test]))


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    app()
