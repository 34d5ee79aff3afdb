import json
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from html import unescape
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from training import cores, replicas
from training.datasets import ConstantTarget, Dataset, Kind, load
from training.folds import Job, Outcome, encode, fit_and_keep, fit_jobs, inner_folds, repeated_folds
from training.preprocessing import Preprocessor
from training.recipes import DEFAULTS
from training.study import TooFewRows, choose, levels, metrics_of, study, variants
from training.study_report import page
from training.study_summary import document, sentences

ROOT = Path(__file__).parents[2]
QUICK = replace(DEFAULTS["wine"], hidden_units=(8,), epochs=20, learning_rate=0.01)


@pytest.fixture(scope="module")
def wine_study():
    return study(load("wine"), QUICK, folds=4, repeats=2, num_samples=10)


def test_every_row_is_tested_once_a_repeat_and_never_trains_its_own_test():
    data = load("diabetes")
    splits = repeated_folds(data.y, data.task, folds=5, repeats=3, seed=1)
    for first in (0, 5, 10):
        assert sorted(np.concatenate([test for _, test in splits[first : first + 5]])) == list(range(len(data.y)))
    for train, test in splits:
        assert not set(train) & set(test)
        for fit, held in inner_folds(data.y, data.task, train, folds=2, seed=0):
            assert set(fit) | set(held) == set(train)
    assert any((a[1] != b[1]).any() for a, b in zip(splits[:5], splits[5:10], strict=True) if len(a[1]) == len(b[1]))


@pytest.mark.parametrize("name", ["wine", "digits", "diabetes"])
def test_rows_are_encoded_as_the_network_s_own_preprocessing_does(name):
    data = load(name)
    choices = [np.arange(0, 100), np.arange(50, 170)]
    rows, scales, groups = encode(data, [*choices, choices[0]])
    # The scaling of pixels knows no training rows.
    assert groups == ([0, 0, 0] if name == "digits" else [0, 1, 0])
    for group, chosen in zip(groups, choices, strict=False):
        expected = Preprocessor.fit(data, chosen).encode(data.x).reshape(len(data.x), -1)
        np.testing.assert_allclose(rows.x[group], expected, atol=1e-4)
        np.testing.assert_allclose(rows.y[group] * scales[group][1] + scales[group][0], data.y, rtol=1e-5)


