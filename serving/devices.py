"""Which GPUs there are, and how many workers share them: decided in the parent, before TensorFlow is anywhere.

One worker for each GPU: TensorFlow would otherwise take hold of all of them in every worker. BentoML starts the workers
(`workers`) and shows them the GPUs (`resources`); each worker then hides from TensorFlow all but its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pynvml

from serving.errors import StartError

# CUDA's own: the devices that a process may use, by number or by UUID.
VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Plan:
    workers: int
    gpus: int
    """GPUs that are used; 0: CPU."""

    def bentoml(self) -> dict[str, Any]:
        """The fields of BentoML's service configuration."""
        return {"workers": self.workers, **({"resources": {"gpu": self.gpus}} if self.gpus else {})}


def plan(wanted: Literal["auto", "cpu", "gpu"], workers: int | None, found: Sequence[str]) -> Plan:
    """Workers and GPUs for the devices found; workers: None for one a GPU, or one.

    Raises StartError where a GPU is wanted and there is none.
    """
    if wanted == "gpu" and not found:
        raise StartError(
            "DROPSERVE_DEVICE=gpu: no NVIDIA GPU found; wanted one with its driver, visible to this process "
            f"({VISIBLE_VARIABLE}), or DROPSERVE_DEVICE=auto"
        )
    if wanted == "cpu" or not found:
        return Plan(workers or 1, 0)
    workers = workers or len(found)
    return Plan(workers, min(workers, len(found)))


def find(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; asks the driver, not TensorFlow."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        count = pynvml.nvmlDeviceGetCount()
    finally:
        pynvml.nvmlShutdown()
    return visible(environment.get(VISIBLE_VARIABLE), count)


def visible(chosen: str | None, count: int) -> list[str]:
    """Of `count` GPUs, those that CUDA_VISIBLE_DEVICES leaves; as CUDA does, nothing counts after a wrong number."""
    if chosen is None:
        return [str(index) for index in range(count)]
    names: list[str] = []
    for name in (part.strip() for part in chosen.split(",")):
        if not name or name in names or (name.lstrip("-").isdigit() and int(name) not in range(count)):
            break
        names.append(name)
    return names


def pin(environment: MutableMapping[str, str], worker_index: int | None) -> None:
    """Leave this worker one GPU; before TensorFlow is imported. worker_index: from 1, None outside of a server.

    More workers than GPUs share them in turn.
    """
    names = [name for name in environment.get(VISIBLE_VARIABLE, "").split(",") if name.strip()]
    if worker_index is not None and names:
        environment[VISIBLE_VARIABLE] = names[(worker_index - 1) % len(names)].strip()


def planned(wanted: Literal["auto", "cpu", "gpu"], workers: int | None) -> Plan:
    """The plan for this machine."""
    return plan(wanted, workers, [] if wanted == "cpu" else find(os.environ))
