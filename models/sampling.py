"""As many rows as a bound allows. A random choice, not the first ones: files are often sorted by class or by target."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def some(rows: Array, most: int) -> Array:
    """`most` of the rows [N, ...], in their order, or all of them; arrays as long as each other lose the same rows."""
    count = len(rows)
    if count <= most:
        return rows
    return rows[np.sort(np.random.default_rng(count).choice(count, most, replace=False))]
