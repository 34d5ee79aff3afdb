import pytest

from training.comparison import alternatives, place
from training.recipes import SONAR_BASELINE, recipe


def rates(recipes):
    return {name: (chosen.visible_dropout, chosen.hidden_dropout) for name, chosen in recipes.items()}


@pytest.mark.parametrize(
    ("visible", "hidden", "expected"),
    [
        (0.2, 0.3, {"baseline": (0, 0), "visible": (0.2, 0), "hidden": (0, 0.3)}),
        (0.2, 0.0, {"baseline": (0, 0)}),
        (0.0, 0.3, {"baseline": (0, 0)}),
    ],
)
def test_chosen_net_is_set_beside_those_that_differ_from_it(visible, hidden, expected):
    chosen = recipe("sonar", visible_dropout=visible, hidden_dropout=hidden, epochs=4)
    others = alternatives(chosen)
    assert rates(others) == expected
    assert chosen not in others.values()
    assert all(place(other) == name for name, other in others.items())
    assert all(other.epochs == 4 for other in others.values())


def test_sonar_is_set_beside_the_tutorials_own_baseline():
    assert alternatives(recipe("sonar"))["baseline"] == SONAR_BASELINE
