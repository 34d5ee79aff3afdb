"""A verdict as one self-contained HTML page with plots: no script, nothing that is fetched."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from loadtest.errors import LoadTestError
from loadtest.profile import Phase, Profile
from loadtest.verdict import Verdict

TEMPLATE = Path(__file__).with_name("page.html")
# Readable by those who see fewer colours, on white.
BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#595959"


def write(verdict: Verdict, profile: Profile, path: Path) -> None:
    """Write the page to `path`; raises LoadTestError where that cannot be done."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        verdict=verdict,
        profile=profile,
        when=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        plots=[(title, Markup(_svg(figure))) for title, figure in _plots(verdict, profile)],
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LoadTestError(f"{path}: cannot be written ({error.strerror}); wanted a place for the page") from error


def _plots(verdict: Verdict, profile: Profile) -> list[tuple[str, Figure]]:
    line = verdict.timeline
    plots = [
        ("Latency, from the intended start", _latency(line, profile)),
        ("Throughput", _throughput(line, [] if verdict.tries else profile.phases)),
    ]
    server = _server(line)
    if server:
        plots.append(("The server's queue", _curve(server, "queue_ms", "mean wait, ms", BLUE)))
        plots.append(("The server's batches", _batches(server)))
    if verdict.tries:
        plots.append(("The knee", _knee(verdict, profile)))
    return plots


def _latency(line: Sequence[dict[str, Any]], profile: Profile) -> Figure:
    figure, axes = _axes("ms")
    # Of the requests between two looks; Locust's workers report every three seconds.
    known = [point for point in line if point["p50_ms"] is not None]
    seconds = [point["second"] for point in known]
    for name, colour in (("p50", BLUE), ("p95", ORANGE), ("p99", RED)):
        axes.plot(seconds, [point[f"{name}_ms"] for point in known], color=colour, label=name)
    limits = (("p50", profile.thresholds.p50_ms, BLUE), ("p99", profile.thresholds.p99_ms, RED))
    for name, limit, colour in limits:
        if limit is not None:
            axes.axhline(limit, color=colour, linestyle=":", label=f"limit of {name}")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.16))
    return figure


def _throughput(line: list[dict[str, Any]], phases: Sequence[Phase]) -> Figure:
    figure, axes = _axes("requests/s")
    ends = [0.0, *itertools.accumulate(phase.seconds for phase in phases)]
    if phases:
        axes.stairs([phase.rate for phase in phases], ends, color=GREY, linestyle=":", label="due")
    # Locust's workers report every three seconds: between reports nothing is known.
    known = line[:1] + [after for before, after in itertools.pairwise(line) if after["requests"] > before["requests"]]
    steps = list(itertools.pairwise(known))
    seconds = [after["second"] for _, after in steps]
    for name, colour, label in (("requests", BLUE, "answered"), ("failures", RED, "of these, wrong or refused")):
        rates = [(after[name] - before[name]) / (after["second"] - before["second"]) for before, after in steps]
        axes.plot(seconds, rates, color=colour, label=label)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.16))
    return figure


def _server(line: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Means between two looks at /metrics; looks between which nothing was computed are left out."""
    found = []
    for before, after in itertools.pairwise(line):
        change = {name: value - before["server"].get(name, 0) for name, value in after["server"].items()}
        waits, calls = change.get("dropserve_queue_seconds_count", 0), change.get("dropserve_batch_rows_count", 0)
        if before["server"] and waits > 0 and calls > 0:
            found.append(
                {
                    "second": after["second"],
                    "queue_ms": 1000 * change["dropserve_queue_seconds_sum"] / waits,
                    "rows": change["dropserve_batch_rows_sum"] / calls,
                    "requests": change["dropserve_batch_requests_sum"] / calls,
                }
            )
    return found


def _curve(points: list[dict[str, float]], name: str, label: str, colour: str) -> Figure:
    figure, axes = _axes(label)
    axes.plot([point["second"] for point in points], [point[name] for point in points], color=colour)
    axes.set_ylim(bottom=0)
    return figure


def _batches(points: list[dict[str, float]]) -> Figure:
    figure, axes = _axes("mean of a call")
    for name, colour in (("rows", GREEN), ("requests", ORANGE)):
        axes.plot([point["second"] for point in points], [point[name] for point in points], color=colour, label=name)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.16))
    return figure


def _knee(verdict: Verdict, profile: Profile) -> Figure:
    figure, axes = _axes("p99, ms", "requests/s asked for")
    for passed, colour, label in ((True, GREEN, "passed"), (False, RED, "failed")):
        tried = [one for one in verdict.tries if one.passed == passed and one.p99_ms is not None]
        axes.scatter([one.rate for one in tried], [one.p99_ms for one in tried], color=colour, label=label)
    if profile.thresholds.p99_ms is not None:
        axes.axhline(profile.thresholds.p99_ms, color=RED, linestyle=":", label="limit")
    if verdict.knee is not None:
        axes.axvline(verdict.knee, color=GREEN, linestyle=":", label=f"knee, {verdict.knee:,.0f}/s")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.16))
    return figure


def _axes(label: str, below: str = "s") -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(below)
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]
