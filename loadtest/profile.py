"""How much traffic, of what kinds, for how long, and what must come of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from loadtest.errors import LoadTestError

RUN_TIME = re.compile(r"(?=\d)(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?")

NATIVE = {"PredictUser": 1, "UncertaintyUser": 1}
# Weights of the users of `loadtest.locustfile`, by their classes.
ALL_PROTOCOLS = {
    "PredictUser": 4,
    "UncertaintyUser": 4,
    "TensorFlowServingUser": 2,
    "V2JsonUser": 1,
    "V2BinaryUser": 2,
    "GrpcUser": 2,
}
END_S = 5
# Those that name the model, on the port of the native endpoints.
BY_NAME = {"TensorFlowServingUser": 2, "V2JsonUser": 1, "V2BinaryUser": 2}
# What they call their requests.
NAMES = {
    "PredictUser": "/predict",
    "UncertaintyUser": "/uncertainty",
    "TensorFlowServingUser": "/v1 predict",
    "V2JsonUser": "/v2 infer, JSON",
    "V2BinaryUser": "/v2 infer, binary",
    "GrpcUser": "gRPC Predict",
}


@dataclass(frozen=True)
class Thresholds:
    """Limits of the time from the intended start to the answer, in ms; None: no limit. No answer may be wrong.

    end_p50_ms: of the schedule's last seconds, END_S of them: whatever was before, the server is to be itself again.
    """

    p50_ms: float | None = None
    p99_ms: float | None = None
    end_p50_ms: float | None = None


@dataclass(frozen=True)
class Phase:
    """seconds: how long; rate: requests a second, arriving at random (a Poisson process)."""

    seconds: float
    rate: float


@dataclass(frozen=True)
class Search:
    """For the knee: rates are doubled from `lowest` until one fails, then halved between, to a share of `precision`."""

    lowest: float
    highest: float
    precision: float


@dataclass(frozen=True)
class Profile:
    """users: at most so many requests at once, of all kinds; spawn_rate: new users a second.

    Requests start by a schedule, whether or not earlier ones were answered; what finds no free user waits, and its wait
    counts. The users are enough if the schedule alone is served by a few of them.
    """

    users: int
    spawn_rate: float
    phases: tuple[Phase, ...]
    mix: dict[str, int] = field(default_factory=lambda: dict(NATIVE))
    thresholds: Thresholds = Thresholds()
    search: Search | None = None

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)


PROFILES = {
    # For CI: right answers, and nothing grossly slow. A server on a busy machine of two cores answers in 5 to 15 ms.
    "smoke": Profile(users=8, spawn_rate=8, phases=(Phase(20, 100),), thresholds=Thresholds(p50_ms=40)),
    # The highest rate that the server bears; each try lasts as long as the phase.
    "ramp": Profile(
        users=64,
        spawn_rate=64,
        phases=(Phase(8, 50),),
        thresholds=Thresholds(p99_ms=100),
        search=Search(lowest=50, highest=6_400, precision=0.1),
    ),
    # A burst of ten times the usual, from which the server must come back by itself.
    "spike": Profile(
        users=64,
        spawn_rate=64,
        phases=(Phase(15, 50), Phase(5, 500), Phase(20, 50)),
        # Most requests are of the burst: the median that counts is that of the end.
        thresholds=Thresholds(p99_ms=2_000, end_p50_ms=40),
    ),
    # Half an hour of the usual: what leaks or slowly fills shows here.
    "soak": Profile(
        users=16,
        spawn_rate=16,
        phases=(Phase(1_800, 50),),
        thresholds=Thresholds(p50_ms=40, p99_ms=250, end_p50_ms=40),
    ),
    # Every protocol at once, over the same rows.
    "mixed": Profile(
        users=32,
        spawn_rate=32,
        phases=(Phase(60, 100),),
        mix=ALL_PROTOCOLS,
        thresholds=Thresholds(p50_ms=40, p99_ms=500),
    ),
}


def request_name(kind: str, model: str) -> str:
    """model: "" where none is named."""
    return f"{NAMES[kind]}, {model}" if model else NAMES[kind]


def spread(users: int, mix: Mapping[str, float]) -> dict[str, int]:
    """How many users of each kind: in proportion to the weights, one at least, `users` together."""
    counts = dict.fromkeys(mix, 1)
    for _ in range(users - len(mix)):
        counts[max(mix, key=lambda kind: mix[kind] / (counts[kind] + 1))] += 1
    return counts


def choose(
    name: str,
    *,
    users: int | None = None,
    spawn_rate: float | None = None,
    run_time: str | None = None,
    rate: float | None = None,
) -> Profile:
    """A profile by its name, with what is given in place of its own; LoadTestError where it cannot be run.

    run_time, rate: of all phases together and of the first one; the others keep their proportions.
    """
    if name not in PROFILES:
        raise LoadTestError(f"profile {name!r}: not known; wanted one of {', '.join(PROFILES)}")
    own = PROFILES[name]
    longer = 1.0 if run_time is None else _seconds(run_time) / own.seconds
    faster = 1.0 if rate is None else rate / own.phases[0].rate
    chosen = replace(
        own,
        users=own.users if users is None else users,
        spawn_rate=own.spawn_rate if spawn_rate is None else spawn_rate,
        phases=tuple(Phase(phase.seconds * longer, round(phase.rate * faster, 6)) for phase in own.phases),
    )
    if chosen.users < len(chosen.mix):
        raise LoadTestError(f"{chosen.users} users: wanted at least {len(chosen.mix)}, one for each kind of request")
    return chosen


def _seconds(run_time: str) -> float:
    found = RUN_TIME.fullmatch(run_time)
    if found is None:
        raise LoadTestError(f"run time {run_time!r}: wanted a time as 20s, 5m, 1h30m")
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    total = hours * 3_600 + minutes * 60 + seconds
    if not total:
        raise LoadTestError(f"run time {run_time!r}: wanted at least a second")
    return total
