"""Another Python process, for what must hold without this one's memory."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]


def python(script: str, *arguments: Any, cwd: Path = ROOT, **environment: str) -> str:
    """Run the script in a fresh interpreter; return its standard output. A failure shows its standard error."""
    finished = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@contextlib.contextmanager
def fresh_python(script: str, *arguments: Any) -> Iterator[IO[str]]:
    """Run the script in a fresh interpreter beside this one, which writes to its standard input; then wait for it."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        try:
            yield process.stdin
        except BaseException:
            process.kill()
            raise
        _, errors = process.communicate()
    assert process.returncode == 0, errors
