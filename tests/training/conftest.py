"""`dropserve evaluate` as the tests of what it judges call it: in `desk`, a folder that each of them makes."""

import json
import sys

import pytest

import dropserve


@pytest.fixture
def command(desk, monkeypatch, capfd):
    """Runs `dropserve evaluate`; gives exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.chdir(desk)
        monkeypatch.setattr(sys, "argv", ["dropserve", "evaluate", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            dropserve.main()
        output, error = capfd.readouterr()
        return stop.value.code or 0, output, error

    return run


@pytest.fixture
def judged(command):
    """What it says with `--json`."""

    def run(*arguments):
        code, output, error = command(*arguments, "--json")
        assert (code, error) == (0, "")
        return json.loads(output)

    return run
