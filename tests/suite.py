"""The whole suite, as `make test` runs it: two pytest processes side by side, then what is marked `alone` by itself.

    python -m tests.suite

What each process says stays together, and the last line counts all.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType

# About half of the time: networks are trained. Beside it others are packaged, and servers are waited for.
TRAINING = ("tests/training", "tests/benchmarks")
SIDE_BY_SIDE = (
    ("-m", "not alone", *TRAINING),
    ("-m", "not alone", "tests", *(f"--ignore={folder}" for folder in TRAINING)),
)
ALONE = (("-m", "alone", "tests"),)

NOTHING_COLLECTED = 5
# In pytest's own order; what one part deselects, another one runs.
KINDS = ("failed", "passed", "skipped", "xfailed", "xpassed", "warning", "error")
COLOURS = re.compile(r"\x1b\[[\d;]*m")
SUMMARY = re.compile(r"^=+ (.*\d .*) in [\d.]+s.* =+$", re.MULTILINE)
WIDTH = 80


@dataclass(frozen=True)
class Part:
    code: int
    said: str

    @property
    def counts(self) -> Counter[str]:
        """How many of each kind; a process that ended before its summary is an error."""
        summaries = SUMMARY.findall(COLOURS.sub("", self.said))
        if not summaries:
            return Counter(error=1)
        counted = re.findall(r"(\d+) (\w+?)s?\b", summaries[-1])
        return Counter({kind: int(number) for number, kind in counted if kind in KINDS})


def run(parts: Sequence[Sequence[str]]) -> list[Part]:
    """Pytest with each of these arguments, all at once; the first is shown as it goes, the others after all."""
    with tempfile.TemporaryDirectory(prefix="dropserve-suite-") as folder:
        logs = [Path(folder, str(number)) for number, _ in enumerate(parts)]
        processes = []
        for log, arguments in zip(logs, parts, strict=True):
            with log.open("wb") as stream:
                command = [
                    sys.executable,
                    "-m",
                    "pytest",
                    f"--color={'yes' if sys.stdout.isatty() else 'no'}",
                    *arguments,
                ]
                processes.append(subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT))
        try:
            with logs[0].open("rb") as first:
                while any(process.poll() is None for process in processes):
                    _show(first.read())
                    time.sleep(0.2)
                _show(first.read())
        except SystemExit:
            for process in processes:
                process.send_signal(signal.SIGINT)
            raise
        finally:
            # They have seen Ctrl-C as well, and stop their servers.
            for process in processes:
                process.wait()
        for log in logs[1:]:
            _show(log.read_bytes())
        codes = [process.returncode for process in processes]
        return [Part(code, log.read_text(errors="replace")) for code, log in zip(codes, logs, strict=True)]


def summary(parts: Iterable[Part], seconds: float) -> str:
    counts = sum((part.counts for part in parts), Counter())
    said = ", ".join(f"{counts[kind]} {_named(kind, counts[kind])}" for kind in KINDS if counts[kind]) or "no tests ran"
    took = f"{seconds:.2f}s" + (f" ({timedelta(seconds=int(seconds))})" if seconds >= 60 else "")
    return f" {said} in {took} ".center(WIDTH, "=")


def exit_code(parts: Sequence[Part]) -> int:
    """Of the first that failed; that one part has no tests is no failure."""
    codes = [part.code for part in parts]
    bad = [code if code > 0 else 128 - code for code in codes if code not in (0, NOTHING_COLLECTED)]
    return bad[0] if bad else min(codes)


def _named(kind: str, count: int) -> str:
    return f"{kind}s" if kind in ("warning", "error") and count > 1 else kind


def _show(text: bytes) -> None:
    sys.stdout.buffer.write(text)
    sys.stdout.flush()


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> int:
    # Comes to this process alone, unlike Ctrl-C.
    signal.signal(signal.SIGTERM, _end)
    began = time.monotonic()
    try:
        parts = [*run(SIDE_BY_SIDE), *run(ALONE)]
    except KeyboardInterrupt:
        return 130
    print(f"\n{summary(parts, time.monotonic() - began)}")
    return exit_code(parts)


if __name__ == "__main__":
    sys.exit(main())
