"""Novelty against NumPy's Mahalanobis distance, and against what no digit looks like."""

import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from models import novelty


def of(known: novelty.Novelty, rows: np.ndarray) -> np.ndarray:
    return known.of(tf.constant(rows, tf.float32)).numpy()


def test_with_every_axis_it_is_the_mahalanobis_distance():
    random = np.random.default_rng(0)
    mixing = random.normal(size=(6, 6))
    rows = random.normal(size=(500, 6)) @ mixing + 5
    others = random.normal(size=(40, 6)) @ mixing + random.normal(4, 3, (40, 6))
    known = novelty.Novelty(rows)
    inverse = np.linalg.inv(np.cov(rows.T, bias=True))

    def distance(points):
        offset = points - rows.mean(axis=0)
        return np.sqrt(np.einsum("ni,ij,nj->n", offset, inverse, offset))

    usual = np.median(distance(rows))
    assert np.median(of(known, rows)) == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(of(known, others), distance(others) / usual, rtol=2e-3)


def test_features_in_other_units_do_not_hide_the_rest():
    random = np.random.default_rng(0)
    rows = random.normal(size=(500, 10))
    strange = np.concatenate([np.full(9, 50.0), [0.0]])[None]
    plain = of(novelty.Novelty(rows), strange)
    units = np.array([1.0] * 9 + [1e6])
    np.testing.assert_allclose(of(novelty.Novelty(rows * units), strange * units), plain, rtol=0.02)


def test_what_leaves_the_rows_subspace_is_seen():
    """300 features, 60 rows: the axes hold twelve directions, the rest counts as well."""
    random = np.random.default_rng(1)
    rows = random.normal(size=(60, 4)) @ random.normal(size=(4, 300)) + random.normal(0, 0.1, (60, 300))
    known = novelty.Novelty(rows)
    off = rows + random.normal(0, 1.0, rows.shape)
    assert of(known, off).min() > 3 * of(known, rows).max()


def test_it_is_a_finite_number_however_far_away():
    known = novelty.Novelty(np.random.default_rng(0).normal(size=(200, 3)))
    far = [[1e6, 0, 0], [1e38, -1e38, 1e38], [np.inf, 0, -np.inf]]
    near, *farthest = of(known, np.array(far, np.float32))
    assert np.isfinite(farthest).all()
    assert 1e5 < near < min(farthest)


def test_digits_are_told_from_noise_strokes_and_blank_images():
    random = np.random.default_rng(0)
    images = load_digits().data
    random.shuffle(images)
    known, held_out = novelty.Novelty(images[:1000]), images[1000:]
    count = len(held_out)
    strokes = np.zeros((count, 8, 8))
    for image in strokes:
        for _ in range(random.integers(1, 4)):
            start, end = random.integers(0, 8, (2, 2))
            for share in np.linspace(0, 1, 12):
                image[tuple(np.rint(start + (end - start) * share).astype(int))] = 16
    strange = {
        "noise": random.uniform(0, 16, held_out.shape),
        "blank": np.full(held_out.shape, 1.0) * random.uniform(0, 16, (count, 1)),
        "strokes": strokes.reshape(count, -1),
    }
    for name, rows in strange.items():
        scores = np.concatenate([of(known, held_out), of(known, rows)])
        assert roc_auc_score(np.repeat([0, 1], count), scores) >= 0.95, name


def test_features_are_floating_of_fixed_size_and_not_too_many():
    spec = tf.TensorSpec
    found = {}

    def trace(image, word, free, numbers):
        found["all"] = novelty.features([image, word, free, numbers])
        found["none"] = novelty.features([word, free])
        return found["all"]

    traced = tf.function(trace).get_concrete_function(
        spec([None, 64, 64, 3]), spec([None], tf.string), spec([None, None, 4]), spec([None, 5])
    )
    assert found["none"] is None
    # 12,288 numbers are averaged over squares of two by two pixels.
    assert traced.outputs[0].shape == [None, 32 * 32 * 3 + 5]
    constant = novelty.Novelty(np.full((30, 4), 3.0))
    assert np.isfinite(of(constant, np.random.default_rng(0).normal(size=(5, 4)))).all()


def test_a_row_s_distance_does_not_depend_on_its_batch_mates():
    """512 features, enough for a matrix product whose order of additions depends on the number of rows."""
    random = np.random.default_rng(0)
    rows = random.normal(0.3, 1, (400, 20)) @ random.normal(size=(20, 512)) + random.normal(0, 0.3, (400, 512))
    rows = np.maximum(rows, 0).astype(np.float32)
    known = novelty.Novelty(rows[:300])
    alone = np.concatenate([of(known, rows[index : index + 1]) for index in range(len(rows))])
    # A float32's last digit.
    np.testing.assert_allclose(of(known, rows), alone, rtol=2.4e-7, atol=0)
