"""What a core costs, and a figure of it that a real run gives."""

import json
import subprocess
import sys

import pytest

from benchmarks.cores import Money
from tests.process import ROOT

COMMAND = [sys.executable, "-m", "benchmarks.cores"]


def test_money():
    money = Money(price=3.6, usage=0.5)
    # A core second costs 0.001, and gives 500 rows.
    assert money.million(1_000) == pytest.approx(2.0)
    assert money.cores(1_000, 1_000) == 2
    assert money.cores(1_000, 500) == 1


def test_one_network_is_measured():
    done = subprocess.run(
        [*COMMAND, "--letters", "a", "--seconds", "1", "--skip-server", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    [found] = json.loads(done.stdout)
    # T draws are T times the work, but for what is done once.
    assert 5 < found["predict"] / found["draws"] < 2_000


def test_an_unknown_network_is_refused():
    done = subprocess.run([*COMMAND, "--letters", "ax"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no network 'x'; wanted of abcde" in done.stdout + done.stderr
