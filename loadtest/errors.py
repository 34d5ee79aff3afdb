"""Why a load test could not be made."""

from __future__ import annotations


class LoadTestError(Exception):
    """`str()` is one line: what was found, what is wanted."""


class RowsError(LoadTestError):
    """Rows to send cannot be had."""
