"""Figures on held-out rows, by scikit-learn."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, log_loss, mean_absolute_error, mean_squared_error, root_mean_squared_error

from training.artifact_answers import Artifact
from training.datasets import Dataset

# Rows a call of a network.
BATCH = 4096


def evaluate(model: keras.Model, data: Dataset, rows: NDArray[np.int64]) -> dict[str, float]:
    """`figures` of the network with dropout off."""
    return figures(answers(model, data, rows), data, rows)


def answers(model: keras.Model, data: Dataset, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of the network with dropout off: probabilities [n, K] in the order of the labels, or the target [n]."""
    values = [model(data.network_input(part), training=False) for part in parts(rows)]
    answer = np.concatenate([keras.ops.convert_to_numpy(part) for part in values]).astype(np.float64)
    if data.task == "regression":
        return answer[:, 0]
    return np.hstack([1 - answer, answer]) if len(data.labels) == 2 else answer


def evaluate_artifact(artifact: Artifact, data: Dataset, rows: NDArray[np.int64]) -> dict[str, float]:
    """`figures` of the mean of the draws, as the artifact itself gives it with its own number of draws and seed."""
    key = "mean" if data.task == "regression" else "probabilities"
    return figures(artifact.served(data.tensors(rows))[key], data, rows)


def parts(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The rows in calls that fit into memory."""
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def evaluate_constant(data: Dataset, train_rows: NDArray[np.int64], rows: NDArray[np.int64]) -> dict[str, float]:
    """`figures` of one answer to every row, made of the training targets alone: what a network must beat."""
    y = data.y[train_rows]
    if data.task == "regression":
        return figures(np.full(len(rows), y.mean()), data, rows)
    shares = np.bincount(y, minlength=len(data.labels)) / len(y)
    return figures(np.tile(shares, (len(rows), 1)), data, rows)


def figures(answer: NDArray[Any], data: Dataset, rows: NDArray[np.int64]) -> dict[str, float]:
    """Metrics of answers to `rows` of the data: probabilities [N, K] in the order of the labels, or means [N].

    Classification: accuracy; nll, the mean negative log-likelihood in nats; brier, the mean over rows of the squared
    error summed over the classes (Brier 1950): 0 to 2, also with two classes.
    Regression: rmse and mae in the target's unit.
    """
    y = data.y[rows]
    if data.task == "regression":
        return {"rmse": float(root_mean_squared_error(y, answer)), "mae": float(mean_absolute_error(y, answer))}
    # A float32 softmax sums to 1 within 1e-7; scikit-learn wants float64's accuracy.
    probabilities = answer.astype(np.float64)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    classes = np.arange(len(data.labels))
    one_hot = (y[:, np.newaxis] == classes).astype(np.float64)
    return {
        "accuracy": float(accuracy_score(y, probabilities.argmax(axis=1))),
        "nll": float(log_loss(y, probabilities, labels=classes)),
        "brier": float(mean_squared_error(one_hot, probabilities) * len(classes)),
    }
