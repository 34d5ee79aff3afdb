"""Networks that answer the same to every row: seen, never the winner of a search beside a live one, and said to be."""

from dataclasses import replace

import keras
import numpy as np
import optuna
import pytest

from training import pipeline, search, tune
from training.collapse import constant_answer, is_constant
from training.comparison import fit_variant
from training.datasets import load
from training.ensemble import fit_members, single_networks
from training.evaluation import answers, evaluate_constant, figures
from training.folds import Job, fit_jobs
from training.plan import plan
from training.progress import Reporter
from training.recipes import DEFAULTS
from training.splits import split
from training.summary import document as published_document
from training.summary import sentences
from training.tune_summary import document
from training.tune_summary import sentences as tuned_sentences

# At Sonar's own learning rate some nets die, and which of them, a processor's last bits decide.
ALIVE = replace(DEFAULTS["sonar"], learning_rate=0.005, visible_dropout=0.0, hidden_dropout=0.1, epochs=20)


@pytest.mark.parametrize("name", ["wine", "sonar", "diabetes"])
def test_the_same_answer_to_every_row_is_constant_and_a_net_that_has_learnt_is_not(name):
    data = load(name)
    rows = split(data.y, data.task)
    constant = constant_answer(data, rows.train, len(rows.test))
    assert figures(constant, data, rows.test) == pytest.approx(evaluate_constant(data, rows.train, rows.test))
    assert is_constant(constant, data, rows.test)
    learnt = replace(DEFAULTS[name], visible_dropout=0.0, hidden_dropout=0.1, epochs=20, max_norm=None)
    [outcome] = fit_jobs(data, [Job(replace(learnt, learning_rate=0.005), rows.train, rows.test, seed=0)])
    assert not is_constant(outcome.answer, data, rows.test)


@pytest.fixture
def strong_dropout_kills(monkeypatch):
    """A search's nets with more than half of their hidden units dropped answer with the class shares."""

    def fit_or_kill(data, jobs, **options):
        def killed(job, outcome):
            if job.recipe.hidden_dropout <= 0.5:
                return outcome
            dead = constant_answer(data, job.train_rows, len(job.held_out))
            return replace(outcome, answer=dead, monte_carlo=dead)

        return [killed(job, outcome) for job, outcome in zip(jobs, fit_jobs(data, jobs, **options), strict=True)]

    monkeypatch.setattr(tune, "fit_jobs", fit_or_kill)


def test_a_single_row_shows_no_constant():
    data = load("wine")
    assert not is_constant(np.array([[0.2, 0.3, 0.5]]), data, np.array([0]))
    assert is_constant(np.array([[0.2, 0.3, 0.5]] * 2), data, np.array([0, 177]))


def sonar_search(tmp_path, fixed):
    """A search whose every trial is one of these (visible, hidden) rates."""
    data = load("sonar")
    rows = split(data.y, data.task).train
    settings = tune.Settings(
        space=tune.Space(replace(DEFAULTS["sonar"], epochs=150), ()),
        objective="nll",
        trials=len(fixed),
        folds=2,
        outer_folds=0,
        num_samples=10,
        seed=0,
        timeout_s=None,
        storage=f"sqlite:///{tmp_path / 'tune.db'}",
        name="sonar",
    )
    own = tune._search(data, settings, search.open_storage(settings.storage), "winner").study()
    for visible, hidden in fixed:
        own.enqueue_trial({"visible_dropout": visible, "hidden_dropout": hidden})
    return tune.tune(data, rows, settings), settings, own.get_trials()


@pytest.mark.usefixtures("strong_dropout_kills")
def test_a_collapsed_trial_does_not_win_with_a_better_loss(tmp_path):
    found, settings, trials = sonar_search(tmp_path, [(0.4, 0.6), (0.0, 0.05)])
    dead, alive = trials
    assert dead.value < alive.value, "the live net is not sure enough of its errors for this test to show anything"
    assert (search.is_collapsed(dead), search.is_collapsed(alive)) == (True, False)
    assert (found.recipe.visible_dropout, found.recipe.hidden_dropout) == (0.0, 0.05)
    assert (found.collapsed, found.winner_collapsed, found.selected_score) == (1, False, alive.value)
    said = tuned_sentences(found, settings)
    assert "In 1 of the trials a net collapsed" in said
    assert "No trial without collapsed nets has a better nll than that one answer." in said
    assert document(found, settings)["trials"]["collapsed"] == 1


