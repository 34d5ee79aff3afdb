"""How much traffic, for how long."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loadtest.errors import LoadTestError

RUN_TIME = re.compile(r"(?=\d)(\d+h)?(\d+m)?(\d+s?)?")


@dataclass(frozen=True)
class Profile:
    """users: concurrent, half of them on each endpoint; spawn_rate: new users per second; run_time: as 20s, 5m, 1h."""

    users: int
    spawn_rate: float
    run_time: str


PROFILES = {"smoke": Profile(users=8, spawn_rate=8, run_time="20s")}


def choose(name: str, *, users: int | None, spawn_rate: float | None, run_time: str | None) -> Profile:
    """A profile by its name, with what is given in place of its own; LoadTestError where it cannot be run."""
    if name not in PROFILES:
        raise LoadTestError(f"profile {name!r}: not known; wanted one of {', '.join(PROFILES)}")
    if run_time is not None and RUN_TIME.fullmatch(run_time) is None:
        raise LoadTestError(f"run time {run_time!r}: wanted a time as 20s, 5m, 1h30m")
    own = PROFILES[name]
    return Profile(
        users=own.users if users is None else users,
        spawn_rate=own.spawn_rate if spawn_rate is None else spawn_rate,
        run_time=run_time or own.run_time,
    )
