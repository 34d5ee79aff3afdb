"""What is in a model repository, read from the manifests alone: no TensorFlow."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from models.contract import ArtifactError, Manifest, listed, model_names, read_manifest, verify, versions
from training.errors import InputError

# To be measured in.
_ANY_WIDTH = 10_000


class NotPublished(InputError):
    def __init__(self, repository: Path, found: str) -> None:
        super().__init__(f"{repository}: {found}")


@dataclass(frozen=True)
class Item:
    """One version of one model."""

    name: str
    version: int
    folder: Path
    # None where the manifest itself cannot be read.
    manifest: Manifest | None
    # Why the artifact would be refused by a server; None where every file is as it was published.
    problem: str | None


def read(repository: Path) -> list[Item]:
    """Every published version, by name and number, each file checked against its digest."""
    return [
        inspect(repository / name / str(version), name, version)
        for name in model_names(repository)
        for version in versions(repository, name)
    ]


def published(repository: Path, name: str, version: int | None) -> Path:
    """The folder of a model's version, the newest where none is asked for. Raises NotPublished."""
    found = versions(repository, name)
    if not found:
        known = listed(model_names(repository)) or "none (`dropserve train sonar` makes one)"
        raise NotPublished(repository, f"no model {name!r}, found {known}")
    if version is not None and version not in found:
        known = listed(map(str, found))
        raise NotPublished(repository, f"model {name!r} has no version {version}, wanted one of {known}")
    return repository / name / str(found[-1] if version is None else version)


def inspect(folder: Path, name: str, version: int) -> Item:
    manifest = None
    try:
        manifest = read_manifest(folder)
        verify(folder)
    except ArtifactError as error:
        return Item(name, version, folder, manifest, str(error))
    return Item(name, version, folder, manifest, None)


def document(item: Item) -> dict[str, Any]:
    """One version for a script."""
    entry = asdict(item) | {"folder": str(item.folder), "verified": item.problem is None}
    del entry["manifest"]
    if item.manifest is None:
        return entry
    kept = ("created", "stochastic_layers", "num_samples", "seed", "metrics", "training_data", "members")
    return (
        entry
        | {key: item.manifest.model_dump(mode="json")[key] for key in kept}
        | {"tasks": [output.task for output in item.manifest.outputs]}
    )


def shown(items: list[Item], console: Console) -> Group:
    """All versions for a person: a table, or a few lines for each where that is too wide; then what is wrong."""
    whole = table(items)
    as_wide_as_it_is = console.options.update(width=_ANY_WIDTH)
    fits = console.measure(whole, options=as_wide_as_it_is).maximum <= console.width
    entries = [whole] if fits else [part for item in items for part in _entry(item)]
    return Group(*entries, *(Text(f"\n{item.problem}") for item in items if item.problem is not None))


def table(items: list[Item]) -> Table:
    """All versions, a row for each."""
    table = Table(box=None, pad_edge=False)
    for heading in ("model", "task", "stochastic\nlayers", "test rows", "created", "files"):
        table.add_column(heading, overflow="fold")
    for item in items:
        table.add_row(f"{item.name} {item.version}", *_described(item.manifest), _state(item))
    return table


def _entry(item: Item) -> list[RenderableType]:
    task, layers, metrics, created = (text.replace("\n", ", ") for text in _described(item.manifest))
    below = [layers.replace(":, ", ": "), f"test rows: {metrics or 'none'}", f"created {created}, files {_state(item)}"]
    return [
        Text(f"{item.name} {item.version}: {task}"),
        *(Padding(Text(line), (0, 0, 0, 2), expand=False) for line in below),
    ]


def _state(item: Item) -> str:
    return "verified" if item.problem is None else "refused"


def _described(manifest: Manifest | None) -> tuple[str, str, str, str]:
    if manifest is None:
        return ("?", "?", "?", "?")
    layers = Counter(
        f"{layer.kind} {' '.join(str(value) for value in layer.settings.values())}"
        for layer in manifest.stochastic_layers
    )
    ensemble = [f"in each of {manifest.members} members:"] if manifest.members > 1 else []
    return (
        "\n".join(output.task for output in manifest.outputs),
        "\n".join([*ensemble, *(f"{count} {layer}" for layer, count in layers.items())]),
        "\n".join(f"{name} {value:.3g}" for name, value in manifest.metrics.get("test", {}).items()),
        manifest.created[:10],
    )
