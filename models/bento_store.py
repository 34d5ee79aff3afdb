"""The artifact as a model in BentoML's own store, so that a Bento can carry it."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from models.contract import read_manifest


def import_artifact(folder: Path) -> str:
    """Copy the whole artifact into BentoML's model store; return its tag, "name:version".

    Importing the same version again replaces it. (`bentoml.tensorflow` and `bentoml.keras` would drop signatures.)
    """
    import bentoml
    from bentoml.exceptions import NotFound

    manifest = read_manifest(folder)
    tag = f"{manifest.name}:{manifest.version}"
    with contextlib.suppress(NotFound):
        bentoml.models.delete(tag)
    labels = {"framework": "tensorflow_savedmodel", "manifest_sha256": manifest.sha256}
    with bentoml.models.create(tag, labels=labels) as model:
        shutil.copytree(folder, model.path, dirs_exist_ok=True)
    return tag
