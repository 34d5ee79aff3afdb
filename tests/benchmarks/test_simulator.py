"""The simulation against the closed forms of queueing theory, and against what must hold of any queue."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from benchmarks import simulator
from benchmarks.simulator import Replica, batching, latencies, poisson
from tests.process import ROOT

SERVICE_S = 0.01


def exponential(seed: int) -> Replica:
    choices = np.random.default_rng(seed)
    return Replica(lambda count: choices.exponential(SERVICE_S))


def erlang_c(servers: int, load: float) -> float:
    """The probability that a request waits in M/M/c; load: arrival rate x mean service time."""
    waits = load**servers / math.factorial(servers) * servers / (servers - load)
    return waits / (sum(load**k / math.factorial(k) for k in range(servers)) + waits)


@pytest.mark.parametrize(("servers", "usage"), [(1, 0.5), (1, 0.8), (2, 0.7), (4, 0.8), (8, 0.6)])
def test_mean_and_tail_of_mmc(servers, usage):
    load = servers * usage
    found = latencies(poisson(load / SERVICE_S, 200_000, 1), exponential(2), servers, "shared")
    spare = (servers - load) / SERVICE_S
    wait = erlang_c(servers, load) / spare
    assert np.mean(found) == pytest.approx(wait + SERVICE_S, rel=0.06)
    if servers == 1:
        # Sojourn times of M/M/1 are exponential.
        assert np.quantile(found, 0.99) == pytest.approx(math.log(100) / spare, rel=0.1)


@pytest.mark.parametrize("usage", [0.3, 0.7, 0.9])
def test_mean_of_md1(usage):
    found = latencies(poisson(usage / SERVICE_S, 200_000, 3), Replica(lambda count: SERVICE_S), 1)
    wanted = SERVICE_S * (1 + usage / (2 * (1 - usage)))
    assert np.mean(found) == pytest.approx(wanted, rel=0.05)


def test_turns_split_a_poisson_process_into_erlang_ones():
    """Two replicas by turns: each is E2/M/1, whose waiting time follows from a root in (0, 1)."""
    rate = 2 * 0.8 / SERVICE_S
    found = latencies(poisson(rate, 300_000, 4), exponential(5), 2, "turns")
    root = 0.5
    for _ in range(1_000):  # sigma = A*(mu (1 - sigma)), the transform of the times between arrivals
        root = (rate / (rate + (1 - root) / SERVICE_S)) ** 2
    assert np.mean(found) == pytest.approx(SERVICE_S / (1 - root), rel=0.06)
    # And it is worse than asking who has the fewest open.
    least = latencies(poisson(rate, 300_000, 4), exponential(5), 2)
    assert np.mean(least) < np.mean(found)


def test_every_request_is_answered_once_and_never_before_its_own_call():
    arrivals = poisson(5_000, 20_000, 6)
    found = latencies(arrivals, batching(0.001, 0.0001, 16), 3)
    assert len(found) == len(arrivals)
    assert found.min() >= 0.0011 - 1e-12


def test_a_batch_server_that_is_always_full_answers_its_capacity():
    replica = batching(0.002, 0.0005, 8)
    arrivals = poisson(4 * replica.capacity, 50_000, 7)
    found = latencies(arrivals, replica, 1)
    # Twice over: the last answer comes when all have been worked off.
    seconds = 50_000 / replica.capacity
    assert found.max() + arrivals[-1] == pytest.approx(seconds, rel=0.3)
    assert found.max() == pytest.approx(seconds - arrivals[-1], rel=0.02)


def test_an_unloaded_server_answers_in_its_own_time():
    found = latencies(poisson(1, 2_000, 8), batching(0.001, 0.0002, 64), 1)
    assert np.median(found) == pytest.approx(0.0012)
    assert stats.describe(found).variance < 1e-8


def test_two_replicas_bear_twice_as_much_and_a_little_more():
    replica = batching(0.0003, 0.00015, 64)
    one, two = (simulator.knee(replica, count, 0.05, requests=20_000) for count in (1, 2))
    assert 1.9 < two / one < 2.3
    assert simulator.needed(replica, one * 0.9, 0.05, requests=20_000) == 1
    assert simulator.needed(replica, one * 5.5, 0.05, requests=20_000) in (5, 6, 7)
    assert simulator.needed(replica, one, 0.0001) is None


def test_the_command_says_how_many_and_refuses_what_is_no_time():
    command = [sys.executable, "-m", "benchmarks.simulator", "--fixed-ms", "0.3", "--request-ms", "0.15"]
    done = subprocess.run([*command, "--rate", "10000"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "10,000" in done.stdout
    assert "requests/s" in done.stdout
    wrong = subprocess.run([*command, "--rate", "-1"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
