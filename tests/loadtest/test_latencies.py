"""Response times against numpy's quantiles, whatever processes they were noted in."""

from __future__ import annotations

import numpy as np
import pytest

from loadtest.latencies import Latencies, percentile_ms


@pytest.mark.parametrize("share", [0.5, 0.95, 0.99])
def test_percentiles_are_those_of_all_processes_together(share):
    times = np.random.default_rng(0).lognormal(4, 1, 1001)
    workers, master = [Latencies(), Latencies()], Latencies()
    for number, time in enumerate(times):
        workers[number % 2].note(f"/{number % 3}", time)
        # As often as Locust's workers report, and once more at the end.
        if number % 100 == 0:
            master.add(workers[number % 2].taken())
    for worker in workers:
        master.add(worker.taken())
    for found, of in ((master.all(), times), (master.of("/1"), times[1::3])):
        wanted = float(np.quantile(of, share, method="inverted_cdf"))
        judged = percentile_ms(found, share)
        assert judged is not None
        assert wanted <= judged <= wanted + 0.01


def test_a_time_is_not_rounded_below_a_limit():
    latencies = Latencies()
    latencies.note("/predict", 104.9)
    assert percentile_ms(latencies.all(), 0.99) == 104.9
    assert percentile_ms(latencies.of("/uncertainty"), 0.99) is None