def test_a_fold_s_result_does_not_depend_on_the_categories_of_those_beside_it():
    random = np.random.default_rng(1)
    x = np.zeros(120, [("size", "f4"), ("town", "O")])
    x["size"] = random.normal(size=120)
    x["town"] = [f"town {town}" for town in np.minimum(random.geometric(0.12, 120), 30)]
    y = random.integers(0, 2, 120)
    kinds: tuple[tuple[str, Kind], ...] = (("town", "categorical"),)
    data = Dataset("towns", "classification", x, y, "y", "made up", ("size", "town"), labels=("a", "b"), kinds=kinds)
    recipe = replace(QUICK, visible_dropout=0.3, hidden_dropout=0.2)
    few, many = (Job(recipe, np.arange(rows), np.arange(110, 120), seed=rows) for rows in (40, 110))
    rows, _, _ = encode(data, [few.train_rows, many.train_rows])
    assert rows.features is not None
    # Other words of random bits, too.
    assert -(-rows.features[0] // 4) < -(-rows.features[1] // 4)
    [alone], together = fit_jobs(data, [few], num_samples=7), fit_jobs(data, [many, few], num_samples=7)
    np.testing.assert_allclose(together[1].answer, alone.answer, atol=1e-5)
    assert alone.monte_carlo is not None
    assert together[1].monte_carlo is not None
    np.testing.assert_allclose(together[1].monte_carlo, alone.monte_carlo, atol=1e-5)


def test_images_are_fitted_with_their_convolutions_in_as_many_stacks_as_it_takes(monkeypatch):
    data = load("digits")
    chosen = replace(DEFAULTS["digits"], hidden_units=(16,), epochs=2)
    splits = repeated_folds(data.y, data.task, folds=3, repeats=1, seed=0)
    jobs = [Job(chosen, train, test, seed=number) for number, (train, test) in enumerate(splits)]
    together = fit_jobs(data, jobs, num_samples=5)
    monkeypatch.setattr(replicas, "CONVOLUTIONAL_STACK", 2)
    for one, other, job in zip(together, fit_jobs(data, jobs, num_samples=5), jobs, strict=True):
        np.testing.assert_allclose(one.answer, other.answer, atol=1e-4)
        assert one.monte_carlo is not None
        assert other.monte_carlo is not None
        np.testing.assert_allclose(one.monte_carlo, other.monte_carlo, atol=1e-4)
        # A tenth for one answer to every row.
        assert (one.answer.argmax(axis=1) == data.y[job.held_out]).mean() > 0.5


def test_stacks_side_by_side_are_those_one_after_another(monkeypatch):
    data = load("wine")
    splits = repeated_folds(data.y, data.task, folds=5, repeats=1, seed=0)
    jobs = [Job(QUICK, train, test, seed=number) for number, (train, test) in enumerate(splits)]
    monkeypatch.setattr(replicas, "STACK", 2)
    alone = fit_jobs(data, jobs, num_samples=5, curves=True)
    monkeypatch.setattr(cores, "stacks_at_once", lambda: 3)
    shares: list[float] = []
    beside = fit_jobs(data, jobs, num_samples=5, curves=True, on_progress=shares.append)
    for one, other in zip(alone, beside, strict=True):
        np.testing.assert_allclose(one.answer, other.answer, atol=1e-5)
        assert one.monte_carlo is not None
        assert other.monte_carlo is not None
        np.testing.assert_allclose(one.monte_carlo, other.monte_carlo, atol=1e-5)
        np.testing.assert_allclose(one.held_out_curve, other.held_out_curve, atol=1e-5)
    assert max(shares) == 1


def test_a_look_at_several_stacks_is_at_all_their_jobs(monkeypatch):
    data = load("wine")
    splits = repeated_folds(data.y, data.task, folds=5, repeats=1, seed=0)
    jobs = [Job(replace(QUICK, epochs=30), train, test, seed=number) for number, (train, test) in enumerate(splits)]
    alone: list[tuple[int, float | None]] = []
    fit_jobs(data, jobs, on_look=lambda epoch, loss: alone.append((epoch, loss)))
    monkeypatch.setattr(replicas, "STACK", 2)
    seen: list[tuple[int, float | None]] = []
    fit_jobs(data, jobs, on_look=lambda epoch, loss: seen.append((epoch, loss)))
    assert [epoch for epoch, _ in alone] == [25, 30]
    assert [epoch for epoch, _ in seen] == [25, 30] * 3
    assert [loss for _, loss in seen[:4]] == [None] * 4
    assert [loss for _, loss in seen[4:]] == pytest.approx([loss for _, loss in alone], abs=1e-5)


def test_outcomes_are_gone_once_their_stack_is_reduced(monkeypatch):
    data = load("wine")
    splits = repeated_folds(data.y, data.task, folds=6, repeats=1, seed=0)
    jobs = [Job(QUICK, train, test, seed=number) for number, (train, test) in enumerate(splits)]
    monkeypatch.setattr(replicas, "STACK", 2)
    seen: list[weakref.ref[Outcome]] = []

    def keep(job, outcome):
        seen.append(weakref.ref(outcome))
        assert sum(one() is not None for one in seen) <= 2
        return job.seed, outcome.answer.shape[0]

    kept = fit_and_keep(data, jobs, keep, num_samples=2)
    assert kept == [(job.seed, len(job.held_out)) for job in jobs]


def test_a_failure_in_one_stack_ends_those_beside_it(monkeypatch):
    data = load("wine")
    splits = repeated_folds(data.y, data.task, folds=2, repeats=1, seed=0)
    endless = replace(QUICK, epochs=10**6)
    jobs = [Job(endless, train, test, seed=number) for number, (train, test) in enumerate(splits)]
    monkeypatch.setattr(cores, "stacks_at_once", lambda: 2)
    looks: list[float] = []

    def interrupt(share: float) -> None:
        looks.append(share)
        if len(looks) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_jobs(data, jobs, on_progress=interrupt)


def test_stacks_are_trained_side_by_side_where_operations_have_one_thread():
    program = """
        import os
        from training import cores
        before = cores.stacks_at_once()
        cores.one_thread_an_operation()
        assert (before, cores.stacks_at_once()) == (1, len(os.sched_getaffinity(0)))
    """
    subprocess.run([sys.executable, "-c", dedent(program)], cwd=ROOT, check=True)


def test_the_level_of_a_fold_is_chosen_without_its_test_rows():
    data = load("wine")
    candidates = levels(variants(QUICK))
    [split] = repeated_folds(data.y, data.task, folds=4, repeats=1, seed=0)[:1]
    spoilt = replace(data, x=data.x.copy(), y=data.y.copy())
    spoilt.x[split[1]] += 1000
    spoilt.y[split[1]] = 0
    _, first = choose(data, [split], candidates, 5, 0, lambda share: None)
    _, second = choose(spoilt, [split], candidates, 5, 0, lambda share: None)
    assert first == second
    # It could have failed: with other training rows the losses differ.
    train = [Job(candidates[0], split[0], split[1], seed=0)]
    assert not np.allclose(fit_jobs(data, train)[0].answer, fit_jobs(spoilt, train)[0].answer)


def test_a_level_whose_nets_are_dead_is_not_chosen_beside_a_live_one():
    data = load("sonar")
    splits = repeated_folds(data.y, data.task, folds=4, repeats=1, seed=0)[:2]
    alive, dead = (
        replace(DEFAULTS["sonar"], visible_dropout=v, hidden_dropout=h) for v, h in ((0.0, 0.05), (0.4, 0.6))
    )
    _, choice = choose(data, splits, [dead, alive], 10, 0, lambda share: None)
    assert choice == [1, 1]


def test_the_same_seed_gives_the_same_study(wine_study):
    again = study(load("wine"), QUICK, folds=4, repeats=2, num_samples=10)
    first, second = (document(one)["variants"] for one in (wine_study, again))
    assert first == second


def test_a_study_compares_on_the_same_folds(wine_study):
    assert list(wine_study.figures) == ["baseline", "visible", "hidden", "both", "tuned"]
    assert sum(wine_study.chosen.values()) == 8
    for modes in wine_study.figures.values():
        for metrics in modes.values():
            assert tuple(metrics) == metrics_of("classification")
            assert all(values.shape == (8,) for values in metrics.values())
    assert list(wine_study.figures["baseline"]) == ["deterministic"]
    base = wine_study.figures["baseline"]["deterministic"]["nll"]
    own = wine_study.figures["both"]["monte_carlo"]["nll"]
    [one] = [c for c in wine_study.comparisons() if (c.variant, c.mode, c.metric) == ("both", "monte_carlo", "nll")]
    assert one.difference.mean == pytest.approx((own - base).mean())


def test_a_study_s_nets_have_learnt(wine_study):
    """As good as logistic regression on the same kind of data, within what eight folds can tell."""
    data = load("wine")
    right = []
    for train, test in repeated_folds(data.y, data.task, folds=4, repeats=2, seed=0):
        mean, deviation = data.x[train].mean(axis=0), data.x[train].std(axis=0)
        model = LogisticRegression().fit((data.x[train] - mean) / deviation, data.y[train])
        right.append(model.score((data.x[test] - mean) / deviation, data.y[test]))
    assert wine_study.figures["baseline"]["deterministic"]["accuracy"].mean() > np.mean(right) - 0.05


def test_a_tuned_fold_has_the_figures_of_the_level_it_chose(wine_study):
    accuracy = {name: modes["deterministic"]["nll"] for name, modes in wine_study.figures.items()}
    rates = {(recipe.visible_dropout, recipe.hidden_dropout): name for name, recipe in wine_study.recipes.items()}
    [(level, _)] = [item for item in wine_study.chosen.items() if item[1] == max(wine_study.chosen.values())][:1]
    if level in rates:
        assert np.isclose(accuracy["tuned"], accuracy[rates[level]]).sum() >= wine_study.chosen[level]
    else:
        assert not np.allclose(accuracy["tuned"], accuracy["baseline"])


def test_curves_show_the_loss_falling(wine_study):
    epochs, train, held_out = wine_study.curves["baseline"]
    assert epochs[-1] == QUICK.epochs
    assert len(train) == len(held_out) == len(epochs)
    assert 0 < train[-1] < 1.2


def test_the_words_say_what_the_intervals_say(wine_study):
    found = document(wine_study)
    for comparison in found["comparisons"]:
        interval = comparison["difference"]
        if interval["lower"] <= 0 <= interval["upper"]:
            assert comparison["verdict"] == "no difference shown"
        else:
            assert comparison["verdict"] in ("better", "worse")
    text = sentences(wine_study)
    for name in ("visible", "hidden", "both", "tuned"):
        shown = {c["verdict"] for c in found["comparisons"] if c["variant"] == name} - {"no difference shown"}
        [line] = [line for line in text.splitlines() if line.startswith(f"{name}: ")]
        assert line.endswith("no difference shown.") == (not shown)


def test_regression_has_its_own_scores():
    quick = replace(DEFAULTS["diabetes"], hidden_units=(8,), epochs=15, learning_rate=0.01)
    found = study(load("diabetes"), quick, folds=3, repeats=1, num_samples=10)
    figures = found.figures["both"]["monte_carlo"]
    assert tuple(figures) == metrics_of("regression")
    # In the target's unit: its deviation is 77; a normal's density at that scale costs about 5.5 nats.
    assert 40 < figures["rmse"].mean() < 77
    assert 5 < figures["nll"].mean() < 6.5
    assert figures["crps"].mean() < figures["rmse"].mean()


def test_too_few_rows_are_refused_in_words():
    data = load("wine")
    few = replace(data, x=data.x[:65], y=data.y[:65])
    with pytest.raises(TooFewRows, match="0 rows of class 'class_2'"):
        study(few, QUICK, folds=5)


def test_a_fold_whose_training_targets_are_one_number_is_refused_in_a_line():
    data = load("diabetes")
    flat = replace(data, y=np.zeros_like(data.y))
    flat.y[0] = 2.5
    with pytest.raises(ConstantTarget, match="is 0 in 441 of 442 rows, and in all"):
        study(flat, DEFAULTS["diabetes"], folds=3, repeats=1)


def test_the_page_has_every_finding(wine_study):
    text = page(wine_study)
    shown = unescape(text)
    for line in sentences(wine_study).splitlines():
        assert line in shown
    assert text.count("<svg") == 2
    for comparison in wine_study.comparisons():
        assert f"{comparison.difference.mean:+.3f}" in shown
    # Self-contained.
    assert not re.search(r"<(script|link|img|iframe)\b", text)


def test_the_command_line_prints_the_study(tmp_path):
    command = [sys.executable, "-m", "dropserve", "study", "wine", "--folds", "3", "--repeats", "1", "--epochs", "5"]
    command += ["--report", str(tmp_path / "study.html")]
    result = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    assert (found["data"], found["folds"], found["repeats"], found["rows"]) == ("wine", 3, 1, 178)
    assert len(found["variants"]["tuned"]["fold_figures"]["monte_carlo"]["nll"]) == 3
    assert "Does dropout help on wine?" in (tmp_path / "study.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "error: data set 'nowhere'; wanted one of sonar"),
        (["sonar", "--folds", "100"], "error: sonar: 97 rows of class 'rock'; wanted enough rows for 100 folds"),
    ],
)
def test_what_cannot_be_studied_is_refused_in_a_line(arguments, line):
    command = [sys.executable, "-m", "dropserve", "study", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1
