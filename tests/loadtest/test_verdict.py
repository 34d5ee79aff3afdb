"""The load test against a real server: it passes when all is well, and fails when one answer in a thousand is wrong."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from loadtest.profile import NATIVE, Search, choose
from loadtest.verdict import Run
from tests.process import ROOT, bentoml_serve, free_port

pytestmark = pytest.mark.alone

UNSENT = re.compile(r"([\d,]+) requests were due and not sent before the end")
UNANSWERED = re.compile(r"(\d+) requests were sent and had no answer when the test ended")
# An error of a verdict for people; and how often a healthy server may be too slow on a busy machine.
ERROR = re.compile(r"^ *[\d,]+ x (.*)$", re.MULTILINE)
TRIES = 3
PROXY = Path(__file__).with_name("faulty_proxy.py")


def loadtest(*options: str, run_time: str = "5s") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dropserve", "loadtest", "--run-time", run_time, *options]
    command += [] if "--users" in options else ["--users", "4"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def passing(*options: str, run_time: str = "5s") -> subprocess.CompletedProcess[str]:
    """The first run that passes. Others may have been too slow, where the machine is busy, and nothing else."""
    for _ in range(TRIES):
        done = loadtest(*options, run_time=run_time)
        if done.returncode == 0:
            break
        errors = [error for error, _ in json.loads(done.stdout)["errors"]] if "--json" in options else []
        errors = errors or ERROR.findall(done.stdout)
        assert errors, done.stdout + done.stderr
        assert all(error.startswith("all: p") for error in errors), errors
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@contextlib.contextmanager
def faulty_proxy(upstream: str, fault: str, every: int) -> Iterator[str]:
    command = [sys.executable, str(PROXY), upstream, fault, str(every)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def assert_unrounded(figures: dict[str, float]) -> None:
    """Locust's own are whole milliseconds."""
    times = [figures[f"p{share}_ms"] for share in (50, 95, 99)]
    assert 0 < times[0] <= times[1] <= times[2]
    assert any(time % 1 for time in times)


def test_healthy_server_passes(sonar_server):
    done = passing("--host", sonar_server.url, "--json")
    verdict = json.loads(done.stdout)
    assert verdict["passed"]
    assert verdict["errors"] == []
    assert {endpoint["name"] for endpoint in verdict["endpoints"]} == {"/predict", "/uncertainty"}
    for figures in [*verdict["endpoints"], verdict["total"]]:
        assert figures["requests"] > 0
        assert figures["failures"] == 0
        assert_unrounded(figures)
    assert verdict["total"]["requests"] == sum(endpoint["requests"] for endpoint in verdict["endpoints"])
    assert verdict["late_ms"] > 0


def test_summary_shows_figures_and_the_verdict(sonar_server):
    done = passing("--host", sonar_server.url, run_time="2s")
    for word in ("requests/s", "p50 ms", "p95 ms", "p99 ms", "failures", "/predict", "/uncertainty"):
        assert word in done.stdout
    assert done.stdout.strip().endswith("passed")


def test_a_delay_of_50_ms_fails(sonar_server):
    with faulty_proxy(sonar_server.url, "delay_50_ms", every=1) as url:
        done = loadtest("--host", url, "--json", run_time="4s")
    assert done.returncode == 1, done.stdout + done.stderr
    [(said, _)] = json.loads(done.stdout)["errors"]
    assert said.startswith("all: p50 is ")
    assert said.endswith("wanted at most 40 ms")


def test_a_server_that_is_too_slow_for_the_schedule_cannot_hide_it(sonar_server):
    """Two users on answers of 50 ms bear 40 requests a second: at 100 the rest waits, and its wait counts."""
    with faulty_proxy(sonar_server.url, "delay_50_ms", every=1) as url:
        done = loadtest("--host", url, "--json", "--users", "2", "--rate", "100", run_time="4s")
    # After 4 s the schedule is 2.4 s ahead of what two users can have sent; by themselves they would report 50 ms.
    assert json.loads(done.stdout)["total"]["p95_ms"] > 500


