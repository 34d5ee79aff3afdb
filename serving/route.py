"""`dropserve route`: change a model's routing file; a running server follows it, within its poll interval."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from models import contract
from models.contract import ArtifactError
from serving.errors import StartError, choices
from serving.repository import require_place
from serving.routing import Canary, Routing, RoutingError, Shadow, read_routing, write_routing

# Of an option that takes a version: the word that takes the setting away.
NONE = "none"


def reroute(
    repository: Path,
    name: str,
    *,
    pin: str | None = None,
    labels: Sequence[str] = (),
    canary: str | None = None,
    shadow: str | None = None,
) -> Routing:
    """Change what is given, keep the rest, write the file; returns what holds now.

    pin: a version. labels: `LABEL=VERSION`. canary: `VERSION:SHARE`. shadow: `VERSION` or `VERSION:SHARE`. Each takes
    `none` in place of a version. Raises StartError with one line, for a version that no server can load as well.
    """
    published = contract.versions(repository, name)
    if not published:
        known = choices(contract.model_names(repository)) or "none yet"
        raise StartError(f"{repository}: no model {name!r}, wanted one of {known}")
    try:
        routing = read_routing(repository / name)
    except RoutingError as error:
        raise StartError(f"{error}; correct or delete the file") from error
    if pin is None and not labels and canary is None and shadow is None:
        return routing

    def chosen(option: str, given: str, text: str) -> int | None:
        number = _version(option, given, text, published)
        fault = None if number is None else _fault(repository, name, number)
        if fault is not None:
            raise StartError(f"{option} {given}: version {number} cannot be served: {fault}")
        return number

    named = dict(routing.labels)
    for label in labels:
        key, equals, version = label.partition("=")
        if not equals:
            raise StartError(f"--label {label}: wanted LABEL=VERSION, or LABEL={NONE}")
        found = chosen("--label", label, version)
        named.pop(key, None)
        if found is not None:
            named[key] = found
    changes: dict[str, object] = {"labels": named}
    if pin is not None:
        changes["pin"] = chosen("--pin", pin, pin)
    if canary is not None:
        version, colon, share = canary.partition(":")
        number = chosen("--canary", canary, version)
        if number is not None and not colon:
            raise StartError(f"--canary {canary}: wanted VERSION:SHARE, as {number}:0.1")
        changes["canary"] = None if number is None else Canary(version=number, share=_share("--canary", canary, share))
    if shadow is not None:
        version, _, share = shadow.partition(":")
        number = chosen("--shadow", shadow, version)
        asked = _share("--shadow", shadow, share) if share else 1.0
        changes["shadow"] = None if number is None else Shadow(version=number, share=asked)
    try:
        routing = Routing.model_validate({**routing.model_dump(), **changes})
    except ValueError as error:
        raise StartError(f"--label: {', '.join(labels)}: wanted letters, digits, '.', '_' or '-' in a label") from error
    write_routing(repository / name, routing)
    return routing


def sentences(repository: Path, name: str, routing: Routing) -> str:
    """What holds now, for people; of damaged versions, what a server does without them."""
    fault = functools.cache(functools.partial(_fault, repository, name))
    tried = {trial.version for trial in (routing.canary, routing.shadow) if trial is not None}
    published = contract.versions(repository, name)
    wanted = sorted(set(published) - tried or published, reverse=True) if routing.pin is None else [routing.pin]
    answers = next((version for version in wanted if fault(version) is None), None)
    if routing.pin is not None:
        does = "answers, pinned" if answers else "is pinned and cannot be served: the version that answers stays"
        lines = [f"{name}: version {routing.pin} {does}"]
    elif answers is not None:
        newest = "the newest" if answers == wanted[0] else "the newest that can be served"
        lines = [f"{name}: version {answers} answers, {newest}"]
    else:
        lines = [f"{name}: no version can be served"]
    if (canary := routing.canary) is not None:
        does = f"answers {canary.share:.3g} of the requests"
        if fault(canary.version):
            does = "cannot be served: no share of the requests is its own"
        lines.append(f"  version {canary.version} {does} (canary)")
    if (shadow := routing.shadow) is not None:
        does = f"is compared on {shadow.share:.3g} of them"
        if fault(shadow.version):
            does = "cannot be served: nothing is compared"
        lines.append(f"  version {shadow.version} {does} (shadow)")
    for label, version in sorted(routing.labels.items()):
        lacks = ", which cannot be served: the version that it named stays" if fault(version) else ""
        lines.append(f"  label {label} is version {version}{lacks}")
    passed_over = {version for version in wanted if answers is None or version > answers}
    damaged = sorted(version for version in passed_over | routing.versions() if fault(version))
    return "\n".join([*lines, *(f"  version {version}: {fault(version)}" for version in damaged)])


def _fault(repository: Path, name: str, version: int) -> str | None:
    """Why no server can load a version, as far as its files tell."""
    folder = repository / name / str(version)
    try:
        require_place(contract.verify(folder), folder, name, version)
    except ArtifactError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror}"
    return None


def _version(option: str, given: str, text: str, published: list[int]) -> int | None:
    if text == NONE:
        return None
    number = contract.version_number(text)
    if number not in published:
        raise StartError(
            f"{option} {given}: no version {text!r}, wanted one of {choices(map(str, published))} or {NONE}"
        )
    return number


def _share(option: str, given: str, text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise StartError(f"{option} {given}: found share {text!r}, wanted a number above 0 and at most 1")
    return share
