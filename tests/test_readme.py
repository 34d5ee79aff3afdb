"""The README's first answer is what the server says."""

from __future__ import annotations

import json
import re

import httpx

from tests.process import ROOT


def test_first_answer_has_the_form_that_the_readme_shows(sonar_server):
    text = (ROOT / "README.md").read_text()
    [request] = re.findall(r"-d '(\{\"instances\".*?\})' \| python3", text, re.DOTALL)
    [shown] = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    answer = httpx.post(f"{sonar_server.url}/uncertainty", json=json.loads(request), timeout=60)
    assert answer.status_code == 200, answer.text
    # Not the numbers: another processor rounds otherwise, and so trains slightly other weights.
    assert _form(answer.json()) == _form(json.loads(shown))


def _form(value):
    """Names and types, in order, without the numbers, nor how many classes a set has: that follows from them."""
    if isinstance(value, dict):
        return [(name, _form(item)) for name, item in value.items()]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return list
    return [_form(item) for item in value] if isinstance(value, list) else type(value)