def test_requests_that_were_never_sent_are_counted(sonar_server):
    """1,200 requests by two users that get 40 answers a second: 3 s of schedule and 10 s of grace leave half."""
    with faulty_proxy(sonar_server.url, "delay_50_ms", every=1) as url:
        done = loadtest("--host", url, "--json", "--users", "2", "--rate", "400", run_time="3s")
    assert done.returncode == 1, done.stdout + done.stderr
    verdict = json.loads(done.stdout)
    [unsent] = [int(found[1].replace(",", "")) for error, _ in verdict["errors"] if (found := UNSENT.match(error))]
    # Poisson, five standard deviations; two requests were under way.
    assert abs(unsent + verdict["total"]["requests"] - 1200) < 5 * 1200**0.5 + 2


def test_requests_that_were_never_answered_are_counted(sonar_server):
    """The end of the test comes before their timeout, so that they are no failures."""
    with faulty_proxy(sonar_server.url, "silence", every=60) as url:
        done = loadtest("--host", url, "--json", "--users", "20", run_time="3s")
    assert done.returncode == 1, done.stdout + done.stderr
    # The requests 100, 160, 220 ... of about 300.
    [found] = [found for error, _ in json.loads(done.stdout)["errors"] if (found := UNANSWERED.fullmatch(error))]
    assert 2 <= int(found[1]) <= 6


def test_a_server_that_is_slow_at_the_end_fails_by_that(sonar_server):
    with faulty_proxy(sonar_server.url, "delay_50_ms", every=1) as url:
        done = loadtest("--host", url, "--json", "--profile", "soak", "--rate", "20", run_time="6s")
    assert done.returncode == 1, done.stdout + done.stderr
    assert any(error.startswith("all: p50 of the last 5 s is ") for error, _ in json.loads(done.stdout)["errors"])


def test_two_processes_share_the_schedule(sonar_server, tmp_path):
    page = tmp_path / "page.html"
    done = passing("--host", sonar_server.url, "--json", "--processes", "2", "--html", str(page), run_time="5s")
    verdict = json.loads(done.stdout)
    # 5 s at 100 a second, and not twice that; five standard deviations.
    assert abs(verdict["total"]["requests"] - 500) < 5 * 500**0.5
    assert_unrounded(verdict["total"])
    assert verdict["late_ms"] > 0
    text = page.read_text()
    assert text.count("<svg") == text.count("</svg>") == 4
    for word in ("passed", "Latency, from the intended start", "Throughput", "queue", "batches", "None: every answer"):
        assert word in text
    assert not re.search(r"(src|href)=\"(?!#)", text)


def test_two_load_tests_of_several_processes_do_not_meet(sonar_server):
    options = ("--host", sonar_server.url, "--json", "--processes", "2")
    with ThreadPoolExecutor(2) as both:
        runs = list(both.map(lambda _: loadtest(*options, run_time="3s"), range(2)))
    for done in runs:
        assert done.returncode in (0, 1), done.stdout + done.stderr
        verdict = json.loads(done.stdout)
        assert [error for error, _ in verdict["errors"] if not error.startswith("all: p")] == []
        # 3 s at 100 a second; five standard deviations.
        assert abs(verdict["total"]["requests"] - 300) < 5 * 300**0.5


def test_every_protocol_is_asked_and_agrees(trained_repository, tmp_path):
    grpc = free_port()
    with bentoml_serve(trained_repository, tmp_path / "log", DROPSERVE_GRPC_PORT=str(grpc)) as served:
        options = ["--host", served.url, "--profile", "mixed", "--users", "6", "--grpc", f"127.0.0.1:{grpc}", "--json"]
        done = loadtest(*options, run_time="6s")
    verdict = json.loads(done.stdout)
    wrong = [error for error in verdict["errors"] if not error[0].startswith("all: p")]
    assert wrong == []
    assert {kind["name"] for kind in verdict["endpoints"] if kind["requests"]} == {
        "/predict",
        "/uncertainty",
        "/v1 predict",
        "/v2 infer, JSON",
        "/v2 infer, binary",
        "gRPC Predict",
    }


