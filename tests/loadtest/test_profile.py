"""Profiles and the schedule of requests that they make."""

from __future__ import annotations

import itertools
import statistics
import time

import pytest

from loadtest.arrivals import Schedule, arrivals
from loadtest.errors import LoadTestError
from loadtest.pace import Pace
from loadtest.profile import PROFILES, Phase, choose, spread


def test_what_is_given_takes_the_place_of_the_profiles_own():
    own = PROFILES["smoke"]
    assert choose("smoke") == own
    chosen = choose("smoke", users=3, spawn_rate=0.5, run_time="1m30s", rate=7)
    assert (chosen.users, chosen.spawn_rate, chosen.phases) == (3, 0.5, (Phase(90, 7),))


def test_phases_keep_their_proportions():
    shorter = choose("spike", run_time="4s", rate=10)
    assert [(phase.seconds, phase.rate) for phase in shorter.phases] == [(1.5, 10), (0.5, 100), (2, 10)]


@pytest.mark.parametrize("run_time", ["20s", "20", "5m", "1h", "1h2m3s"])
def test_times_as_people_write_them(run_time):
    assert choose("smoke", run_time=run_time).seconds in (20, 300, 3_600, 3_723)


@pytest.mark.parametrize("run_time", ["", "soon", "5 m", "-5s", "1.5h", "s", "0s"])
def test_other_times_are_refused(run_time):
    with pytest.raises(LoadTestError, match="run time"):
        choose("smoke", run_time=run_time)


def test_unknown_profile_is_refused():
    with pytest.raises(
        LoadTestError, match="profile 'storm': not known; wanted one of smoke, ramp, spike, soak, mixed"
    ):
        choose("storm")


def test_one_user_for_each_kind_of_request_at_least():
    with pytest.raises(LoadTestError, match="5 users: wanted at least 6"):
        choose("mixed", users=5)


def test_users_are_spread_by_weight_and_no_kind_goes_without():
    assert spread(8, {"a": 1, "b": 1}) == {"a": 4, "b": 4}
    assert spread(10, {"a": 3, "b": 1}) == {"a": 8, "b": 2}
    assert spread(3, {"a": 100, "b": 1, "c": 1}) == {"a": 1, "b": 1, "c": 1}


def test_same_seed_same_arrivals_and_another_other_ones():
    phases = [(10.0, 50.0)]
    assert list(arrivals(phases, 1, "a")) == list(arrivals(phases, 1, "a"))
    assert list(arrivals(phases, 1, "a")) != list(arrivals(phases, 1, "b"))


def test_arrivals_are_a_poisson_process_of_each_phases_rate():
    times = list(arrivals([(1000, 20), (500, 100), (100, 0), (1000, 20)], 0.5, "seed"))
    assert times == sorted(times)
    for begin, end, rate in ((0, 1000, 10), (1000, 1500, 50), (1600, 2600, 10)):
        inside = [at for at in times if begin <= at < end]
        wanted = rate * (end - begin)
        # Five standard deviations of a Poisson count; gaps of an exponential law deviate as much as they last.
        assert abs(len(inside) - wanted) < 5 * wanted**0.5
        gaps = [after - before for before, after in itertools.pairwise(inside)]
        assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.1)
    assert not [at for at in times if 1500 <= at < 1600]


def test_a_schedule_waits_for_nobody():
    schedule = Schedule([(1, 100)], 1, "seed")
    taken = list(iter(schedule.take, None))
    wanted = list(arrivals([(1, 100)], 1, "seed"))
    assert [at - taken[0] for at in taken] == pytest.approx([at - wanted[0] for at in wanted])


def test_a_closed_schedule_says_what_it_owes():
    schedule = Schedule([(10, 1000)], 1, "seed")
    begin = time.perf_counter()
    taken = [schedule.take() for _ in range(7)]
    time.sleep(0.2)
    least = time.perf_counter() - begin
    owed = schedule.close()
    most = time.perf_counter() - begin
    due = [at for at in arrivals([(10, 1000)], 1, "seed") if at <= most]
    # The clock starts with the first request.
    assert sum(at <= least - 0.01 for at in due) - len(taken) <= owed <= len(due) - len(taken)
    assert schedule.take() is None
    assert Schedule([(10, 1000)], 1, "seed").close() == 0


def test_lateness_is_that_of_99_requests_in_100_of_all_processes():
    together = Pace()
    for late_s in (0.0005, 0.2):
        one = Pace()
        for _ in range(99 if late_s < 0.1 else 1):
            one.sent(late_s)
        one.unsent, one.unanswered = 3, 1
        together.add(one.taken())
        assert (one.late_ms, one.unsent, one.unanswered) == (None, 0, 0)
    assert (together.late_ms, together.unsent, together.unanswered) == (1, 6, 2)
    together.sent(0.1)
    together.sent(0.1)
    assert together.late_ms == 100
