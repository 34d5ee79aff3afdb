"""`make test` on a small project: its parts at once, all that they say, in order, and one summary of the whole."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.process import ROOT
from tests.suite import TRAINING, Part, summary

PROJECT = """
[tool.pytest.ini_options]
addopts = ["--strict-markers", "-ra"]
markers = ["alone: by itself"]
"""
# The first two are there at one time, the third when they have gone.
NETWORKS = """
import pathlib, time
def test_network():
    pathlib.Path("computing").touch()
    while not pathlib.Path("serving").exists():
        time.sleep(0.05)
    for number in range(50):
        print("of the network", number)
    assert {holds}
"""
SERVING = """
import pathlib, time, pytest
def test_server():
    pathlib.Path("serving").touch()
    while not pathlib.Path("computing").exists():
        time.sleep(0.05)
    for number in range(50):
        print("of the server", number)
    assert {holds}
@pytest.mark.skip(reason="no GPU")
def test_gpu():
    pass
@pytest.mark.alone
def test_deadline():
    pathlib.Path("alone").touch()
    {alone}
"""


@pytest.fixture
def project(tmp_path) -> Path:
    for folder in (*TRAINING, "tests/serving"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    return tmp_path


def write(project: Path, *, networks: str = "True", server: str = "True", alone: str = "pass") -> None:
    (project / "tests" / "training" / "test_training.py").write_text(NETWORKS.format(holds=networks))
    serving = SERVING.format(holds=server, alone=alone)
    (project / "tests" / "serving" / "test_serving.py").write_text(serving)


# Of what pytest may be given, the project needs nothing.
BARE = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def suite(project: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tests" / "suite.py")]
    return subprocess.run(command, cwd=project, env=BARE, capture_output=True, text=True, timeout=120, check=False)


def test_all_parts_pass_and_the_last_line_counts_them(project):
    write(project)
    done = suite(project)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, last = done.stdout.splitlines()
    assert re.fullmatch(r"=+ 3 passed, 1 skipped in [\d.]+s =+", last)
    assert (project / "alone").exists()


def test_failures_are_said_whole_one_part_after_another(project):
    write(project, networks="1 == 2", server="3 == 4")
    done = suite(project)
    assert done.returncode == 1
    *_, last = done.stdout.splitlines()
    assert re.fullmatch(r"=+ 2 failed, 1 passed, 1 skipped in [\d.]+s =+", last)
    for place in ("network", "server"):
        assert "\n".join(f"of the {place} {number}" for number in range(50)) in done.stdout
    assert done.stdout.index("of the network 49") < done.stdout.index("1 failed") < done.stdout.index("of the server 0")


def test_what_fails_alone_fails_the_suite(project):
    write(project, alone="assert False")
    done = suite(project)
    assert done.returncode == 1
    assert "1 failed, 2 passed, 1 skipped in" in done.stdout.splitlines()[-1]


def test_a_process_that_dies_is_an_error(project):
    write(project, alone="import os; os.kill(os.getpid(), 9)")
    done = suite(project)
    assert done.returncode == 128 + signal.SIGKILL
    assert "2 passed, 1 skipped, 1 error in" in done.stdout.splitlines()[-1]


def test_a_file_that_cannot_be_read_is_an_error(project):
    write(project)
    (project / "tests" / "training" / "test_broken.py").write_text("import nothing_of_that_name")
    (project / "computing").touch()
    done = suite(project)
    assert done.returncode == 2
    # Both that it might be in: what is alone is looked for everywhere.
    assert "1 passed, 1 skipped, 2 errors in" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
def test_an_end_from_outside_ends_both_parts_and_waits_for_them(project, sent):
    cleaned = (
        "import pytest\n@pytest.fixture(autouse=True)\ndef cleaned():\n    yield\n    open('cleaned', 'a').write('x')\n"
    )
    (project / "conftest.py").write_text(cleaned)
    write(project, networks="time.sleep(60)", server="time.sleep(60)")
    command = [sys.executable, str(ROOT / "tests" / "suite.py")]
    with subprocess.Popen(
        command,
        cwd=project,
        env=BARE,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        limit = time.monotonic() + 60
        while not ((project / "serving").exists() and (project / "computing").exists()):
            assert time.monotonic() < limit
            time.sleep(0.05)
        time.sleep(0.5)
        # Ctrl-C comes to all processes, a time limit's end to the first.
        os.killpg(process.pid, sent) if sent == signal.SIGINT else process.send_signal(sent)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + sent
    assert "Traceback" not in error
    assert (project / "cleaned").read_text() == "xx"
    assert not (project / "alone").exists()


def test_a_long_run_is_told_as_pytest_tells_it():
    failing = Part(1, "=== 2 failed, 10 passed in 3.00s ===")
    passing = Part(0, "== 5 passed, 2 deselected, 1 warning in 90.00s (0:01:30) ==")
    assert summary([failing, passing], 1500.123).strip("=") == " 2 failed, 15 passed, 1 warning in 1500.12s (0:25:00) "
