"""What a server's own /metrics says: sums over all models and signatures, to be set against those of a moment later."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 2
SUMS = ("dropserve_queue_seconds", "dropserve_batch_rows", "dropserve_batch_requests")


def read_totals(host: str) -> dict[str, float]:
    """`<name>_sum` and `<name>_count` of each histogram; nothing where the server has none, or does not answer now."""
    try:
        text = httpx.get(f"{host}/metrics", timeout=TIMEOUT_S).raise_for_status().text
    except httpx.HTTPError:
        return {}
    wanted = {f"{name}_{end}" for name in SUMS for end in ("sum", "count")}
    totals = dict.fromkeys(wanted, 0.0)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in wanted:
                totals[sample.name] += sample.value
    return totals
