from dataclasses import replace

import pytest

from training.datasets import DATASETS
from training.recipes import DEFAULTS, SONAR, SONAR_BASELINE, RateError, recipe


def test_every_data_set_has_a_recipe_whose_net_is_stochastic():
    assert set(DEFAULTS) == set(DATASETS)
    assert all(recipe(name).is_stochastic for name in DATASETS)


def test_sonar_recipes_are_the_tutorials():
    for chosen in (SONAR, SONAR_BASELINE):
        assert (chosen.hidden_units, chosen.epochs, chosen.batch_size) == ((60, 30), 300, 16)
    assert (SONAR.visible_dropout, SONAR.hidden_dropout, SONAR.max_norm) == (0.2, 0.2, 3.0)
    assert (SONAR.learning_rate, SONAR.momentum) == (0.1, 0.9)
    assert (SONAR_BASELINE.learning_rate, SONAR_BASELINE.momentum, SONAR_BASELINE.max_norm) == (0.01, 0.8, None)


def test_given_values_replace_the_defaults_and_nothing_else():
    chosen = recipe("wine", hidden_dropout=0.4, epochs=7)
    assert chosen == replace(DEFAULTS["wine"], hidden_dropout=0.4, epochs=7)


def test_sonar_without_dropout_is_the_baseline():
    assert recipe("sonar", visible_dropout=0.0, hidden_dropout=0.0) == SONAR_BASELINE
    assert recipe("sonar", visible_dropout=0.0, hidden_dropout=0.0, epochs=5) == replace(SONAR_BASELINE, epochs=5)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["visible", "hidden"])
def test_rate_outside_the_range_is_refused_by_name_and_value(which, rate):
    with pytest.raises(RateError, match=rf"^{which} dropout rate {rate}: wanted a number from 0"):
        recipe("sonar", **{f"{which}_dropout": rate})


@pytest.mark.parametrize("rate", [0.0, 1e-9, 0.999999])
def test_rate_inside_the_range_is_taken(rate):
    assert recipe("sonar", hidden_dropout=rate).hidden_dropout == rate
