"""One Optuna study in a database: trials that survive a kill, and that several processes share."""

from __future__ import annotations

import logging
import os
import socket
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import optuna
from optuna.exceptions import TrialPruned
from optuna.trial import TrialState
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError

from training.errors import InputError

# A trial whose process shows no life for so long is given up, and another one takes its place.
HEARTBEAT_S, GRACE_S = 5, 20
# While other processes finish the last trials: between two looks, and until they are given up. A process that is killed
# at the very start of a trial has not shown any life that could end, and its trial looks like a running one for ever.
WAIT_S, PATIENCE_S = 0.5, 30
# A new database that several processes find at once is made by one of them.
CREATE_TRIES = 10
# Trials sampled at random before TPE has something to learn from; trials before one may be pruned.
RANDOM_TRIALS, UNPRUNED_TRIALS = 10, 5

# Of a trial: how many of its nets answer the same to every row.
COLLAPSED = "collapsed"

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class StorageError(InputError):
    def __init__(self, url: str, found: object) -> None:
        super().__init__(f"storage {url!r}: {found}; wanted a database URL such as sqlite:///tune.db")


class _Surplus(Exception):
    """Another process has just begun the last trial."""


class _OutOfTime(Exception):
    """The deadline passed within a trial."""


@dataclass(frozen=True)
class Search:
    """What to look for, where, and for how long."""

    name: str
    storage: optuna.storages.BaseStorage
    direction: Literal["minimize", "maximize"]
    # Of all processes together.
    trials: int
    seed: int
    # Epochs before a trial may be pruned.
    warmup_epochs: int
    # Parameters of the first trial.
    first: dict[str, object]

    def study(self) -> optuna.Study:
        return optuna.create_study(
            storage=self.storage,
            study_name=self.name,
            direction=self.direction,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED_TRIALS, n_warmup_steps=self.warmup_epochs),
            load_if_exists=True,
        )


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """Raises StorageError."""
    if url.startswith("sqlite") and (url.endswith("/") or ":memory:" in url):
        # Neither another thread nor whoever goes on would find a trial there.
        raise StorageError(url, "keeps the trials in memory only")
    # Optuna's notes on every trial are no news beside a progress bar.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    # Heartbeats and the constant liar are what Optuna calls experimental; to whoever tunes that is no news. For good:
    # searches run in several threads, and Python changes its filters for all of them.
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    for left in reversed(range(CREATE_TRIES)):
        try:
            return optuna.storages.RDBStorage(url, heartbeat_interval=HEARTBEAT_S, grace_period=GRACE_S)
        except (OperationalError, IntegrityError, ProgrammingError) as error:
            # SQLite is locked, or another process has just made what this one was about to make.
            passing = url.startswith("sqlite") or not isinstance(error, OperationalError)
            if left == 0 or not passing:
                raise StorageError(url, str(error.orig)) from error
            time.sleep(WAIT_S)
        except (SQLAlchemyError, ImportError, ValueError, RuntimeError) as error:
            raise StorageError(url, str(error).splitlines()[0]) from error
    raise AssertionError


def run(
    search: Search,
    objective: Callable[[optuna.Trial, Callable[[int, float | None], None]], float],
    *,
    deadline: float | None = None,
    on_trial: Callable[[int], None] | None = None,
) -> optuna.Study:
    """Carry out trials until all processes together have finished `search.trials`, or until the deadline.

    objective: takes the trial, and what to call with (epoch, loss so far, None where it is not known yet): that ends
    the trial where it is hopeless.
    deadline: of `time.monotonic`. on_trial: called with the number of finished trials.
    """
    study = search.study()
    given_up = 0
    changed_at, seen = time.monotonic(), (0, 0)

    def one(trial: optuna.Trial) -> float:
        before = [other for other in study.get_trials(deepcopy=False) if other.number < trial.number]
        if sum(other.state != TrialState.FAIL for other in before) >= search.trials + given_up:
            raise _Surplus
        # By the trial's number: reproducible in one process, different in each of several.
        study.sampler = optuna.samplers.TPESampler(
            seed=(search.seed + trial.number) % 2**32,
            n_startup_trials=RANDOM_TRIALS,
            constant_liar=True,
        )
        trial.set_user_attr("process", f"{socket.gethostname()}:{os.getpid()}")

        def look(epoch: int, loss: float | None) -> None:
            if deadline is not None and time.monotonic() > deadline:
                raise _OutOfTime
            if loss is None:
                return
            trial.report(loss if search.direction == "minimize" else -loss, epoch)
            if trial.should_prune():
                raise TrialPruned

        return objective(trial, look)

    while deadline is None or time.monotonic() < deadline:
        finished, running = count(study, *FINISHED), count(study, TrialState.RUNNING)
        if on_trial is not None:
            on_trial(finished)
        if finished >= search.trials:
            break
        if seen != (finished, running):
            changed_at, seen = time.monotonic(), (finished, running)
        if finished + running >= search.trials + given_up:
            # Others are at the last ones. Should they die, their trials come back.
            time.sleep(WAIT_S)
            optuna.storages.fail_stale_trials(study)
            if time.monotonic() - changed_at > PATIENCE_S:
                given_up = running
            continue
        if not study.get_trials(deepcopy=False):
            study.enqueue_trial(search.first)
        study.optimize(one, n_trials=1, catch=(_Surplus, _OutOfTime))
    return study


def count(study: optuna.Study, *states: TrialState) -> int:
    return len(study.get_trials(deepcopy=False, states=states))


def set_collapsed(trial: optuna.Trial, nets: int) -> None:
    """To the sampler it is a constraint: it looks where there are none."""
    trial.set_constraint(COLLAPSED, nets)


def is_collapsed(trial: optuna.trial.FrozenTrial) -> bool:
    return _collapsed(trial) > 0


def best(study: optuna.Study) -> optuna.trial.FrozenTrial:
    """The completed trial of the best value among those with the fewest collapsed nets; the first of equals."""
    sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1

    def rank(trial: optuna.trial.FrozenTrial) -> tuple[float, float]:
        assert trial.value is not None
        return _collapsed(trial), sign * trial.value

    return min(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]), key=rank)


def _collapsed(trial: optuna.trial.FrozenTrial) -> float:
    # Trials of earlier versions have no such number.
    return trial.constraints.get(COLLAPSED, 0.0)
