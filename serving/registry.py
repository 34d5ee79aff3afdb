"""The models in memory: which versions are loaded, and which one answers a request.

Changed on the event loop only, in one step at a time, so that every request sees either the old state or the new one.
A request holds its model until it is answered: taking a version out of the registry never disturbs it.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from serving.errors import LabelNotFound, ModelNotFound, NoDefaultModel, VersionLoading, VersionNotFound
from serving.routing import Routing
from serving.runtime import Model


class State(StrEnum):
    """Of a version, in TensorFlow Serving's words."""

    LOADING = "LOADING"
    AVAILABLE = "AVAILABLE"
    UNLOADING = "UNLOADING"
    END = "END"


@dataclass(frozen=True)
class Status:
    state: State
    # Why the version is not served, where it should be.
    error: str = ""


@dataclass
class Shelf:
    """All versions of one model."""

    name: str
    loaded: dict[int, Model] = field(default_factory=dict)
    statuses: dict[int, Status] = field(default_factory=dict)
    # What holds now. A label moves only to a version that is loaded.
    labels: dict[str, int] = field(default_factory=dict)
    routing: Routing = field(default_factory=Routing)
    # The version that answers where none is named, but for a canary's share.
    current: Model | None = None

    def settle(self) -> None:
        """After any change: choose the version that answers where none is named: the pinned one, else the newest.

        A pin to a version that is not loaded leaves the one that answers in its place.
        """
        if self._lacks_pin and self.current in self.loaded.values():
            return
        canary, shadow = self.routing.canary, self.routing.shadow
        held_back = {canary.version if canary else None, shadow.version if shadow else None}
        settled = self.loaded.keys() - held_back or self.loaded.keys()
        version = self.routing.pin if self.routing.pin in self.loaded else max(settled, default=None)
        self.current = None if version is None else self.loaded[version]

    @property
    def _lacks_pin(self) -> bool:
        """Whether a version is pinned that is not loaded."""
        return self.routing.pin is not None and self.routing.pin not in self.loaded

    def is_loading(self, version: int | None) -> bool:
        """Whether the version is being loaded; without a version, whether any is."""
        wanted = self.statuses if version is None else self.statuses.keys() & {version}
        return any(self.statuses[number].state is State.LOADING for number in wanted)

    def held(self) -> set[int]:
        """Versions that answer in the place of others which the routing names and which are not loaded."""
        held = set(self.labels.values())
        if self._lacks_pin and self.current is not None:
            held.add(self.current.manifest.version)
        return held

    def choose(self, request: bytes | Callable[[], bytes] | None) -> Model | None:
        """The model for a request that names no version.

        request: its body, which decides whether it is among the canary's share; a retry decides the same.
        """
        canary = self.routing.canary
        if canary is None or request is None or canary.version not in self.loaded:
            return self.current
        if callable(request):
            request = request()
        return self.loaded[canary.version] if zlib.crc32(request) / 2**32 < canary.share else self.current


class Registry:
    def __init__(self, default: str | None = None) -> None:
        """default: the model of the requests that name none."""
        self.default = default
        self.shelves: dict[str, Shelf] = {}

    def shelf(self, name: str) -> Shelf:
        """The versions of a model; raises ModelNotFound."""
        try:
            return self.shelves[name]
        except KeyError:
            raise ModelNotFound(name, self.shelves) from None

    def find(
        self,
        name: str | None = None,
        version: int | None = None,
        label: str | None = None,
        request: bytes | Callable[[], bytes] | None = None,
    ) -> Model:
        """The model that answers; raises NotFound, VersionLoading, or LabelNotFound, which is the caller's mistake.

        request: the body, or what makes it, by which a canary's share of the requests is chosen.
        """
        name = self._default_name() if name is None else name
        if label is not None:
            # Of an unknown model too: it is the label that TensorFlow Serving does not recognize then.
            labels = self.shelves[name].labels if name in self.shelves else {}
            if label not in labels:
                raise LabelNotFound(name, label, labels)
            version = labels[label]
        shelf = self.shelf(name)
        model = shelf.choose(request) if version is None else shelf.loaded.get(version)
        if model is None:
            if shelf.is_loading(version):
                raise VersionLoading(shelf.name, version)
            raise VersionNotFound(shelf.name, version, sorted(shelf.loaded))
        return model

    def put(self, model: Model) -> None:
        """From now on the version may answer."""
        shelf = self.shelves.setdefault(model.name, Shelf(model.name))
        shelf.loaded[model.manifest.version] = model
        shelf.statuses[model.manifest.version] = Status(State.AVAILABLE)
        shelf.settle()

    def take(self, name: str, version: int) -> None:
        """From now on the version answers no new request; its memory goes when the last request has been answered."""
        shelf = self.shelves[name]
        model = shelf.loaded.pop(version)
        shelf.statuses[version] = Status(State.UNLOADING)
        shelf.settle()

        def gone() -> None:
            if version not in shelf.loaded:
                shelf.statuses[version] = Status(State.END)

        weakref.finalize(model, gone)

    def mark(self, name: str, version: int, status: Status) -> None:
        self.shelves.setdefault(name, Shelf(name)).statuses[version] = status

    def forget(self, name: str, version: int) -> None:
        """Say nothing more of a version that is neither loaded nor on disk."""
        self.shelves[name].statuses.pop(version, None)

    def _default_name(self) -> str:
        if self.default is None:
            raise NoDefaultModel(self.shelves)
        return self.default
