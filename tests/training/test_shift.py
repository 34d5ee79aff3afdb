"""The digits' recipe, turned and noised: calibrated draws are never the worse probabilities than the net without."""

import numpy as np
import pytest
from scipy.ndimage import rotate

from models import temperature
from training.datasets import load
from training.fit import fit
from training.recipes import recipe
from training.splits import split

DRAWS = 30


@pytest.fixture(scope="module")
def digits():
    """Gives the NLL of dropout off, and of draws at the temperature of the calibration rows, on shifted test rows."""
    data = load("digits")
    rows = split(data.y, data.task)
    model = fit(data, rows.train, recipe("digits"), seed=0).model

    def draws(images):
        return np.stack([np.asarray(model(images, training=True)) for _ in range(DRAWS)], axis=1)

    fitted, _ = temperature.fit(draws(data.x[rows.calibration]), data.y[rows.calibration])
    images, y = data.x[rows.test], data.y[rows.test]

    def judged(shift):
        shifted = shift(images).astype(np.float32)
        off = temperature.nll(np.asarray(model(shifted, training=False)).astype(np.float64), y)
        on = temperature.answers(temperature.logarithms(draws(shifted)), fitted.value)
        return off, temperature.nll(on, y)

    return judged


@pytest.mark.parametrize("angle", [15, 30, 45, 60, 75, 90])
def test_turned(digits, angle):
    off, served = digits(lambda images: rotate(images, angle, axes=(1, 2), reshape=False, order=1))
    assert served < off


@pytest.mark.parametrize("noise", [4, 8])
def test_noised(digits, noise):
    random = np.random.default_rng(0)
    off, served = digits(lambda images: np.clip(images + random.normal(0, noise, images.shape), 0, 16))
    assert served < off


def test_usual_rows_lose_nothing(digits):
    off, served = digits(lambda images: images)
    assert served < off + 0.01
