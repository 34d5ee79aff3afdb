from __future__ import annotations

import pytest

from loadtest.errors import LoadTestError
from loadtest.profile import PROFILES, choose


def test_given_settings_replace_the_profiles_own():
    chosen = choose("smoke", users=3, spawn_rate=None, run_time="1h30m")
    assert (chosen.users, chosen.spawn_rate, chosen.run_time) == (3, PROFILES["smoke"].spawn_rate, "1h30m")


def test_unknown_profile_is_refused():
    with pytest.raises(LoadTestError, match="profile 'storm': not known; wanted one of smoke"):
        choose("storm", users=None, spawn_rate=None, run_time=None)


@pytest.mark.parametrize("run_time", ["", "s", "soon", "-5s", "1.5s", "5 s", "2d"])
def test_run_time_that_is_no_time_is_refused(run_time):
    with pytest.raises(LoadTestError, match="wanted a time as 20s"):
        choose("smoke", users=None, spawn_rate=None, run_time=run_time)
