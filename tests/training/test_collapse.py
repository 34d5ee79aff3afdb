"""Networks that answer the same to every row: seen, never the winner of a search beside a live one, and said to be."""

from dataclasses import replace

import keras
import numpy as np
import optuna
import pytest

from training import pipeline, search, tune
from training.collapse import TRIES, constant_answer, is_constant
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

# At Sonar's learning rate every unit is dead after a few epochs: their bias was thrown far below 0.
DEAD = replace(DEFAULTS["sonar"], hidden_dropout=0.6, visible_dropout=0.4, epochs=60)


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


def sonar_search(tmp_path, fixed):
    """A search whose every trial is one of these (visible, hidden) rates, at the learning rate that kills."""
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


def published(tmp_path, recipe, tries):
    request = plan("sonar", repository=tmp_path, seed=3, num_samples=20, epochs=recipe.epochs)
    return pipeline.train(replace(request, recipe=recipe, tries=tries), Reporter(quiet=True))


def test_a_final_fit_that_collapses_is_tried_with_other_seeds_and_said_to_have(tmp_path):
    dead = published(tmp_path, DEAD, TRIES)
    assert dead.collapsed
    assert dead.manifest.training["seed"] == 3 + TRIES - 1
    assert sentences(dead).startswith("The network has collapsed: it answers the same to every row.")
    alive = published(tmp_path, replace(DEAD, hidden_dropout=0.1, visible_dropout=0.0, epochs=20), TRIES)
    assert not alive.collapsed
    assert alive.manifest.training["seed"] == 3
    assert "collapsed" not in sentences(alive)


@pytest.mark.parametrize("name", ["sonar", "diabetes"])
def test_a_dead_member_is_seen_behind_the_mean_of_an_ensemble(name, tmp_path):
    request = replace(plan(name, repository=tmp_path, seed=0, num_samples=20, epochs=10), members=3)
    data, rows = request.data, split(request.data.y, request.data.task).train
    model = fit_members(data, rows, replace(request.recipe, learning_rate=0.003), 3, seed=0).model
    assert pipeline.count_collapsed(model, request, rows) == 0
    kernel = model.get_layer("member_2").get_layer("output").kernel
    kernel.assign(np.zeros(kernel.shape))
    assert not is_constant(answers(model, data, rows), data, rows)
    assert pipeline.count_collapsed(model, request, rows) == 1
    dead = [is_constant(answers(one, data, rows), data, rows) for one in single_networks(model, 3)]
    assert dead == [False, True, False]


def test_members_that_collapsed_are_counted_and_said(tmp_path):
    request = plan("sonar", repository=tmp_path, seed=0, num_samples=20, ensemble=2)
    found = pipeline.train(replace(request, recipe=DEAD, tries=2), Reporter(quiet=True))
    # The second try's members have the seeds that follow those of the first.
    assert found.manifest.training["seed"] in (0, 2)
    data, rows = request.data, split(request.data.y, request.data.task).train
    model = keras.models.load_model(found.folder / "model.keras", compile=False)
    dead = sum(is_constant(answers(one, data, rows), data, rows) for one in single_networks(model, 2))
    assert dead > 0, "the members live too long for this test to show anything"
    assert found.collapsed == dead
    said = sentences(found)
    assert said.startswith(f"{dead} of the 2 networks {'have' if dead > 1 else 'has'} collapsed: ")
    shown = published_document(found)
    assert (shown["collapsed"], shown["collapsed_networks"]) == (True, dead)
