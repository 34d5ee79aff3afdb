"""How well a score tells rows that are unlike the training data from rows that are like it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

Array = NDArray[Any]

# Share of the outliers that must be found, for the false alarms.
FOUND_SHARE = 0.95


def outlier_scores(known: Array, outliers: Array) -> dict[str, float]:
    """auroc; aupr, outliers being the positives; fpr95: the share of known rows that raise an alarm at the threshold
    that finds 95 % of the outliers.

    known [N], outliers [M]: the score, higher for what is stranger.
    Source: Hendrycks & Gimpel 2017; Liang, Li & Srikant 2018 for fpr95.
    """
    is_outlier = np.repeat([0, 1], [len(known), len(outliers)])
    score = np.concatenate([known, outliers]).astype(np.float64)
    alarms, found, _ = roc_curve(is_outlier, score, drop_intermediate=False)
    return {
        "auroc": float(roc_auc_score(is_outlier, score)),
        "aupr": float(average_precision_score(is_outlier, score)),
        "fpr95": float(alarms[found >= FOUND_SHARE].min()),
    }
