"""The UCI benchmark: stacked training against Keras, likelihoods against SciPy, a run that is killed and goes on."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.stats import norm

from benchmarks.uci_sets import beyond, comparison, likelihood, protocol, results, sets
from benchmarks.uci_sets.stack import BATCH_SIZE, BETA_NLL, Stack, Stream, thresholds

ROOT = Path(__file__).parents[2]
ROWS, FEATURES, EPOCHS = BATCH_SIZE + 30, 3, 6
RATES = np.array([[0.1, 0.4], [0.0, 0.25]])
DECAY = np.array([1e-3, 0.1])[None, None] * np.ones((2, 2, 1))


def stacked(hidden, head):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, ROWS, FEATURES)).astype(np.float32)
    y = (np.sin(x.sum(axis=2)) + 0.1 * generator.normal(size=(2, ROWS))).astype(np.float32)
    return x, y, Stack(x, y, rates=RATES, decay=DECAY, hidden=hidden, seeds=[[5, 1], [5, 2]], head=head)


def beta_nll(y, output):
    variance = tf.exp(output[:, 1])
    losses = tf.stop_gradient(variance**BETA_NLL) * (output[:, 1] + tf.square(y[:, 0] - output[:, 0]) / variance) / 2
    return tf.reduce_mean(losses)


def keras_alone(x, y, hidden, head, seed, rate, decay):
    """Keras's optimizer, regularizer and gradients, on the batches and masks of the line with this seed."""
    stream, outputs = Stream(seed), 1 if head == "mean" else 2
    widths = [FEATURES, *hidden, outputs]
    inputs = keras.Input([FEATURES])
    masks = [keras.Input([units]) for units in widths[:-1]]
    last = inputs
    for units, mask in zip(widths[1:], masks, strict=True):
        activation = None if units is widths[-1] and mask is masks[-1] else "relu"
        dense = keras.layers.Dense(units, activation=activation, kernel_regularizer=keras.regularizers.L2(decay))
        last = dense(last * mask)
    model = keras.Model([inputs, *masks], last)
    start = []
    for before, units in pairwise(widths):
        start += [stream.glorot(before, units), np.zeros(units)]
    model.set_weights(start)
    model.compile("adam", "mean_squared_error" if head == "mean" else beta_nll)
    limit = thresholds(np.array(rate))
    for _ in range(EPOCHS):
        order = stream.order(ROWS)
        for at in range(0, ROWS, BATCH_SIZE):
            chosen = order[at : at + BATCH_SIZE]
            bits = stream.bits(len(chosen) * sum(widths[:-1]))
            drawn, end = [], 0
            for site, units in enumerate(widths[:-1]):
                begin, end = end, end + len(chosen) * units
                words = bits[begin:end]
                words = words.reshape(-1, units) if site else words.reshape(units, -1).T
                drawn.append(((words >= limit) / (1 - rate)).astype(np.float32))
            model.train_on_batch([x[chosen], *drawn], y[chosen, None])
    return model


@pytest.mark.parametrize(("hidden", "head"), [((5,), "mean"), ((6, 4), "mean"), ((6, 4), "gaussian")])
def test_a_stack_is_each_net_trained_alone_by_keras(hidden, head):
    x, y, stack = stacked(hidden, head)
    before = stack.weights.copy()
    stack.train(EPOCHS)
    for line, rate, precision in [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]:
        at = line, rate, precision
        model = keras_alone(x[line], y[line], hidden, head, [5, line + 1], RATES[line, rate], DECAY[at])
        ours = [
            value.squeeze(0) if bias else value
            for pair in stack.layers(stack.weights[at])
            for bias, value in enumerate(pair)
        ]
        for own, theirs in zip(ours, model.get_weights(), strict=True):
            np.testing.assert_allclose(own, theirs, atol=2e-5)
        assert np.abs(stack.weights[at] - before[at]).max() > 5e-3


