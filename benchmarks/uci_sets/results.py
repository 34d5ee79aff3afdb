"""Results on disk: one JSON-lines file a set, a line a split, so that a run can be stopped at any time and go on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """All whole records. The last line of a run that was killed while writing is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def append(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Add records; after half a line, on a line of their own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    text = "".join(json.dumps(record) + "\n" for record in records)
    with path.open("a") as file:
        file.write(text if whole else "\n" + text)
        file.flush()


def by_split(records: Iterable[dict[str, Any]], epochs: int) -> dict[int, dict[str, Any]]:
    """The records of one number of epochs; of a split that is there twice, the last."""
    return {record["split"]: record for record in records if record["epochs"] == epochs}
