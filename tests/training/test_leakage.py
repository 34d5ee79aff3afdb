"""Test rows have no say in what calibration fits."""

from dataclasses import replace

import numpy as np

from training.pipeline import train
from training.plan import plan
from training.progress import Reporter
from training.splits import split


def test_other_test_rows_change_no_fitted_figure(tmp_path):
    request = plan("wine", repository=tmp_path, seed=0, num_samples=20, epochs=2)
    data = request.data
    rows = split(data.y, data.task)
    x = data.x.copy()
    x[rows.test] += np.random.default_rng(0).normal(0, 100, x[rows.test].shape).astype(np.float32)
    usual, changed = (train(one, Reporter(quiet=True)) for one in (request, replace(request, data=replace(data, x=x))))
    assert usual.mc_metrics != changed.mc_metrics
    assert usual.manifest.calibration is not None
    assert changed.manifest.calibration == usual.manifest.calibration