def test_draws_are_those_of_keras_dropout():
    """Mean and deviation of the draws, within five of their standard errors, and the rate-0 network's only answer."""
    x, _, stack = stacked((5, 4), "mean")
    stack.train(2)
    for at in [(0, 1, 0), (1, 0, 0)]:
        ours = np.concatenate(list(stack.draws(at, x[at[0]][:6], 20_000, [9])))[..., 0]
        rate = RATES[at[:2]]
        network = [keras.Input([FEATURES])]
        for units in (5, 4, 1):
            activation = "relu" if units > 1 else None
            network += [keras.layers.Dropout(rate, seed=3), keras.layers.Dense(units, activation=activation)]
        model = keras.Sequential(network)
        model.set_weights(
            [
                value.squeeze(0) if bias else value
                for pair in stack.layers(stack.weights[at])
                for bias, value in enumerate(pair)
            ]
        )
        theirs = model(np.repeat(x[at[0]][:6], 20_000, axis=0), training=True).numpy().reshape(6, -1).T
        if rate == 0:
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
            continue
        error = theirs.std(axis=0) * math.sqrt(2 / len(theirs))
        assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 5 * error).all()
        np.testing.assert_allclose(ours.std(axis=0), theirs.std(axis=0), rtol=0.05)


def test_a_line_is_the_same_whatever_is_beside_it():
    x, y, both = stacked((5,), "mean")
    both.train(3)
    alone = Stack(x[1:], y[1:], rates=RATES[1:, 1:], decay=DECAY[1:, 1:, :1], hidden=(5,), seeds=[[5, 2]])
    alone.train(3)
    np.testing.assert_allclose(alone.weights[0, 0, 0], both.weights[1, 1, 0], atol=1e-6)


def test_log_likelihood_is_of_each_row_s_mixture_in_the_target_s_units():
    generator = np.random.default_rng(1)
    y = generator.normal(300, 40, 9)
    standardised = generator.normal(size=(500, 9, 1)).astype(np.float32)
    draws = 290 + 35 * standardised[..., 0].astype(np.float64)
    found = likelihood.score(np.split(standardised, [120, 130]), y, mean=290, scale=35, tau=0.01)
    assert found.ll == pytest.approx(np.log(norm.pdf(y, draws, 10).mean(axis=0)).mean(), rel=1e-6)
    assert found.rmse == pytest.approx(np.sqrt(np.mean((y - draws.mean(axis=0)) ** 2)), rel=1e-6)


def test_far_rows_have_a_finite_log_likelihood():
    """exp(-tau/2 error²) is 0 in floating point there."""
    found = likelihood.score([np.zeros((10, 2, 1), np.float32)], np.array([0.0, 50.0]), mean=0, scale=1, tau=1.0)
    assert found.ll == pytest.approx(norm.logpdf([0, 50]).mean())


def test_mixture_likelihood_has_each_draw_s_own_variance():
    generator = np.random.default_rng(4)
    y = generator.normal(size=7).astype(np.float32)
    draws = generator.normal(size=(90, 7, 2)).astype(np.float32)
    found = beyond.mixture(np.split(draws, [20, 33]), y, 1.7)
    densities = norm.pdf(y, draws[..., 0], 1.7 * np.exp(draws[..., 1] / 2))
    np.testing.assert_allclose(found, np.log(densities.mean(axis=0)), rtol=1e-5)
    np.testing.assert_allclose(
        beyond.mixture([draws[..., :1]], y, 0.4), np.log(norm.pdf(y, draws[..., 0], 0.4).mean(axis=0)), rtol=1e-5
    )


def test_the_factor_of_the_noise_is_the_likeliest():
    generator = np.random.default_rng(5)
    y = (0.3 * generator.normal(size=2000)).astype(np.float32)
    assert beyond.best_factor([np.zeros((5, 2000, 1), np.float32)], y) == pytest.approx(
        np.sqrt(np.mean(y**2)), rel=1e-3
    )


