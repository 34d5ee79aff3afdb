"""The parts of a job, scored by the workers of Ray Data: this machine's cores, or a cluster that sees the same files.

The unit is the part, from reading to its rename, by the same function as without Ray; what goes through Ray are the
parts' descriptions. So nothing depends on which worker scored what, and a worker that is lost costs its part at most.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from serving.scoring.errors import RowRefused, ScoreError
from serving.scoring.job import Advance, Engine, Job, load_scorer
from serving.scoring.parts import score_part
from serving.scoring.sources import Part

# Ray keeps 30 % of the memory for data by itself; here only descriptions of parts pass.
OBJECT_STORE_BYTES = 100 * 2**20


class Worker:
    """Loads the model once, on a core or a GPU of its own, and scores the parts that it is given."""

    def __init__(self, job: Job, strict: bool) -> None:
        self._job = job
        self._strict = strict
        self._scorer = load_scorer(job.artifact, job.form)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        part = Part.model_validate_json(row["part"])
        try:
            score_part(self._scorer, part, self._job.target.shelf, threads=1, strict=self._strict)
        except RowRefused as error:
            return {"rows": part.rows, "refused": str(error), "failed": ""}
        except ScoreError as error:
            return {"rows": part.rows, "refused": "", "failed": str(error)}
        return {"rows": part.rows, "refused": "", "failed": ""}


def engine(address: str | None) -> Engine:
    """Ray on this machine (None), or at an address as `ray.init` takes it; raises ScoreError where Ray is not there."""
    # Nothing is told to anybody.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray's workers give way to every other program of the machine (by 15), which scoring without Ray does not.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ScoreError("--ray: Ray is not installed; wanted `pip install 'dropserve[ray]'`") from error

    def run(job: Job, pending: list[Part], strict: bool, advance: Advance) -> None:
        _start(address)
        try:
            _score(job, pending, strict, advance)
        finally:
            ray.shutdown()

    return run


def _start(address: str | None) -> None:
    import ray

    # It tells of every start and end.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address is None:
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        ray.init(address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ScoreError(f"--ray {address or ''}: Ray cannot be reached ({first}); wanted a running cluster") from error


def _score(job: Job, pending: list[Part], strict: bool, advance: Advance) -> None:
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    workers = min(len(pending), gpus or int(ray.cluster_resources().get("CPU", 1)))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    parts = ray.data.from_items(
        [{"part": part.model_dump_json()} for part in pending], override_num_blocks=len(pending)
    )
    worker: Any = Worker  # Ray's types know of functions only
    done = parts.map(
        worker,
        fn_constructor_args=(job, strict),
        num_cpus=0 if gpus else 1,
        num_gpus=1 if gpus else 0,
        compute=ray.data.ActorPoolStrategy(size=workers),
    )
    for row in done.iter_rows():
        if row["refused"]:
            raise RowRefused(row["refused"])
        if row["failed"]:
            raise ScoreError(row["failed"])
        advance(row["rows"])
