"""One loaded artifact: NumPy arrays in, NumPy arrays out.

`Model.load(folder)`: digests verified, graph loaded, everything warmed up and its cost measured.
No transport, no JSON, no event loop: any thread may call a loaded model.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from models import contract
from models.contract import ArtifactError, Manifest
from serving.answers import AnswerWriter
from serving.graph import Arrays, Graph, first_line
from serving.instances import InstanceReader
from serving.prediction_sets import PredictionSets, needed

# Rows of the warm-up calls: one, as most requests have, and batches, which may take other kernels and cost less a row.
WARMUP_ROWS = (1, 16, 64)
# Larger batches are not tried when a call takes so long, in seconds: what they cost is seen by then.
WARMUP_ENOUGH_S = 0.005
# Calls whose fastest run is taken as the cost of a call.
WARMUP_REPEATS = 3


@dataclass
class Cost:
    """How long a call takes: `fixed + variable x (rows x draws)`, measured when the model was warmed up. Seconds.

    A row that is longer than the warm-up's counts as so many rows as it is times longer.
    """

    fixed: float = 0.0
    variable: float = 0.0

    def seconds(self, row_draws: float) -> float:
        return self.fixed + self.variable * row_draws


# Statistics that are watched for drift, where an output has them: one number a row.
WATCHED = ("predictive_entropy", "mutual_information", "epistemic_std", contract.NOVELTY)


def watched(manifest: Manifest, output: contract.ModelOutput) -> list[tuple[str, str]]:
    """The statistics of an output that are watched, and their tensors."""
    tensors = _tensors_of_rows(manifest)
    return [(name, f"{output.prefix}{name}") for name in WATCHED if f"{output.prefix}{name}" in tensors]


def _tensors_of_rows(manifest: Manifest) -> set[str]:
    """Tensors of the draws that have one number a row."""
    return {tensor.name for tensor in manifest.signatures[contract.MC_SAMPLE].outputs if len(tensor.shape) == 1}


@dataclass(eq=False)
class Model:
    """One version of one model, loaded, warmed up and ready to answer from any thread.

    Whoever answers a request holds a reference to it: when the last one goes, the graph's memory is given back.
    """

    manifest: Manifest
    folder: Path
    reader: InstanceReader
    _graph: Graph = field(repr=False)
    costs: dict[str, Cost] = field(default_factory=dict)
    draw_values: int = 0
    """Values of one draw of one row in the answers of `mc_draws`, as the warm-up has seen them."""
    mean_values: int = 1
    """Values of one row's mean of the draws, likewise."""

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def version(self) -> str:
        return str(self.manifest.version)

    @cached_property
    def identity(self) -> tuple[str, str]:
        """Name and version, as metrics and logs say them."""
        return self.name, self.version

    @property
    def signature_defs(self) -> dict[str, Any]:
        """The SavedModel's own description of its signatures: SignatureDef messages by name."""
        return self._graph.signature_defs

    @cached_property
    def free_inputs(self) -> dict[str, int]:
        """Inputs whose rows may differ in shape from request to request: how many values a row of the warm-up has."""
        free = [item.name for item in self.manifest.inputs if None in item.shape]
        return {name: max(1, self.warmup_inputs(1)[name].size) for name in free}

    def row_length(self, inputs: Arrays) -> float:
        """How many times longer rows are than those that `costs` were measured with; at least 1.

        inputs: [N, ...] by name. Of several free inputs the one counts that has grown most: any of them may be what
        the work is spent on.
        """
        rows = len(next(iter(inputs.values())))
        grown = [inputs[name].size / (rows * measured) for name, measured in self.free_inputs.items()]
        return max([1.0, *grown])

    def call_rows(self, inputs: Arrays, draws: int) -> int:
        """Rows of one call at most: of large maps a few have as many draws in memory as a call may."""
        # An answer with free axes has them from its rows.
        return contract.drawn_rows(math.ceil(self.mean_values * self.row_length(inputs)), draws)

    @cached_property
    def watched(self) -> tuple[tuple[contract.ModelOutput, list[tuple[str, str]]], ...]:
        """The statistics of each output that are watched, with their tensors."""
        return tuple((output, watched(self.manifest, output)) for output in self.manifest.outputs)

    @cached_property
    def watched_tensors(self) -> tuple[str, ...]:
        """What of the draws metrics are made of: the statistics, and whether answers are withheld."""
        tensors = {tensor.name for tensor in self.manifest.signatures[contract.MC_SAMPLE].outputs}
        names = [tensor for _, statistics in self.watched for _, tensor in statistics]
        for output, abstention in self.sets.at().decisions:
            own = f"{output.prefix}{contract.ABSTAIN}"
            names.append(own if own in tensors else f"{output.prefix}{needed(abstention)}")
        return tuple(names)

    @cached_property
    def writer(self) -> AnswerWriter:
        """Arrays of outputs as answers."""
        return AnswerWriter(self.manifest)

    @cached_property
    def sets(self) -> PredictionSets:
        """Prediction sets and intervals of any coverage."""
        return PredictionSets(self.manifest)

    @classmethod
    def load(cls, folder: Path, functions: Collection[str] = contract.FUNCTIONS) -> Self:
        """Verify, load and warm up one artifact folder; raises ArtifactError with one line on anything unusable.

        functions: those that will be called, for who wants one of them and cannot wait for all.
        """
        manifest = contract.verify(folder)
        try:
            graph = Graph(folder, functions)
        except Exception as error:  # whatever a foreign or damaged graph makes TensorFlow raise
            raise ArtifactError(f"{folder}: TensorFlow cannot load the graph: {first_line(error)}") from error
        model = cls(manifest, folder, InstanceReader(manifest), graph)
        weakref.finalize(model, graph.close)
        try:
            model._warm_up(functions)
        except Exception as error:  # the same
            raise ArtifactError(f"{folder}: it does not answer its own examples: {first_line(error)}") from error
        return model

    def run(self, function: str, arguments: Mapping[str, Any]) -> Arrays:
        """Call a signature, or `mc_adaptive`: inputs [N, ...] by name, and the scalars that it takes.

        Raises InvalidRequest where the graph refuses the values, ModelFailed where it cannot run.
        """
        return self._graph.run(function, arguments)

    def warmup_inputs(self, rows: int) -> Arrays:
        """The manifest's examples, repeated to `rows` rows."""
        examples = self.manifest.examples
        if not examples:
            return self.reader.blank(rows)
        return self.reader.read([examples[row % len(examples)] for row in range(rows)])

    def _warm_up(self, functions: Collection[str]) -> None:
        """Run each function once at each warm-up size; measure what predictions and MC calls cost."""
        seed = np.int64(self.manifest.seed)
        settings = {contract.NUM_SAMPLES: np.int32(self.manifest.num_samples), contract.SEED: seed}
        adaptive = {
            contract.SEED: seed,
            contract.TOLERANCE: np.float32(1.0),
            contract.MAX_SAMPLES: np.int32(self.manifest.num_samples),
        }
        sampling: dict[str, dict[str, Any]] = {contract.MC_SAMPLE: settings, contract.MC_PREDICT: {}}
        sampled = next((name for name in sampling if name in functions), None)
        if sampled is not None:
            drawn = self.run(sampled, {**self.warmup_inputs(1), **sampling[sampled]})
            means = (
                f"{output.prefix}{'mean' if output.task == 'regression' else 'probabilities'}"
                for output in self.manifest.outputs
            )
            self.mean_values = max(sum(drawn[name].size for name in means), 1)
        # Of large maps, no more than a call may have.
        most = max(2, contract.drawn_rows(self.mean_values, self.manifest.num_samples))
        sizes = sorted({min(rows, most) for rows in WARMUP_ROWS})
        for function, scalars, draws in (
            (contract.SERVING_DEFAULT, {}, 1),
            (contract.MC_SAMPLE, settings, self.manifest.num_samples),
            (contract.MC_PREDICT, {}, self.manifest.num_samples),
            (contract.MC_DRAWS, settings, self.manifest.num_samples),
            (contract.MC_ADAPTIVE, adaptive, self.manifest.num_samples),
        ):
            if function not in functions:
                continue
            if function == contract.MC_PREDICT:
                for rows in self._graph.form_rows:
                    self.run(function, self.warmup_inputs(rows))
            self.costs[function] = self._cost(function, scalars, sizes, draws)
        if contract.MC_DRAWS in functions:
            drawn = self.run(contract.MC_DRAWS, {**self.warmup_inputs(1), **settings})
            self.draw_values = sum(values.size for values in drawn.values()) // self.manifest.num_samples

    def _cost(self, function: str, scalars: Mapping[str, Any], sizes: Sequence[int], draws: int) -> Cost:
        """A line through the two largest batches that are tried."""
        points: list[tuple[int, float]] = []
        for rows in sizes:
            points.append((rows * draws, self._measure(function, {**self.warmup_inputs(rows), **scalars})))
            if len(points) > 1 and points[-1][1] > WARMUP_ENOUGH_S:
                break
        (few, less), (many, more) = points[-2:]
        variable = max(0.0, (more - less) / (many - few))
        return Cost(fixed=max(0.0, less - variable * few), variable=variable)

    def _measure(self, function: str, arguments: Mapping[str, Any]) -> float:
        """Seconds of the fastest of a few calls, after one that is not counted."""
        self.run(function, arguments)
        fastest = float("inf")
        for _ in range(WARMUP_REPEATS):
            start = time.perf_counter()
            self.run(function, arguments)
            fastest = min(fastest, time.perf_counter() - start)
        return fastest
