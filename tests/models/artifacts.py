"""An artifact as any SavedModel runtime sees it, with NumPy arrays in and out."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from models.contract import read_manifest


class Artifact:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.loaded = tf.saved_model.load(str(folder))

    @property
    def forms(self) -> dict[tuple[int, int], Any]:
        """Forms of `mc_predict`, functions by the least and the most rows."""
        found = {name: re.fullmatch(r"mc_predict_rows_(\d+)_to_(\d+)", name) for name in dir(self.loaded)}
        return {(int(m[1]), int(m[2])): getattr(self.loaded, name) for name, m in found.items() if m is not None}

    def answer(self, signature: str, inputs: Any, **arguments: int) -> dict[str, np.ndarray]:
        """inputs: one array, or arrays by input name; arguments: num_samples, seed."""
        outputs = self.loaded.signatures[signature](**self.tensors(inputs), **_scalars(arguments))
        return {name: value.numpy() for name, value in outputs.items()}

    def sample(self, inputs: Any, num_samples: int, seed: int = 0) -> dict[str, np.ndarray]:
        return self.answer("mc_sample", inputs, num_samples=num_samples, seed=seed)

    def draws(self, inputs: Any, num_samples: int, seed: int = 0) -> np.ndarray:
        (values,) = self.answer("mc_draws", inputs, num_samples=num_samples, seed=seed).values()
        return values

    def adaptive(self, inputs: Any, tolerance: float, max_samples: int, seed: int = 0) -> dict[str, np.ndarray]:
        outputs = self.loaded.mc_adaptive(
            **self.tensors(inputs),
            tolerance=tf.constant(tolerance, tf.float32),
            **_scalars({"max_samples": max_samples, "seed": seed}),
        )
        return {name: value.numpy() for name, value in outputs.items()}

    def tensors(self, inputs: Any) -> dict[str, tf.Tensor]:
        specs = self.manifest.inputs
        named = inputs if isinstance(inputs, dict) else {specs[0].name: inputs}
        return {spec.name: tf.constant(named[spec.name], spec.dtype) for spec in specs}


def _scalars(arguments: dict[str, int]) -> dict[str, tf.Tensor]:
    return {name: tf.constant(value, tf.int64 if name == "seed" else tf.int32) for name, value in arguments.items()}
