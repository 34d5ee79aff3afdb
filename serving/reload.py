"""Brings what is loaded to what the repository says, again and again: new versions, broken ones, labels.

Promises:
- a new version is verified, loaded and warmed up before it answers; only then is an old one taken away;
- a version that cannot be loaded leaves the old one answering; it is tried again once its files change;
- the last version of a model is never taken away, whatever happens to its files;
- a label moves only to a version that is loaded.
"""

from __future__ import annotations

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from models.contract import ArtifactError
from serving.metrics import Metrics
from serving.registry import Registry, State, Status
from serving.repository import Fingerprint, Folders, Repository, fingerprint, newest, require_place
from serving.routing import Routing, RoutingError
from serving.runtime import Model

log = structlog.get_logger()


class Reloader:
    def __init__(
        self, repository: Repository, registry: Registry, metrics: Metrics, keep_versions: int, poll_s: float
    ) -> None:
        """keep_versions: of each model, how many of the newest stay loaded beside those that its routing names."""
        self._repository = repository
        self._registry = registry
        self._metrics = metrics
        self._keep_versions = keep_versions
        self._poll_s = poll_s
        # Loads one version at a time, beside the event loop.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dropserve-load")
        # Versions that could not be loaded, with the state of their files then.
        self._broken: dict[Path, Fingerprint] = {}
        # Complaints about a routing file, each said once.
        self._complaints: dict[str, str] = {}

    def load_all(self) -> None:
        """The first load, before anything is served; blocks. Broken versions are logged, and older ones stand in."""
        folders = self._repository.folders()
        routings = self._routings(folders)
        for name, versions in folders.items():
            for version in sorted(routings[name].versions() & versions.keys()):
                self._load_here(name, version, versions[version])
            wanted = self._keep_versions
            for version in sorted(versions, reverse=True):
                if wanted and self._load_here(name, version, versions[version]):
                    wanted -= 1
        self._apply_routings(routings)

    async def run(self) -> None:
        """Look at the repository every `poll_s` seconds, for ever."""
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self.step()
            except Exception:  # a full disk, a vanished mount: what is loaded goes on answering
                log.exception("the repository could not be followed")

    async def step(self) -> None:
        """One look at the repository, and all that follows from it."""
        loop = asyncio.get_running_loop()
        folders = await loop.run_in_executor(self._thread, self._repository.folders)
        routings = await loop.run_in_executor(self._thread, self._routings, folders)
        for name, versions in folders.items():
            # Before a version is loaded: it may be one that must not answer everybody.
            self._apply_routings({name: routings[name]})
            for version in sorted(self._wanted(name, versions, routings[name])):
                await self._load(name, version, versions[version])
            self._apply_routings({name: routings[name]})
        self._unload(folders, routings)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _wanted(self, name: str, versions: dict[int, Path], routing: Routing) -> set[int]:
        """The versions that should be loaded: the newest that are not broken, and those that the routing names."""
        usable = [version for version, folder in versions.items() if not self._is_broken(folder)]
        return newest(usable, self._keep_versions) | (routing.versions() & set(usable))

    def _is_broken(self, folder: Path) -> bool:
        found = self._broken.get(folder)
        return found is not None and found == fingerprint(folder)

    async def _load(self, name: str, version: int, folder: Path) -> None:
        shelf = self._registry.shelves.get(name)
        if shelf is not None and version in shelf.loaded:
            return
        self._registry.mark(name, version, Status(State.LOADING))
        before = fingerprint(folder)
        try:
            model = await asyncio.get_running_loop().run_in_executor(self._thread, _load, name, version, folder)
        except ArtifactError as error:
            self._refuse(name, version, folder, before, error)
        else:
            self._accept(model)

    def _load_here(self, name: str, version: int, folder: Path) -> bool:
        """Load while nothing is served yet; whether it could be."""
        shelf = self._registry.shelves.get(name)
        if shelf is not None and version in shelf.loaded:
            return True
        before = fingerprint(folder)
        try:
            self._accept(_load(name, version, folder))
        except ArtifactError as error:
            self._refuse(name, version, folder, before, error)
            return False
        return True

    def _accept(self, model: Model) -> None:
        self._broken.pop(model.folder, None)
        self._metrics.loaded(model)
        self._registry.put(model)
        log.info("version ready", model=model.name, version=model.version)

    def _refuse(self, name: str, version: int, folder: Path, before: Fingerprint, error: ArtifactError) -> None:
        self._broken[folder] = before
        self._registry.mark(name, version, Status(State.END, str(error)))
        self._metrics.reloaded(name, "refused")
        log.error("version cannot be served", model=name, version=version, reason=str(error))

    def _unload(self, folders: Folders, routings: dict[str, Routing]) -> None:
        """Take away what is wanted no more, if something newer or older answers in its place."""
        taken = False
        for name, shelf in self._registry.shelves.items():
            versions = folders.get(name, {})
            wanted = self._wanted(name, versions, routings[name]) if name in folders else set()
            wanted |= shelf.held() & versions.keys()
            keep = {version for version in shelf.loaded if version in wanted} or newest(shelf.loaded, 1)
            for version in [version for version in shelf.loaded if version not in keep]:
                log.info("version retired", model=name, version=version)
                self._registry.take(name, version)
                self._metrics.reloaded(name, "retired")
                taken = True
            for version in [version for version in shelf.statuses if version not in versions]:
                if version not in shelf.loaded and shelf.statuses[version].state is not State.UNLOADING:
                    self._registry.forget(name, version)
                    self._metrics.forget(name, str(version))
        for folder in [folder for folder in self._broken if not folder.is_dir()]:
            del self._broken[folder]
        if taken:
            # TensorFlow's Python objects refer to each other in circles.
            self._thread.submit(gc.collect)

    def _routings(self, folders: Folders) -> dict[str, Routing]:
        """Of each model; where the file cannot be used, what held before."""
        routings = {}
        for name in folders:
            shelf = self._registry.shelves.get(name)
            complaint = ""
            try:
                routings[name] = self._repository.routing(name)
            except RoutingError as error:
                routings[name] = Routing() if shelf is None else shelf.routing
                complaint = str(error)
            if complaint != self._complaints.get(name, ""):
                self._complaints[name] = complaint
                if complaint:
                    log.error("routing cannot be used", model=name, reason=complaint)
        return routings

    def _apply_routings(self, routings: dict[str, Routing]) -> None:
        for name, routing in routings.items():
            shelf = self._registry.shelves.get(name)
            if shelf is None:
                continue
            labels = {}
            for label, version in routing.labels.items():
                if version in shelf.loaded:
                    labels[label] = version
                elif label in shelf.labels and shelf.labels[label] in shelf.loaded:
                    labels[label] = shelf.labels[label]
            if labels != shelf.labels or routing != shelf.routing:
                log.info("routing", model=name, labels=labels, **routing.model_dump(exclude={"labels"}))
            shelf.labels = labels
            shelf.routing = routing
            shelf.settle()


def _load(name: str, version: int, folder: Path) -> Model:
    """Load one artifact; raises ArtifactError, also where it is not what its place in the repository says."""
    try:
        model = Model.load(folder)
    except OSError as error:  # a file that vanished while it was read
        raise ArtifactError(f"{error.filename or folder}: {error.strerror}") from error
    require_place(model.manifest, folder, name, version)
    return model
