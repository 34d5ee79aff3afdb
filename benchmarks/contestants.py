"""Who is timed: every contestant answers "mean and deviation of T draws for these rows", each in its own way.

A contestant lives in a worker process of its own framework. This module holds what all share, and TensorFlow's: ours,
the eager loop, the `predict` loop, and the expert's folded `tf.function`. The peers' are in `benchmarks.peers`.
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks import nets

# Floats of the widest activation that one folded call may hold (64 MiB): more draws are split into equal calls, which
# is faster than one call whose every activation goes through main memory.
FOLDED_FLOATS = 2**24
# The same for calls that stay in the cache.
CACHED_FLOATS = 2**20
STEPS_FILE = "steps.pickle"

# Mean and standard deviation over the draws, each [rows, outputs].
Answer = tuple[np.ndarray, np.ndarray]


class Unsuitable(Exception):
    """A framework has no sensible way to run this network. `str()` says why."""


@dataclass(frozen=True)
class Run:
    """One contestant made ready for a cell: `begin()` once a cell, then `draw(begun)` for each `step` of new draws."""

    step: int
    draw: Callable[[Any], Answer]
    begin: Callable[[], Any] = lambda: None

    def answer(self, draws: int) -> Answer:
        """Any whole number of steps; mean and deviation are pooled."""
        begun = self.begin()
        calls = [self.draw(begun) for _ in range(draws // self.step)]
        if len(calls) == 1:
            return calls[0]
        means = np.stack([mean for mean, _ in calls])
        variances = np.stack([np.square(std) for _, std in calls])
        return means.mean(axis=0), np.sqrt(variances.mean(axis=0) + means.var(axis=0))

    def seconds(self, draws: int, timed_draws: int) -> float:
        """Processor seconds of an answer from `draws`, of which `timed_draws` are done, the rest taken to last as long.

        Of the whole process, whatever threads it has: the machine's other programs do not count.
        """
        if timed_draws == draws:
            start = time.process_time()
            self.answer(draws)
            return time.process_time() - start
        start = time.process_time()
        begun = self.begin()
        ready = time.process_time()
        for _ in range(timed_draws // self.step):
            self.draw(begun)
        return ready - start + (time.process_time() - ready) * draws / timed_draws


@dataclass(frozen=True)
class Packaging:
    """What publishing a model cost. Bytes: `graph` saved_model.pb, `variables` its folder, `weights` the parameters."""

    folder: Path
    seconds: float
    graph_bytes: int
    variables_bytes: int
    weights_bytes: int
    kept_bound_bytes: int


class Framework(Protocol):
    """One worker's contestants by name."""

    names: tuple[str, ...]

    def load(self, letter: str, folder: Path) -> Any: ...

    def ways(self, name: str, rows: int, draws: int) -> list[Run]:
        """All ways to this contestant's answer: the fastest counts."""
        ...

    def gemm(self, size: int) -> float: ...


def folded_draws(widest: int, rows: int, draws: int, floats: int = FOLDED_FLOATS) -> int:
    """Draws of one folded call: the largest divisor of `draws` whose widest activation stays within `floats`."""
    most = max(floats // (widest * rows), 1)
    return max(size for size in range(1, draws + 1) if draws % size == 0 and size <= most)


def fastest_gemm(multiply: Callable[[], Any], size: int) -> float:
    """GFLOP/s of the best of several products of two square matrices."""
    best = math.inf
    for _ in range(4):
        begin = time.process_time()
        multiply()
        best = min(best, time.process_time() - begin)
    return 2 * size**3 / best / 1e9


class TensorFlow:
    names = ("ours, kept masks", "ours, drawn masks", "eager loop", "predict loop", "folded tf.function")

    def __init__(self) -> None:
        import keras
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        self._tf, self._keras = tf, keras

    def load(self, letter: str, folder: Path) -> Packaging:
        """Build and publish the model; leave its steps in `folder` for the peers."""
        from models import engine
        from models.artifact import publish
        from models.contract import read_manifest
        from serving.graph import Graph

        subject = nets.SUBJECTS[letter]
        self._model = nets.build(subject)
        net = nets.steps_of(subject, self._model)
        (folder / STEPS_FILE).write_bytes(pickle.dumps(net))
        begin = time.perf_counter()
        artifact = publish(self._model, name=subject.name, repository=folder)
        seconds = time.perf_counter() - begin
        # As the server runs it: the artifact alone, in a session of its own.
        self._graph = Graph(artifact)
        (self._input,) = [item.name for item in read_manifest(artifact).inputs]
        self._net = net
        return Packaging(
            folder=artifact,
            seconds=seconds,
            graph_bytes=(artifact / "saved_model.pb").stat().st_size,
            variables_bytes=sum(path.stat().st_size for path in (artifact / "variables").iterdir()),
            weights_bytes=sum(weight.numpy().nbytes for weight in self._model.weights),
            kept_bound_bytes=engine.KEPT_BYTES,
        )

    def ways(self, name: str, rows: int, draws: int) -> list[Run]:
        x = self._tf.constant(nets.inputs(self._net.input_shape, rows))
        if name == "ours, kept masks":
            return [self._ours(x, draws, seed=0)]
        if name == "ours, drawn masks":
            return [self._ours(x, draws, seed=1)]
        if name == "eager loop":
            return [self._loop(lambda: self._model(x, training=True))]
        if name == "predict loop":
            always = self._always_training()
            array = x.numpy()
            return [self._loop(lambda: always.predict(array, batch_size=rows, verbose=0))]
        return [self._folded(x, rows, draws)]

    def gemm(self, size: int) -> float:
        a = self._tf.random.normal((size, size))
        return fastest_gemm(lambda: self._tf.matmul(a, a), size)

    def _ours(self, x: Any, draws: int, seed: int) -> Run:
        from models.contract import MC_SAMPLE, NUM_SAMPLES, SEED

        given = {self._input: x.numpy(), NUM_SAMPLES: draws, SEED: seed}
        # Of two classes from one sigmoid unit, the peers give the second.
        first = 1 if self._net.steps[-1].shape == (1,) else 0

        def answer(_: None) -> Answer:
            found = self._graph.run(MC_SAMPLE, given)
            return found["probabilities"][:, first:], found["std"][:, first:]

        return Run(draws, answer)

    def _loop(self, draw: Callable[[], Any]) -> Run:
        def one(_: None) -> Answer:
            found = np.asarray(draw())
            return found, np.zeros_like(found)

        return Run(1, one)

    def _always_training(self) -> Any:
        """`predict` sets training=False throughout a functional model; only a call() of one's own keeps dropout on."""
        inner = self._model

        class AlwaysTraining(self._keras.Model):  # type: ignore[name-defined]
            def call(self, inputs: Any) -> Any:
                return inner(inputs, training=True)

        return AlwaysTraining()

    def _folded(self, x: Any, rows: int, draws: int) -> Run:
        tf, model = self._tf, self._model
        step = folded_draws(self._net.widest(), rows, draws)

        @tf.function
        def folded(x: Any) -> Any:
            found = model(tf.repeat(x, step, axis=0), training=True)
            apart = tf.reshape(found, (rows, step, -1))
            return tf.reduce_mean(apart, axis=1), tf.math.reduce_std(apart, axis=1)

        def answer(_: None) -> Answer:
            mean, std = folded(x)
            return mean.numpy(), std.numpy()

        return Run(step, answer)
