"""Warm-up records: example requests that TensorFlow Serving, and our server, replay before a version takes traffic.

File format: TFRecord of `tensorflow.serving.PredictionLog` (tensorflow/serving, `saved_model_warmup.md`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from models.contract import MC_DRAWS, MC_SAMPLE, NUM_SAMPLES, SEED, SIGNATURES, WARMUP_FILE


def write(folder: Path, model_name: str, inputs: Mapping[str, np.ndarray], num_samples: int, seed: int) -> None:
    """One record for each signature, with `inputs` (arrays [N, ...] by input name) as its rows."""
    path = folder / WARMUP_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for signature in SIGNATURES:
            log = prediction_log_pb2.PredictionLog()
            request = log.predict_log.request
            request.model_spec.name = model_name
            request.model_spec.signature_name = signature
            for name, array in inputs.items():
                request.inputs[name].CopyFrom(tf.make_tensor_proto(array))
            if signature in (MC_SAMPLE, MC_DRAWS):
                request.inputs[NUM_SAMPLES].CopyFrom(tf.make_tensor_proto(np.int32(num_samples)))
                request.inputs[SEED].CopyFrom(tf.make_tensor_proto(np.int64(seed)))
            writer.write(log.SerializeToString())
