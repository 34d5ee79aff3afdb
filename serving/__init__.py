"""Artifact in, answers out: the server.

Read in this order:

- `settings`   what an operator may choose, from the environment
- `errors`     what can go wrong, each with its own message
- `graph`      TensorFlow, and it alone;  `runtime` one loaded artifact on it: NumPy arrays in, NumPy arrays out
- `batcher`    rows of concurrent requests put into one call, bounded and never blocking the event loop for long
- `core`       what every protocol calls: models, predictions, uncertainty
- `prediction_sets`  what calibration rows guarantee, at any coverage; which answers are withheld
- `instances`  JSON instances -> arrays;  `answers`  arrays -> JSON objects
- `web`        HTTP requests and answers on plain ASGI; `native`, `pages` are routes on it
- `open_inference`  the Open Inference Protocol, `/v2`;  `tensors`  what its tensors and gRPC's must be
- `grpc_server`  TensorFlow Serving's gRPC services, on a port of their own
- `app`        all routes in one ASGI application
- `service`    the BentoML service around it

Serving imports `models.contract` and nothing else of the project: no Keras, no training code.
"""
