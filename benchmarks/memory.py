"""Peak memory of one answer, in a process of its own.

    python -m benchmarks.memory ARTIFACT --rows 64 --draws 100000

Loads a published artifact with TensorFlow alone, answers once, and prints the process's peak resident memory in MB.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

INPUTS_SEED = 7


def in_own_process(artifact: Path, rows: int, draws: int) -> float:
    """Peak resident memory in MB of a fresh process that answers once."""
    command = [sys.executable, "-m", "benchmarks.memory", str(artifact), "--rows", str(rows), "--draws", str(draws)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main(
    artifact: Annotated[Path, typer.Argument(help="The folder of one version.")],
    rows: Annotated[int, typer.Option()] = 64,
    draws: Annotated[int, typer.Option()] = 100,
) -> None:
    """Answer once; print the peak resident memory in MB."""
    import tensorflow as tf

    loaded = tf.saved_model.load(str(artifact))
    sample = loaded.signatures["mc_sample"]
    given = {}
    for name, spec in sample.structured_input_signature[1].items():
        if spec.shape.rank:
            shape = (rows, *spec.shape[1:])
            given[name] = tf.constant(np.random.default_rng(INPUTS_SEED).standard_normal(shape), spec.dtype)
    found = sample(**given, num_samples=tf.constant(draws), seed=tf.constant(0, tf.int64))
    if not all(np.isfinite(values).all() for values in found.values()):
        raise SystemExit("the answer is not finite")
    # Linux counts in KiB.
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


if __name__ == "__main__":
    typer.run(main)
