"""MLServer with a custom runtime over the same SavedModel: copied beside its settings, run in its own environment."""

from __future__ import annotations

import os

import tensorflow as tf
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class SavedModelRuntime(MLModel):
    async def load(self) -> bool:
        self._model = tf.saved_model.load(os.environ["BENCHMARK_ARTIFACT"])
        self._predict = self._model.signatures["serving_default"]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        features = self.decode(payload.inputs[0], default_codec=NumpyCodec)
        outputs = self._predict(features=tf.constant(features, tf.float32))
        answer = NumpyCodec.encode_output("probabilities", outputs["probabilities"].numpy())
        return InferenceResponse(model_name=self.name, outputs=[answer])