def test_paired_differences():
    better = comparison.paired([1.0, 2.0, 3.0], [1.1, 2.3, 3.2], higher_is_better=False)
    assert better.met
    assert better.difference == pytest.approx(-0.2)
    assert better.error == pytest.approx(0.1 / math.sqrt(3))
    assert not comparison.paired([1.0, 2.0, 3.0], [1.1, 2.3, 3.2], higher_is_better=True).met
    assert comparison.paired([1.0, 2.0], [0.9, 2.2], higher_is_better=True).met, "within one standard error"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A set of the same layout as the nine, named as one of them."""
    home = tmp_path_factory.mktemp("data") / "yacht"
    (home / "reference").mkdir(parents=True)
    generator = np.random.default_rng(2)
    x = generator.normal(size=(200, 3))
    np.savetxt(home / "data.txt", np.column_stack([x, x.sum(axis=1) + 0.1 * generator.normal(size=200)]))
    np.savetxt(home / "index_features.txt", [0, 1, 2])
    np.savetxt(home / "index_target.txt", [3])
    for name, values in {"n_splits": [8], "n_hidden": [10], "n_epochs": [1]}.items():
        np.savetxt(home / f"{name}.txt", values)
    np.savetxt(home / "dropout_rates.txt", [0.01, 0.3])
    np.savetxt(home / "tau_values.txt", [0.5, 20])
    for split in range(8):
        rows = generator.permutation(200)
        np.savetxt(home / f"index_train_{split}.txt", rows[:180])
        np.savetxt(home / f"index_test_{split}.txt", rows[180:])
    np.savetxt(home / "reference" / "test_MC_rmse.txt", np.full(8, 0.5))
    np.savetxt(home / "reference" / "test_ll.txt", np.full(8, -1.0))
    return home.parent


@pytest.mark.parametrize("run", [protocol.run, beyond.run], ids=["protocol", "beyond"])
def test_choosing_never_sees_a_test_row(folder, run):
    """Other test rows: the same grid, the same choice."""
    data = sets.load(folder, "yacht")
    x, y = data.x.copy(), data.y.copy()
    x[data.splits[3].test] += 5
    y[data.splits[3].test] += 1e6
    [ours], [theirs] = run(data, [3], 5), run(replace(data, x=x, y=y), [3], 5)
    assert ours["grid"] == theirs["grid"]
    assert len(ours["grid"]) == (4 if run is protocol.run else len(beyond.HEADS) * len(beyond.RATES))
    assert ours["ll"] != theirs["ll"]


def test_beyond_learns_the_noise_of_its_data(folder, tmp_path):
    """y is a sum and noise of deviation 0.1, whose log-likelihood under itself is 0.88 at best."""
    done = subprocess.run(
        [*command(folder, tmp_path, "--beyond", "--splits", "0-1"), "--epochs", "600"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    records = results.read(tmp_path / "yacht.beyond.jsonl")
    assert [record["split"] for record in records] == [0, 1]
    assert all(0.2 < record["ll"] < 1.2 and record["rmse"] < 0.25 for record in records), records
    assert "2/8" in done.stdout


def command(folder, out, *options):
    return [sys.executable, "-m", "benchmarks.uci", "--data", folder, "--sets", "yacht", "--out", out, *options]


def test_a_killed_run_goes_on(folder, tmp_path):
    file = tmp_path / "killed" / "yacht.jsonl"
    long = command(folder, file.parent, "--epochs", "150", "--processes", "1")
    process = subprocess.Popen(long, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_text().count("\n") >= 1):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    first = results.read(file)
    # As if killed while writing.
    with file.open("a") as end:
        end.write('{"split": 7, "epo')
    done = subprocess.run(long, cwd=ROOT, capture_output=True, text=True, check=True)
    records = results.read(file)
    assert records[: len(first)] == first
    assert sorted(record["split"] for record in records) == list(range(8))
    whole = subprocess.run(
        command(folder, tmp_path / "whole", "--epochs", "150"), cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == whole.stdout
    assert "8/8" in done.stdout


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT], ids=lambda sent: sent.name)
def test_no_process_outlives_a_stopped_run(folder, tmp_path, sent):
    process = subprocess.Popen(
        command(folder, tmp_path, "--epochs", "1000000"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )

    def alive():
        found = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True, check=False)
        return found.stdout.split()

    def at_work(pid):
        """Whether it leaves SIGINT to its parent: a worker that has begun, or the resource tracker."""
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except FileNotFoundError:
            return False
        return bool(int(status.split("SigIgn:")[1].split()[0], 16) & 1 << (signal.SIGINT - 1))

    deadline = time.monotonic() + 120
    while sum(map(at_work, alive())) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, sent) if sent == signal.SIGINT else process.kill()
    _, errors = process.communicate(timeout=120)
    while alive():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert errors == "stopped: the same command goes on\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sets", "mars"], "no set 'mars'"),
        (["--splits", "5-9"], "has splits 0-7"),
        (["--splits", "x"], "is not like"),
        (["--data", "/nowhere"], "cannot be read"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, options, words):
    run = subprocess.run([*command(folder, tmp_path), *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert words in run.stderr
    assert run.stderr.count("\n") == 1


def test_results_of_other_epochs_are_not_mixed(tmp_path):
    file = tmp_path / "a.jsonl"
    results.append(file, [{"split": 0, "epochs": 5}, {"split": 1, "epochs": 6}])
    assert list(results.by_split(results.read(file), 6)) == [1]
    assert json.loads(file.read_text().splitlines()[0]) == {"split": 0, "epochs": 5}
