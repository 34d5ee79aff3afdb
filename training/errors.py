"""Bad input, as the command line reports it."""

from __future__ import annotations


class InputError(Exception):
    """The user asked for something that cannot be done. `str()` is one line: what was found, what is wanted."""
