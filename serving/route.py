"""`dropserve route`: change a model's routing file; a running server follows it, within its poll interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from models import contract
from serving.errors import StartError, choices
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
    `none` in place of a version. Raises StartError with one line.
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
    named = dict(routing.labels)
    for label in labels:
        key, equals, version = label.partition("=")
        if not equals:
            raise StartError(f"--label {label}: wanted LABEL=VERSION, or LABEL={NONE}")
        found = _version("--label", label, version, published)
        named.pop(key, None)
        if found is not None:
            named[key] = found
    changes: dict[str, object] = {"labels": named}
    if pin is not None:
        changes["pin"] = _version("--pin", pin, pin, published)
    if canary is not None:
        version, colon, share = canary.partition(":")
        number = _version("--canary", canary, version, published)
        if number is not None and not colon:
            raise StartError(f"--canary {canary}: wanted VERSION:SHARE, as {number}:0.1")
        changes["canary"] = None if number is None else Canary(version=number, share=_share("--canary", canary, share))
    if shadow is not None:
        version, _, share = shadow.partition(":")
        number = _version("--shadow", shadow, version, published)
        asked = _share("--shadow", shadow, share) if share else 1.0
        changes["shadow"] = None if number is None else Shadow(version=number, share=asked)
    try:
        routing = Routing.model_validate({**routing.model_dump(), **changes})
    except ValueError as error:
        raise StartError(f"--label: {', '.join(labels)}: wanted letters, digits, '.', '_' or '-' in a label") from error
    write_routing(repository / name, routing)
    return routing


def sentences(name: str, routing: Routing, published: list[int]) -> str:
    """What holds now, for people."""
    tried = {trial.version for trial in (routing.canary, routing.shadow) if trial is not None}
    newest = max(set(published) - tried or set(published))
    lines = [f"{name}: version {routing.pin or newest} answers" + (", pinned" if routing.pin else ", the newest")]
    if routing.canary is not None:
        lines.append(f"  version {routing.canary.version} answers {routing.canary.share:.3g} of the requests (canary)")
    if routing.shadow is not None:
        lines.append(f"  version {routing.shadow.version} is compared on {routing.shadow.share:.3g} of them (shadow)")
    lines += [f"  label {label} is version {version}" for label, version in sorted(routing.labels.items())]
    return "\n".join(lines)


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
