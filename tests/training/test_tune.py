"""The tuner as processes that share a database, are killed and go on."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from models import contract
from training import cores, tables, tune
from training.datasets import ConstantTarget, load
from training.folds import inner_folds
from training.recipes import DEFAULTS
from training.splits import split

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "dropserve.py"), "tune", "wine", "--epochs", "10", "--folds", "2", "--json"]
WAIT_S = 300


def start(folder, *arguments):
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, err
    return json.loads(out)


def trials(folder, part="winner"):
    url = f"sqlite:///{folder / 'dropserve-tune.db'}"
    [name] = [name for name in optuna.get_all_study_names(url) if name.endswith(f"/{part}")]
    return optuna.load_study(study_name=name, storage=url).trials


def ended(found):
    return [trial for trial in found if trial.state.name in ("COMPLETE", "PRUNED")]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A folder in which a search of wine was killed and started again; the trials that the killed one had finished."""
    folder = tmp_path_factory.mktemp("interrupted")
    process = start(folder, "--trials", 500, "--outer-folds", 2)
    limit = time.monotonic() + WAIT_S
    while time.monotonic() < limit:
        time.sleep(0.2)
        if process.poll() is not None:
            pytest.fail(process.communicate()[1])
        if done(folder) >= 3:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = trials(folder)
    document = finish(start(folder, "--trials", len(ended(before)) + 2, "--outer-folds", 2))
    return folder, before, document


def done(folder):
    """The winner's trials that have ended, seen from outside: Optuna would make the tables that the process makes."""
    try:
        with closing(sqlite3.connect(f"file:{folder / 'dropserve-tune.db'}?mode=ro", uri=True)) as database:
            query = (
                "SELECT count(*) FROM trials JOIN studies USING (study_id) "
                "WHERE study_name LIKE '%/winner' AND state IN ('COMPLETE', 'PRUNED')"
            )
            return database.execute(query).fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def test_a_kill_loses_the_running_trial_at_most(interrupted):
    folder, before, _ = interrupted
    after = {trial.number: trial for trial in trials(folder)}
    assert len(ended(before)) >= 3
    assert len(before) - len(ended(before)) <= 1
    for trial in ended(before):
        assert (after[trial.number].params, after[trial.number].value) == (trial.params, trial.value)
    assert len(ended(after.values())) == len(ended(before)) + 2
    assert len({trial.user_attrs["process"] for trial in ended(after.values())}) == 2


def test_ctrl_c_says_in_a_line_that_the_same_command_goes_on_and_it_does(tmp_path):
    arguments = ("--trials", 500, "--outer-folds", 2)
    process = start(tmp_path, *arguments)
    limit = time.monotonic() + WAIT_S
    while done(tmp_path) < 2 and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.2)
    try:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, "")
    assert err == "interrupted: nothing was published; the same command goes on with the trials that are done\n"
    assert not (tmp_path / "artifacts").exists()
    before = ended(trials(tmp_path))
    assert len(before) >= 2
    finish(start(tmp_path, "--trials", len(before), "--outer-folds", 2, "--worker"))
    assert [trial.number for trial in ended(trials(tmp_path))] == [trial.number for trial in before]


def test_the_winner_is_published_with_its_rates(interrupted):
    folder, _, document = interrupted
    manifest = contract.verify(folder / document["folder"])
    best = min((trial for trial in trials(folder) if trial.state.name == "COMPLETE"), key=lambda trial: trial.value)
    assert document["tuning"]["selected_score"] == pytest.approx(best.value)
    assert document["training"]["visible_dropout"] == best.params["visible_dropout"]
    assert document["training"]["hidden_dropout"] == best.params["hidden_dropout"]
    assert {layer.settings["rate"] for layer in manifest.stochastic_layers} <= {*best.params.values()}


def test_the_reported_score_is_of_outer_folds(interrupted):
    _, _, document = interrupted
    tuning = document["tuning"]
    assert len(tuning["nested_scores"]) == 2
    assert tuning["nested_score"]["mean"] == pytest.approx(np.mean(tuning["nested_scores"]))
    assert tuning["nested_score"]["mean"] != tuning["selected_score"]


