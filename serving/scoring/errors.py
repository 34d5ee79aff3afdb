"""Why files cannot be scored."""

from __future__ import annotations


class ScoreError(Exception):
    """`str()` is one line: where, what was found, what is wanted."""


class RowRefused(ScoreError):
    """The first row that the model cannot take, where none may be left out."""
