"""Rows that are unlike the data, made from the rows at hand: what a model should call strange.

Images: noise, blank ones, strokes. Tables of numbers: rows far outside, and rows whose columns do not belong together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.contract import Manifest

Array = NDArray[Any]

# Made of each kind.
ROWS = 200
# Interquartile ranges from the median, for rows far outside of a table.
FAR = 5.0
# Of one image of strokes.
STROKES = 3


def made(manifest: Manifest, inputs: Mapping[str, Array], seed: int = 0) -> dict[str, dict[str, Array]]:
    """Inputs [M, ...] by kind of outlier; none for networks whose input is neither images nor a table of numbers."""
    if len(manifest.inputs) != 1 or not manifest.inputs[0].dtype.startswith("float"):
        return {}
    name, rows = manifest.inputs[0].name, next(iter(inputs.values()))
    generator = np.random.default_rng(seed)
    kinds: dict[str, Callable[[Array, np.random.Generator], Array]] = {}
    if rows.ndim == 4:
        kinds = {"noise": noise, "blank": blank, "strokes": strokes}
    elif rows.ndim == 2 and rows.shape[1] > 1:
        kinds = {"far": far, "shuffled": shuffled}
    return {kind: {name: make(rows, generator).astype(np.float32)} for kind, make in kinds.items()}


def noise(images: Array, generator: np.random.Generator) -> Array:
    """Every pixel of its own, uniform between the darkest and the brightest of the images."""
    return generator.uniform(images.min(), images.max(), (ROWS, *images.shape[1:]))


def blank(images: Array, generator: np.random.Generator) -> Array:
    """One grey all over, from the darkest to the brightest."""
    grey = np.linspace(images.min(), images.max(), ROWS)
    return np.broadcast_to(grey.reshape(-1, 1, 1, 1), (ROWS, *images.shape[1:]))


def strokes(images: Array, generator: np.random.Generator) -> Array:
    """Straight strokes between random points, as of letters of no alphabet, dark ground and bright ink."""
    _, height, width, channels = images.shape
    drawn = np.full((ROWS, height, width), images.min(), np.float64)
    steps = np.linspace(0, 1, 4 * max(height, width))[:, None]
    for canvas in drawn:
        for start, end in generator.uniform(0, 1, (STROKES, 2, 2)):
            points = np.rint((start + (end - start) * steps) * [height - 1, width - 1]).astype(int)
            canvas[points[:, 0], points[:, 1]] = images.max()
    return np.repeat(drawn[..., None], channels, axis=-1)


def far(rows: Array, generator: np.random.Generator) -> Array:
    """Each number FAR interquartile ranges from its median, up or down."""
    quarter, median, three = np.nanquantile(rows, [0.25, 0.5, 0.75], axis=0)
    spread = np.where(three > quarter, three - quarter, np.nanstd(rows, axis=0))
    return median + FAR * spread * generator.choice([-1.0, 1.0], (ROWS, rows.shape[1]))


def shuffled(rows: Array, generator: np.random.Generator) -> Array:
    """Each column drawn from the rows on its own: every number is usual, and they do not belong together."""
    chosen = generator.integers(0, len(rows), (ROWS, rows.shape[1]))
    return np.take_along_axis(rows, chosen, axis=0)
