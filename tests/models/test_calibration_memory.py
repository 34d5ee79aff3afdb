"""Memory of packaging with calibration: the draws of large maps are never those of all rows at once."""

import subprocess
import sys

from tests.process import ROOT

FEW, MANY = 12, 96
# Draws of one row are 64 x 64 places x 8 classes x 40 draws as float32, 5 MiB, which the graph has about three times:
# all rows at once took 1,320 MiB more. The figures with dropout off, which are of all places of all rows, take 200.
MOST_GROWTH_MIB = 500

PACKAGED = """
import sys
from pathlib import Path

import numpy as np

from models.artifact import publish
from models.holdout import KnownRows
from tests.models.networks import places_net


def peak_mib():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def packaged(rows):
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, 64, 64, 2)).astype(np.float32)
    known = KnownRows({"x": x}, [random.integers(0, 8, (rows, 64, 64))])
    net = places_net(8, (64, 64, 2))
    publish(net, name="map", repository=Path(sys.argv[1]), num_samples=40, holdout=known)
    return peak_mib()


few, many = packaged(int(sys.argv[2])), packaged(int(sys.argv[3]))
print(few, many)
"""


def test_of_large_maps_the_draws_of_a_few_rows_are_in_memory_at_one_time(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PACKAGED, str(tmp_path), str(FEW), str(MANY)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    few, many = map(float, done.stdout.split())
    assert many - few < MOST_GROWTH_MIB
