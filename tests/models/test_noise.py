"""The target's noise against the likelihood that SciPy writes, and against the noise that made the targets."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from models import noise


def made_up(rows: int, std: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draws [rows, 50] around functions of which one is the truth, and targets with that noise."""
    random = np.random.default_rng(seed)
    centre = random.normal(100, 20, (rows, 1))
    spread = random.uniform(0.5, 12, (rows, 1))
    draws = centre + spread * random.normal(size=(rows, 50))
    truth = centre[:, 0] + spread[:, 0] * random.normal(size=rows)
    return draws.astype(np.float32), truth + random.normal(0, std, rows)


def likelihood(draws, stds, targets) -> float:
    return float(-np.log(norm.pdf(targets[:, None], draws.astype(float), stds).mean(axis=1)).mean())


def test_constant_noise_is_the_likeliest_one():
    draws, targets = made_up(800, 5.0)
    found, reason = noise.fit(draws, None, targets)
    assert found is not None
    assert reason is None
    assert found.std == pytest.approx(5.0, rel=0.15)
    best = minimize_scalar(lambda std: likelihood(draws, std, targets), bounds=(0.5, 50), method="bounded").x
    assert found.std == pytest.approx(best, rel=1e-3)
    assert noise.nll(draws.astype(float), 5.0, targets) == pytest.approx(likelihood(draws, 5.0, targets), abs=1e-9)


def test_far_targets_have_a_likelihood():
    """Where the density underflows its logarithm does not."""
    assert noise.nll(np.zeros((1, 4)), 1.0, np.array([100.0])) == pytest.approx(5000 + 0.5 * np.log(2 * np.pi))


def test_scale_of_a_heads_noise():
    draws, targets = made_up(800, 5.0)
    stds = np.full(draws.shape, 2.0, np.float32)
    found, reason = noise.fit(draws, stds, targets)
    assert found is not None
    assert reason is None
    assert found.std is None
    best = minimize_scalar(lambda scale: likelihood(draws, scale * stds, targets), bounds=(0.1, 9), method="bounded").x
    assert found.scale == pytest.approx(best, rel=1e-3)
    assert found.nll_before == pytest.approx(likelihood(draws, stds, targets), abs=1e-6)
    assert found.nll_after < found.nll_before


@pytest.mark.parametrize("seed", range(6))
def test_scale_is_on_only_where_cross_validation_shows_a_gain(seed):
    draws, targets = made_up(25, 5.0, seed)
    found, reason = noise.fit(draws, np.full(draws.shape, 5.0, np.float32), targets)
    assert found is not None
    assert (found.scale != 1.0) == (found.nll_after < found.nll_before) == (reason is None)


def test_the_targets_unit_does_not_matter():
    draws, targets = made_up(200, 5.0)
    plain, _ = noise.fit(draws, None, targets)
    tiny, _ = noise.fit(1e-8 * draws.astype(np.float64), None, 1e-8 * targets)
    assert plain is not None
    assert tiny is not None
    assert plain.nll_before - plain.nll_after == pytest.approx(tiny.nll_before - tiny.nll_after, abs=1e-6)


def test_rows_without_residuals_have_a_noise_above_zero():
    draws = np.zeros((20, 30), np.float32)
    found, _ = noise.fit(draws, None, np.zeros(20))
    assert found is not None
    assert found.std is not None
    assert 0 < found.std < 1e-3


def test_too_few_rows_say_so():
    draws, targets = made_up(9, 5.0)
    assert noise.fit(draws, None, targets) == (
        None,
        "noise is not known: 9 calibration rows found, 10 wanted at least",
    )