def test_the_knee_is_between_the_rate_that_passes_and_the_one_that_fails(sonar_server):
    """The proxy's 50 ms bound two users to 40 requests a second."""
    with faulty_proxy(sonar_server.url, "delay_50_ms", every=1) as url:
        run = Run(url, {kind: {"": 1} for kind in NATIVE}, (), (), 1, "")
        found = run.search(replace(choose("ramp", users=2, run_time="3s", rate=1), search=Search(4, 256, 1.0)))
    assert found.tries[0].rate == 4
    assert not found.tries[-1].passed or found.knee == found.tries[-1].rate
    assert found.knee is None or found.knee < 64
    assert max(one.rate for one in found.tries if not one.passed) <= 128


def test_one_wrong_probability_in_a_thousand_answers_fails(sonar_server):
    with faulty_proxy(sonar_server.url, "wrong_probability", every=1000) as url:
        done = loadtest("--host", url, run_time="10s")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.strip().endswith("failed")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("wrong_sum", "probabilities sum to 1.01"),
        ("negative_entropy", "predictive_entropy"),
        ("wrong_standard_error", "standard_error"),
        ("lost_row", "predictions, wanted"),
        ("text_for_number", "a finite number from 0 to 1 wanted"),
        ("status_500", "status 500, wanted 200"),
    ],
)
def test_wrong_answers_fail_and_are_named(sonar_server, fault, said):
    with faulty_proxy(sonar_server.url, fault, every=10) as url:
        done = loadtest("--host", url, "--json", run_time="2s")
    assert done.returncode == 1, done.stdout + done.stderr
    verdict = json.loads(done.stdout)
    assert not verdict["passed"]
    assert any(said in error for error, _ in verdict["errors"]), verdict["errors"]


@pytest.mark.parametrize("form", ["csv by name", "csv in order", "json"])
def test_own_rows_are_sent(sonar_server, tmp_path, form):
    header, *lines = (ROOT / "training" / "data" / "sonar.csv").read_text().splitlines()[:5]
    path = tmp_path / f"rows.{form.split()[0]}"
    if form == "json":
        path.write_text(json.dumps([[float(cell) for cell in line.split(",")[:-1]] for line in lines]))
    else:
        header = header if form == "csv by name" else header.replace("band_", "column_")
        path.write_text("\n".join([header, *lines]))
    target = [] if form == "json" else ["--target", "object"]
    passing("--host", sonar_server.url, "--rows", str(path), *target, run_time="2s")


def test_rows_that_the_model_refuses_fail(sonar_server, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("band_01,depth\n0.1,3\n")
    done = loadtest("--host", sonar_server.url, "--rows", str(path), "--json", run_time="2s")
    assert done.returncode == 1, done.stdout + done.stderr
    assert any("status 400" in error for error, _ in json.loads(done.stdout)["errors"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rows", "absent.csv"], "absent.csv: cannot be read"),
        (["--profile", "storm"], "profile 'storm'"),
        (["--run-time", "soon"], "run time 'soon'"),
        (["--users", "1"], "--users"),
        (["--host", "localhost:3000"], "--host localhost:3000: wanted the address with its scheme, as http://"),
        (["--processes", "3"], "wanted at least 6, of each kind one in each process"),
    ],
)
def test_bad_options_end_with_exit_code_2_and_one_line(sonar_server, options, said):
    done = loadtest("--host", sonar_server.url, *options)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_absent_server_ends_with_exit_code_2_and_one_line():
    done = loadtest("--host", f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 2
    assert "no server answers" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_absent_grpc_port_ends_with_exit_code_2_and_one_line(sonar_server):
    address = f"127.0.0.1:{free_port()}"
    done = loadtest("--host", sonar_server.url, "--profile", "mixed", "--users", "6", "--grpc", address)
    assert done.returncode == 2
    assert f"--grpc {address}: no gRPC server answers" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
