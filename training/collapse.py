"""Networks that have stopped looking at their inputs, and answer the same to every row.

Rectifiers that are all dead, or a layer that dropout silenced while the learning rate was high, leave a constant: the
class shares, or the target's mean. Its loss is not bad, and better than that of a sharp net that is sure of its errors.
A search by the loss would choose it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from training.datasets import Dataset

# Of the targets' own spread. A net with anything to say is far above, a dead one at 0.
LEAST_SPREAD = 0.01
# Seeds that a final fit is tried with.
TRIES = 3


def is_constant(answer: NDArray[np.float64], data: Dataset, rows: NDArray[np.int64]) -> bool:
    """Whether answers to these rows, probabilities [n, K] or the target in its unit [n], are one answer to all.

    That is: their standard deviation over the rows is below `LEAST_SPREAD` of the targets' own, for every class. A
    single row tells nothing.
    """
    if len(rows) < 2:
        return False
    y = data.y[rows]
    if data.task == "classification":
        y = np.eye(len(data.labels))[y]
    return bool(np.all(answer.std(axis=0) <= LEAST_SPREAD * y.std(axis=0)))


def constant_answer(data: Dataset, train_rows: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """What the training targets say without any input: class shares [count, K], or their mean [count]."""
    y = data.y[train_rows]
    if data.task == "regression":
        return np.full(count, y.mean(dtype=np.float64))
    return np.tile(np.bincount(y, minlength=len(data.labels)) / len(y), (count, 1))