@pytest.mark.usefixtures("strong_dropout_kills")
def test_where_every_trial_collapsed_it_is_said(tmp_path):
    found, settings, _ = sonar_search(tmp_path, [(0.4, 0.6), (0.5, 0.6)])
    assert (found.collapsed, found.winner_collapsed) == (2, True)
    # The share of either class, near a half.
    assert found.constant_score == pytest.approx(np.log(2), abs=0.02)
    assert "Every trial had nets that collapsed" in tuned_sentences(found, settings)


def test_the_sampler_is_told_which_trials_are_of_no_use(tmp_path):
    """TPE looks around the live trials, though the dead ones have the better values."""
    own = search.Search(
        "s", search.open_storage(f"sqlite:///{tmp_path / 's.db'}"), "minimize", 40, 0, 0, {"rate": 0.45}
    )

    def objective(trial: optuna.Trial, look):
        rate = trial.suggest_float("rate", 0.0, 1.0)
        search.set_collapsed(trial, int(rate > 0.5))
        return 0.0 if rate > 0.5 else 1.0 + abs(rate - 0.3)

    study = search.run(own, objective)
    late = [trial.params["rate"] for trial in study.get_trials()[20:]]
    assert np.mean(np.array(late) <= 0.5) > 0.8
    assert search.best(study).params["rate"] == pytest.approx(0.3, abs=0.1)


def silence(network):
    """The network with its output's kernel zero: what the one of dead units comes to, the same answer to every row."""
    kernel = network.get_layer("output").kernel
    kernel.assign(np.zeros(kernel.shape))


@pytest.fixture
def silenced(monkeypatch):
    """Seeds whose fit ends in a dead network, or in an ensemble whose second member is dead."""
    seeds: set[int] = set()

    def fit(name, recipe, data, rows, seed, reporter, members=1):
        variant = fit_variant(name, recipe, data, rows, seed, reporter, members)
        if seed in seeds:
            silence(variant.model if members == 1 else variant.model.get_layer("member_2"))
        return variant

    monkeypatch.setattr(pipeline, "fit_variant", fit)
    return seeds


def published(tmp_path, **changes):
    request = plan("sonar", repository=tmp_path, seed=3, num_samples=20)
    return pipeline.train(replace(request, recipe=ALIVE, **changes), Reporter(quiet=True))


def test_a_final_fit_that_collapses_is_tried_with_other_seeds_and_said_to_have(tmp_path, silenced):
    silenced.update({3, 4, 5})
    dead = published(tmp_path, tries=3)
    assert dead.collapsed
    assert dead.manifest.training["seed"] == 5
    assert sentences(dead).startswith("The network has collapsed: it answers the same to every row.")
    silenced.remove(4)
    alive = published(tmp_path, tries=3)
    assert not alive.collapsed
    assert alive.manifest.training["seed"] == 4
    assert "collapsed" not in sentences(alive)


@pytest.mark.parametrize("name", ["sonar", "diabetes"])
def test_a_dead_member_is_seen_behind_the_mean_of_an_ensemble(name, tmp_path):
    request = replace(plan(name, repository=tmp_path, seed=0, num_samples=20, epochs=10), members=3)
    data, rows = request.data, split(request.data.y, request.data.task).train
    model = fit_members(data, rows, replace(request.recipe, learning_rate=0.003), 3, seed=0).model
    assert pipeline.count_collapsed(model, request, rows) == 0
    silence(model.get_layer("member_2"))
    assert not is_constant(answers(model, data, rows), data, rows)
    assert pipeline.count_collapsed(model, request, rows) == 1
    dead = [is_constant(answers(one, data, rows), data, rows) for one in single_networks(model, 3)]
    assert dead == [False, True, False]


def test_members_that_collapsed_are_counted_and_said(tmp_path, silenced):
    silenced.update({3, 5})
    found = published(tmp_path, members=2, tries=2)
    # The second try's members have the seeds that follow those of the first.
    assert found.manifest.training["seed"] == 5
    data = load("sonar")
    rows = split(data.y, data.task).train
    model = keras.models.load_model(found.folder / "model.keras", compile=False)
    dead = [is_constant(answers(one, data, rows), data, rows) for one in single_networks(model, 2)]
    assert dead == [False, True]
    assert found.collapsed == 1
    assert sentences(found).startswith("1 of the 2 networks has collapsed: ")
    shown = published_document(found)
    assert (shown["collapsed"], shown["collapsed_networks"]) == (True, 1)
