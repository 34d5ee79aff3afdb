"""A plain BentoML service over the same SavedModel, with adaptive batching as BentoML's documentation shows it."""

from __future__ import annotations

import os

import bentoml
import numpy as np


@bentoml.service(workers=1, traffic={"timeout": 60})
class Plain:
    def __init__(self) -> None:
        import tensorflow as tf

        self._tensorflow = tf
        self._model = tf.saved_model.load(os.environ["BENCHMARK_ARTIFACT"])
        self._predict = self._model.signatures["serving_default"]

    @bentoml.api(batchable=True, max_batch_size=100, max_latency_ms=1000)
    def predict(self, instances: np.ndarray) -> np.ndarray:
        outputs = self._predict(features=self._tensorflow.constant(instances, self._tensorflow.float32))
        answer: np.ndarray = outputs["probabilities"].numpy()
        return answer
