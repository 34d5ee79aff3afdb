"""The models on disk: which there are, which versions, and what their routing says. Needs no TensorFlow.

<repository>/<model>/<version>/   an artifact
<repository>/<model>/routing.json which version answers (optional)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from models import contract
from models.contract import ArtifactError, Manifest
from serving.errors import StartError, choices
from serving.routing import Routing, read_routing
from serving.settings import Settings

# By model and version: the artifact's folder.
Folders = dict[str, dict[int, Path]]
# Of a folder's files: differs once anything in it has changed.
Fingerprint = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Repository:
    root: Path
    # Artifacts that came with the server, in place of the repository.
    bundled: Folders = field(default_factory=dict)

    @classmethod
    def choose(cls, settings: Settings, bundled: Sequence[Path] = ()) -> Repository:
        """The repository that the settings name, or what came with the server, as a Bento's models do."""
        if bundled and "repository" not in settings.model_fields_set:
            folders: Folders = {}
            for folder in bundled:
                manifest = contract.read_manifest(folder)
                folders.setdefault(manifest.name, {})[manifest.version] = folder
            return cls(settings.repository, folders)
        return cls(settings.repository)

    @property
    def place(self) -> str:
        return "this Bento" if self.bundled else str(self.root.absolute())

    def folders(self) -> Folders:
        """All artifacts that are there now; a folder that cannot be read counts as empty."""
        if self.bundled:
            return self.bundled
        return {
            name: {version: self.root / name / str(version) for version in contract.versions(self.root, name)}
            for name in contract.model_names(self.root)
        }

    def routing(self, name: str) -> Routing:
        """Raises RoutingError for a file that cannot be used."""
        return Routing() if self.bundled else read_routing(self.root / name)

    def check(self, wanted: str | None) -> None:
        """Whether a server can start: raises StartError, with one line, where nothing here can be served.

        wanted: the model of the native endpoints; one usable version of it is needed, else one of any model.
        """
        folders = self.folders()
        if not folders:
            raise StartError(
                f"{self.place}: no model here; publish one (`dropserve train sonar`) "
                "or name another repository (--repository, DROPSERVE_REPOSITORY)"
            )
        if wanted is None:
            candidates = [folder for versions in folders.values() for folder in _newest_first(versions)]
        elif wanted in folders:
            candidates = _newest_first(folders[wanted])
        else:
            raise StartError(
                f"{self.place}: no model {wanted!r}, wanted one of {choices(folders)} (--model, DROPSERVE_MODEL)"
            )
        refusals = []
        for folder in candidates:
            try:
                contract.verify(folder)
            except ArtifactError as error:
                refusals.append(error)
            else:
                return
        raise StartError(str(refusals[0]))


def require_place(manifest: Manifest, folder: Path, name: str, version: int) -> None:
    """Raise ArtifactError unless the artifact in `folder` is what its place in the repository says."""
    if (manifest.name, manifest.version) != (name, version):
        raise ArtifactError(f"{folder}: holds {manifest.name} {manifest.version}, wanted {name} {version}")


def fingerprint(folder: Path) -> Fingerprint:
    """Names, sizes and times of the files: tells whether a broken artifact is worth another try."""
    found = []
    for path in sorted(folder.rglob("*")):
        try:
            status = path.stat()
        except OSError:
            continue
        found.append((str(path), status.st_size, status.st_mtime_ns))
    return tuple(found)


def _newest_first(versions: dict[int, Path]) -> list[Path]:
    return [versions[version] for version in sorted(versions, reverse=True)]


def newest(versions: Iterable[int], count: int) -> set[int]:
    """The `count` highest numbers."""
    return set(sorted(versions)[-count:])
