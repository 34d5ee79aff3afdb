"""What Prometheus is told: requests, queues, batches, draws, versions, and uncertainty itself.

Counting on the path of a request is a look-up and an addition in a list, 10 times cheaper than prometheus-client's own
counters in files; its families are made when somebody asks. Statistics of answers are kept aside and counted together.

All counts are sums, so that those of several workers add up: each one writes its own into a folder that they share
once a second, and whoever is asked adds the others'.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
import structlog
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from models.contract import ABSTAIN
from serving import drift
from serving.graph import Arrays
from serving.prediction_sets import withheld
from serving.runtime import Model

log = structlog.get_logger()

Labels = tuple[str, ...]
# One series: a counter's or gauge's value; of a histogram, the observations in each bin and their sum.
Cells = list[float]
Shelves = dict[Labels, Cells]

# Rows of answers that are kept aside before they are counted, at most.
PENDING_ROWS = 4_096

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_POWERS_OF_TWO = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_024, 2_048, 4_096)
_ENTROPY = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1, 1.5, 2, 3, 5, 7)
_MUTUAL_INFORMATION = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 2)
# Of the target's unit, which may be anything.
_DEVIATION = tuple(step * 10.0**power for power in range(-3, 4) for step in (1, 2, 5))

# Of the median distance of the rows that the features were fitted on.
_NOVELTY = (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 5, 7, 10, 20, 50, 100, 1_000)

_VERSION = ("model", "version")
_REQUEST = ("protocol", "operation", *_VERSION)
_CALL = (*_VERSION, "signature")
_OUTPUT = (*_VERSION, "output")
_SHADOW = (*_VERSION, "shadow")

_DIFFERENCE = (1e-6, 1e-5, 1e-4, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 10, 100)


@dataclass(frozen=True)
class Family:
    kind: Literal["counter", "gauge", "histogram"]
    name: str
    help: str
    labels: Labels
    bounds: tuple[float, ...] = ()
    """Upper bounds of a histogram's bins, but for the last one, which has none."""

    def blank(self) -> Cells:
        return [0] * (len(self.bounds) + 2) if self.kind == "histogram" else [0]


FAMILIES = {
    family.name: family
    for family in (
        Family("counter", "dropserve_requests", "Answered requests.", (*_REQUEST, "code")),
        Family("histogram", "dropserve_request_seconds", "From a request's head to its answer.", _REQUEST, _SECONDS),
        Family(
            "histogram",
            "dropserve_queue_seconds",
            "From a request's arrival at the queue to its call.",
            _CALL,
            _SECONDS,
        ),
        Family("histogram", "dropserve_call_seconds", "Calls of the model, each for a batch.", _CALL, _SECONDS),
        Family("histogram", "dropserve_batch_rows", "Rows in one call.", _CALL, _POWERS_OF_TWO),
        Family("histogram", "dropserve_batch_requests", "Requests in one call.", _CALL, _POWERS_OF_TWO),
        Family("counter", "dropserve_rows", "Rows computed, a shadow's too.", _CALL),
        Family("counter", "dropserve_row_draws", "Rows x draws computed, a shadow's too.", _CALL),
        Family("gauge", "dropserve_open_requests", "Requests in the queue or in a call.", ()),
        Family("gauge", "dropserve_open_row_draws", "Rows x draws in the queue or in a call.", ()),
        Family(
            "counter",
            "dropserve_reloads",
            "Versions that were loaded, refused as broken, or retired.",
            ("model", "result"),
        ),
        Family("gauge", "dropserve_version_state", "1 for the state that a version is in.", (*_VERSION, "state")),
        Family("gauge", "dropserve_broken_versions", "Versions on disk that cannot be served.", ("model",)),
        Family("histogram", "dropserve_predictive_entropy", "Of the answers, in nats.", _OUTPUT, _ENTROPY),
        Family("histogram", "dropserve_mutual_information", "Of the answers, in nats.", _OUTPUT, _MUTUAL_INFORMATION),
        Family("histogram", "dropserve_epistemic_std", "Of the answers, in the target's unit.", _OUTPUT, _DEVIATION),
        Family("histogram", "dropserve_novelty", "Of the rows; 1 is a usual one.", _OUTPUT, _NOVELTY),
        Family("counter", "dropserve_decisions", "Answers that could have been withheld.", (*_OUTPUT, "abstain")),
        Family("gauge", "dropserve_abstention_share", "Withheld of the answers in the drift window.", _OUTPUT),
        Family("gauge", "dropserve_reference_abstention_share", "Withheld on the calibration rows.", _OUTPUT),
        Family(
            "gauge",
            "dropserve_drift_score",
            "Population stability index of the answers in the drift window against the calibration rows: "
            "below 0.1 none, above 0.25 large.",
            (*_OUTPUT, "statistic"),
        ),
        Family("gauge", "dropserve_drift_rows", "Answers in the drift window.", (*_OUTPUT, "statistic")),
        Family("counter", "dropserve_shadow_requests", "Requests for a shadow, by result.", (*_SHADOW, "result")),
        Family(
            "counter",
            "dropserve_shadow_rows",
            "Rows that a shadow answered too: whether with the same label.",
            (*_SHADOW, "output", "agrees"),
        ),
        Family(
            "histogram",
            "dropserve_shadow_difference",
            "Largest difference between a shadow's answer and the one that was sent, in each row.",
            (*_SHADOW, "output", "statistic"),
            _DIFFERENCE,
        ),
    )
}


