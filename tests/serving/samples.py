"""What /metrics says, as numbers."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, frozenset], float]


def samples(client: httpx.Client) -> Samples:
    """All of the server's own series, by name and labels."""
    text = client.get("/metrics").raise_for_status().text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("dropserve_")
    }


def total(found: Samples, metric: str, **labels: str) -> float:
    """The sum over all series of this name that have these labels."""
    return sum(value for (name, have), value in found.items() if name == metric and labels.items() <= set(have))