def test_two_processes_split_the_trials(tmp_path):
    done, by_process = 0, set()
    # Where one process has finished before the other begins, more trials are left to both.
    for wanted in (16, 64, 256):
        arguments = ("--trials", wanted, "--outer-folds", 0, "--worker")
        first, second = start(tmp_path, *arguments), start(tmp_path, *arguments)
        assert finish(first)["trials"] == finish(second)["trials"]
        found = ended(trials(tmp_path))
        assert len(found) == wanted
        by_process = {trial.user_attrs["process"] for trial in found[done:]}
        if len(by_process) == 2:
            break
        done = wanted
    assert len(by_process) == 2
    assert not (tmp_path / "artifacts").exists()


OPEN = """
import sys
from training import search
print("ready", flush=True)
for url in sys.stdin:
    search.open_storage(url.strip())
    print("opened", flush=True)
"""


def test_processes_that_find_a_new_database_at_once_all_open_it(tmp_path):
    pipe: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes: list[Any] = [subprocess.Popen([sys.executable, "-c", OPEN], cwd=ROOT, **pipe) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    # Without another try about every third of these rounds failed.
    for round_ in range(12):
        for process in processes:
            process.stdin.write(f"sqlite:///{tmp_path / f'{round_}.db'}\n")
            process.stdin.flush()
        for process in processes:
            assert process.stdout.readline() == "opened\n", process.communicate()[1]
    for process in processes:
        process.communicate(timeout=WAIT_S)
        assert process.returncode == 0


def settings(tmp_path, **changes):
    quick = replace(DEFAULTS["wine"], hidden_units=(8,), epochs=5)
    values: dict[str, Any] = {
        "space": tune.Space(quick, ("width", "max-norm", "learning-rate", "epochs")),
        "objective": "nll",
        "trials": 3,
        "folds": 2,
        "outer_folds": 0,
        "num_samples": 5,
        "seed": 0,
        "timeout_s": None,
        "storage": f"sqlite:///{tmp_path / 'tune.db'}",
        "name": "wine",
    }
    return tune.Settings(**(values | changes))


def test_all_dimensions_are_searched_and_the_same_seed_finds_the_same(tmp_path):
    data = load("wine")
    rows = split(data.y, data.task).train
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = (tune.tune(data, rows, settings(tmp_path / folder)) for folder in "ab")
    assert first.recipe == second.recipe
    assert first.selected_score == pytest.approx(second.selected_score, abs=1e-4)
    assert first.nested is None
    [name] = optuna.get_all_study_names(f"sqlite:///{tmp_path / 'a' / 'tune.db'}")
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{tmp_path / 'a' / 'tune.db'}")
    assert set(study.best_params) == {
        "visible_dropout",
        "hidden_dropout",
        "width",
        "max_norm",
        "learning_rate",
        "epochs",
    }
    begun = study.trials[0].params
    quick = settings(tmp_path).space.base
    assert {name: begun[name] for name in ("visible_dropout", "learning_rate", "epochs", "width", "max_norm")} == {
        "visible_dropout": quick.visible_dropout,
        "learning_rate": quick.learning_rate,
        "epochs": quick.epochs,
        "width": 1.0,
        "max_norm": quick.max_norm or 0.0,
    }


def test_searches_side_by_side_find_what_they_find_one_after_another(tmp_path, monkeypatch):
    data = load("wine")
    rows = split(data.y, data.task).train
    for folder in "ab":
        (tmp_path / folder).mkdir()
    alone = tune.tune(data, rows, settings(tmp_path / "a", outer_folds=3))
    monkeypatch.setattr(cores, "stacks_at_once", lambda: 2)
    begun: list[str] = []
    beside = tune.tune(data, rows, settings(tmp_path / "b", outer_folds=3), lambda part, done: begun.append(part))
    assert beside.recipe == alone.recipe
    assert beside.nested_scores == pytest.approx(alone.nested_scores, abs=1e-4)
    assert set(begun) == {"winner", "outer-0", "outer-1", "outer-2"}
    # A second search has begun before the first one's end.
    assert begun.index("outer-0") < len(begun) - 1 - begun[::-1].index("winner")


def test_rows_outside_of_the_training_rows_have_no_say(tmp_path):
    data = load("wine")
    rows = split(data.y, data.task)
    spoilt = replace(data, x=data.x.copy(), y=data.y.copy())
    outside = np.concatenate([rows.calibration, rows.test])
    spoilt.x[outside] += 1000
    spoilt.y[outside] = 0
    for folder in "ab":
        (tmp_path / folder).mkdir()
    first = tune.tune(data, rows.train, settings(tmp_path / "a", trials=2))
    second = tune.tune(spoilt, rows.train, settings(tmp_path / "b", trials=2))
    assert first.selected_score == pytest.approx(second.selected_score, abs=1e-6)


def test_folds_whose_training_targets_are_one_number_are_refused_before_there_is_a_database(tmp_path):
    data = load("diabetes")
    flat = replace(data, y=np.zeros_like(data.y))
    flat.y[0] = 2.5
    asked = settings(tmp_path, objective="rmse", space=tune.Space(DEFAULTS["diabetes"]))
    for ask in (tune.rare_classes, tune.tune):
        with pytest.raises(ConstantTarget, match="is 0 in 441 of 442 rows, and in all"):
            ask(flat, np.arange(len(flat.y)), asked)
    assert not any(tmp_path.iterdir())


def rare(folder):
    """A table in which one class has five rows, three of them to train with."""
    lines = [f"{number / 7:.3f},{number % 3},{'c' if number % 12 == 0 else 'ab'[number % 2]}" for number in range(60)]
    path = folder / "rare.csv"
    path.write_text("\n".join(["size,rooms,kind", *lines]) + "\n", encoding="utf-8")
    return path


def test_a_class_with_fewer_rows_than_folds_is_said_in_a_line(tmp_path):
    command = [sys.executable, str(ROOT / "dropserve.py"), "tune", str(rare(tmp_path)), "--target", "kind", "--worker"]
    found = subprocess.run(
        [*command, "--epochs", "1", "--trials", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=True,
    )
    wanted = (
        "note: class 'c' has 2 rows in a search: some of its 5 folds are judged without it (--folds 2 has it in each)"
    )
    assert found.stderr.splitlines() == [wanted]


@pytest.mark.parametrize(("folds", "outer"), [(2, 3), (3, 0), (3, 3), (2, 5), (4, 4)])
def test_rare_classes_are_those_that_folds_lack(tmp_path, folds, outer):
    data = tables.read(rare(tmp_path), target="kind")
    rows = split(data.y, data.task).train

    def cut(train, into):
        return inner_folds(data.y, data.task, train, folds=into, seed=0) if into else []

    def lack(parts):
        return any(set(data.y[held]) != {0, 1, 2} for _, held in parts)

    outer_parts = cut(rows, outer)
    notes = tune.rare_classes(data, rows, settings(tmp_path, folds=folds, outer_folds=outer))
    assert all("class 'c'" in note for note in notes)
    within = any(lack(cut(train, folds)) for train in [rows, *(train for train, _ in outer_parts)])
    assert any(f"its {folds} folds" in note for note in notes) == within
    assert any(f"the {outer} outer folds" in note for note in notes) == lack(outer_parts)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--objective", "rmse"], "error: objective 'rmse' for the classification of wine; wanted one of nll,"),
        (["--search", "depth"], "error: --search 'depth'; wanted some of width,max-norm,learning-rate,epochs"),
        (["--storage", "nonsense"], "error: storage 'nonsense': "),
        (
            ["--storage", "sqlite://"],
            "error: storage 'sqlite://': keeps the trials in memory only; wanted a database URL",
        ),
        (["--folds", "90"], "error: 90 folds, but "),
        (["--outer-folds", "1"], "error: --outer-folds 1: one fold cannot judge a search; wanted 0, or 2 and more"),
    ],
)
def test_bad_requests_end_in_a_line(tmp_path, arguments, line):
    process = start(tmp_path, *arguments)
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 2
    assert err.startswith(line)
    assert err.count("\n") == 1
    assert not os.listdir(tmp_path)