# Given and withheld answers, as bins of a window.
_DECISIONS = drift.Bins(np.array([0.5]), np.array([1.0, 0.0]))


@dataclass
class _Window:
    """The last rows' values of one statistic in bins: at least as many as the window, at most twice that."""

    bins: drift.Bins
    cells: Cells
    """The bins of the rows that are being collected, then those of the window before."""

    def add(self, values: np.ndarray, rows: int) -> None:
        size = len(self.bins.expected)
        for index, count in enumerate(self.bins.counts(values).tolist()):
            self.cells[index] += count
        if sum(self.cells[:size]) >= rows:
            self.cells = [0.0] * size + self.cells[:size]


class Metrics(Collector):
    """Counts of one worker. All methods but `collect` are called on the event loop, and so is `collect` here."""

    def __init__(self, drift_window_rows: int, folder: Path | None = None) -> None:
        """drift_window_rows: of how many answers the drift score speaks. folder: shared by the workers of a server."""
        self._window_rows = drift_window_rows
        self._file = None if folder is None else folder / f"metrics-{os.getpid()}.json"
        self._written = b""
        # Whether the last write has failed.
        self._is_unwritten = False
        self._series: dict[str, Shelves] = {name: {} for name in FAMILIES}
        self._windows: dict[Labels, _Window] = {}
        self._references: dict[Labels, float] = {}
        self._pending: dict[Model, list[tuple[Arrays, bool]]] = {}
        self._pending_rows = 0

    # On the path of a request.

    def request(self, protocol: str, operation: str, model: Model | None, code: str, seconds: float) -> None:
        name, version = ("", "") if model is None else model.identity
        self._observe("dropserve_request_seconds", (protocol, operation, name, version), seconds)
        self.count("dropserve_requests", (protocol, operation, name, version, code), 1)

    def call(
        self, model: Model, signature: str, waits_s: Sequence[float], rows: int, row_draws: int, seconds: float
    ) -> None:
        """One call of the model: for how many rows, and how long each of its requests waited for it."""
        labels = (*model.identity, signature)
        cells = self._series["dropserve_queue_seconds"].setdefault(labels, [0] * (len(_SECONDS) + 2))
        for wait in waits_s:
            cells[bisect_left(_SECONDS, wait)] += 1
        cells[-1] += sum(waits_s)
        self._observe("dropserve_batch_rows", labels, rows)
        self._observe("dropserve_batch_requests", labels, len(waits_s))
        self._observe("dropserve_call_seconds", labels, seconds)
        self.count("dropserve_rows", labels, rows)
        self.count("dropserve_row_draws", labels, row_draws)

    def drawn(self, model: Model, arrays: Arrays, rows: int, default_draws: bool) -> None:
        """Statistics of draws of some rows. default_draws: as many as the reference was made with."""
        kept = {tensor: arrays[tensor] for tensor in model.watched_tensors}
        if not kept:
            return
        self._pending.setdefault(model, []).append((kept, default_draws))
        self._pending_rows += rows
        if self._pending_rows >= PENDING_ROWS:
            self._settle()

    def _observe(self, family: str, labels: Labels, value: float) -> None:
        cells = self._series[family].get(labels)
        if cells is None:
            cells = self._series[family][labels] = FAMILIES[family].blank()
        cells[bisect_left(FAMILIES[family].bounds, value)] += 1
        cells[-1] += value

    def count(self, family: str, labels: Labels, value: float) -> None:
        cells = self._series[family].get(labels)
        if cells is None:
            cells = self._series[family][labels] = FAMILIES[family].blank()
        cells[0] += value

    # Beside it.

    def loaded(self, model: Model) -> None:
        """A version may answer: its windows stand ready, for other workers' rows too."""
        self.count("dropserve_reloads", (model.name, "loaded"), 1)
        for output, statistics in model.watched:
            calibrated = model.manifest.calibrated(output)
            if calibrated is None:
                continue
            reference = calibrated.reference
            labels = (*model.identity, output.name)
            for statistic, _ in statistics:
                quantiles = getattr(reference, statistic)
                if quantiles is not None:
                    self._window((*labels, statistic), drift.bins(quantiles))
            if calibrated.abstention is not None:
                self._window((*labels, ABSTAIN), _DECISIONS)
            if reference.abstention_share is not None:
                self._references[labels] = reference.abstention_share

    def reloaded(self, model: str, result: Literal["refused", "retired"]) -> None:
        self.count("dropserve_reloads", (model, result), 1)

    def gauge(self, family: str, values: dict[Labels, float]) -> None:
        """Set a whole family."""
        self._series[family] = {labels: [value] for labels, value in values.items()}

    def forget(self, model: str, version: str) -> None:
        """Say nothing more of a version that is neither loaded nor on disk."""
        for name, shelves in self._series.items():
            if "version" in FAMILIES[name].labels:
                where = FAMILIES[name].labels.index("model")
                for labels in [labels for labels in shelves if labels[where : where + 2] == (model, version)]:
                    del shelves[labels]
        for kept in (self._windows, self._references):
            for labels in [labels for labels in kept if labels[:2] == (model, version)]:
                del kept[labels]

    def write(self) -> None:
        """Let the other workers see what was counted; does nothing where there are none, or nothing is new."""
        self._settle()
        if self._file is None:
            return
        content = orjson.dumps(
            {
                "series": {name: list(shelves.items()) for name, shelves in self._series.items()},
                "windows": [(labels, window.cells) for labels, window in self._windows.items()],
            }
        )
        if content == self._written:
            return
        staging = self._file.with_suffix(".staging")
        try:
            staging.write_bytes(content)
            staging.replace(self._file)
        except OSError as error:
            # A full disk: this worker's own counts are as they were, and the next write may go through.
            if not self._is_unwritten:
                log.error("other workers cannot see this one's metrics", reason=str(error))
            self._is_unwritten = True
            return
        self._written, self._is_unwritten = content, False

    def _window(self, labels: Labels, bins: drift.Bins) -> _Window:
        if labels not in self._windows:
            self._windows[labels] = _Window(bins, [0.0] * (2 * len(bins.expected)))
        return self._windows[labels]

    def _settle(self) -> None:
        """Count the statistics that were kept aside."""
        pending, self._pending, self._pending_rows = self._pending, {}, 0
        for model, parts in pending.items():
            arrays = {name: np.concatenate([own[name] for own, _ in parts]) for name in parts[0][0]}
            # Of each row, whether it had as many draws as the reference.
            usual = np.concatenate([np.full(len(next(iter(own.values()))), default) for own, default in parts])
            for output, statistics in model.watched:
                labels = (*model.identity, output.name)
                for statistic, tensor in statistics:
                    values = arrays[tensor]
                    # Answers that were refused are not finite.
                    known = np.isfinite(values)
                    self.observe_all(f"dropserve_{statistic}", labels, values[known])
                    window = self._windows.get((*labels, statistic))
                    if window is not None:
                        window.add(values[known & usual], self._window_rows)

            for output, abstention in model.sets.at().decisions:
                self._decide((*model.identity, output.name), withheld(output, abstention, arrays), usual)

    def _decide(self, labels: Labels, decisions: np.ndarray, usual: np.ndarray) -> None:
        """Count which answers of an output were withheld."""
        self.count("dropserve_decisions", (*labels, "true"), int(decisions.sum()))
        self.count("dropserve_decisions", (*labels, "false"), int((~decisions).sum()))
        window = self._windows.get((*labels, ABSTAIN))
        if window is not None:
            window.add(decisions[usual], self._window_rows)

    def observe_all(self, family: str, labels: Labels, values: np.ndarray) -> None:
        """Many observations at once."""
        bounds = FAMILIES[family].bounds
        cells = self._series[family].setdefault(labels, FAMILIES[family].blank())
        counts = np.bincount(np.searchsorted(bounds, values, side="left"), minlength=len(bounds) + 1)
        for index, count in enumerate(counts.tolist()):
            cells[index] += count
        cells[-1] += float(values.sum())

    # When somebody asks.

    def collect(self) -> Iterator[Metric]:
        """The families, with the counts of all workers."""
        self.write()
        series = {name: {key: list(cells) for key, cells in shelves.items()} for name, shelves in self._series.items()}
        windows = {labels: list(window.cells) for labels, window in self._windows.items()}
        for other, alive in self._others():
            for name, shelves in other["series"].items():
                if FAMILIES[name].kind != "gauge" or (alive and not FAMILIES[name].labels):
                    _merge(series[name], shelves)
            # A window that this worker does not know belongs to a version that it does not serve.
            _merge(windows, [(key, cells) for key, cells in other["windows"] if tuple(key) in windows])
        self._judge(series, windows)
        for name, shelves in series.items():
            yield _exposed(FAMILIES[name], shelves)

    def _judge(self, series: dict[str, Shelves], windows: dict[Labels, Cells]) -> None:
        """The gauges that follow from the windows."""
        for labels, cells in windows.items():
            size = len(cells) // 2
            counts = [new + old for new, old in zip(cells[:size], cells[size:], strict=True)]
            if labels[-1] == ABSTAIN:
                if sum(counts):
                    series["dropserve_abstention_share"][labels[:-1]] = [counts[1] / sum(counts)]
                continue
            series["dropserve_drift_rows"][labels] = [sum(counts)]
            score = drift.stability_index(counts, self._windows[labels].bins.expected)
            if score is not None:
                series["dropserve_drift_score"][labels] = [score]
        for labels, share in self._references.items():
            series["dropserve_reference_abstention_share"][labels] = [share]

    def _others(self) -> Iterator[tuple[Any, bool]]:
        """What the other workers have counted, also those that are gone; and whether they are alive."""
        if self._file is None:
            return
        for path in self._file.parent.glob("metrics-*.json"):
            if path != self._file:
                try:
                    os.kill(int(path.stem.rpartition("-")[2]), 0)
                except OSError:
                    alive = False
                else:
                    alive = True
                yield orjson.loads(path.read_bytes()), alive


def _merge(into: Shelves, others: Iterable[tuple[Iterable[str], Cells]]) -> None:
    for key, cells in others:
        labels = tuple(key)
        into[labels] = [own + other for own, other in zip(into.get(labels, [0] * len(cells)), cells, strict=True)]


def _exposed(family: Family, shelves: Shelves) -> Metric:
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(family.name, family.help, labels=family.labels)
        names = [*(f"{bound:g}" for bound in family.bounds), "+Inf"]
        for labels, cells in shelves.items():
            cumulative = np.cumsum(cells[:-1]).tolist()
            histogram.add_metric(labels, list(zip(names, cumulative, strict=True)), cells[-1])
        return histogram
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = kind(family.name, family.help, labels=family.labels)
    for labels, cells in shelves.items():
        metric.add_metric(labels, cells[0])
    return metric
