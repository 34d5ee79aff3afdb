"""The artifact as a model in BentoML's own store, so that a Bento can carry it."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from models.contract import ArtifactError, read_manifest


def import_artifact(folder: Path) -> str:
    """Copy the whole artifact into BentoML's model store; return its tag, "name:version".

    Importing the same version again replaces it. (`bentoml.tensorflow` and `bentoml.keras` would drop signatures.)
    Raises ArtifactError where the store cannot be written; the artifact's own folder is as it was.
    """
    import bentoml
    from bentoml.exceptions import BentoMLException, NotFound

    manifest = read_manifest(folder)
    tag = f"{manifest.name}:{manifest.version}"
    labels = {"framework": "tensorflow_savedmodel", "manifest_sha256": manifest.sha256}
    try:
        with contextlib.suppress(NotFound):
            bentoml.models.delete(tag)
        with bentoml.models.create(tag, labels=labels) as model:
            shutil.copytree(folder, model.path, dirs_exist_ok=True)
    except (OSError, BentoMLException) as error:
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(
            f"{folder}: it is published, but BentoML's own store cannot take it ({reason}); "
            "see BENTOML_HOME, where that store is"
        ) from error
    return tag
