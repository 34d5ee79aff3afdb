"""Versions of a model, made from published ones without training again."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.contract import MANIFEST_FILE, manifest_bytes, read_manifest

WAIT_S = 180


def publish_as(source: Path, repository: Path, version: int, name: str | None = None, **changes: Any) -> Path:
    """A copy of the artifact `source` as another version, or another model: sealed anew, renamed into place.

    changes: other fields of its manifest.
    """
    manifest = read_manifest(source)
    name = name or manifest.name
    staging = repository / name / f".staging-{version}"
    shutil.copytree(source, staging)
    renamed = manifest.model_copy(update={"name": name, "version": version, **changes})
    (staging / MANIFEST_FILE).write_bytes(manifest_bytes(renamed))
    folder = repository / name / str(version)
    os.rename(staging, folder)
    return folder


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Look until it is so; a test that waits for ever says for what."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT_S} s for {what}"
        time.sleep(0.05)
