"""TensorFlow for whoever only runs artifacts: imported in less than half of the time, in a hundred MB less."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
from collections.abc import Iterator

# What only TensorFlow's Keras and its tools would use, which no artifact needs.
UNUSED = ("keras", "h5py", "scipy")


def import_tensorflow() -> None:
    """Before anything else imports it; whoever imports Keras itself, afterwards, finds it."""
    # TensorFlow's own words on a missing GPU are many; ours is one line.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    hidden = [name for name in UNUSED if name not in sys.modules]
    # Python's own way to say "not installed".
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        with nothing_to_collect():
            importlib.import_module("tensorflow")
    finally:
        for name in hidden:
            del sys.modules[name]


@contextlib.contextmanager
def nothing_to_collect() -> Iterator[None]:
    """Around imports: all that they make stays, and to look for garbage in it takes a fifth of their time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
