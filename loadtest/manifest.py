"""What a server says of one of its models: the parts of its manifest that traffic is made from."""

from __future__ import annotations

import random
from typing import Any
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loadtest.errors import LoadTestError

TIMEOUT_S = 30
# Rows that are made, beside the manifest's examples.
MADE = 50
# Digits of a made number: as people write them, and within a float32's.
DIGITS = 6

# A list of numbers, an object by feature name, nested lists of an image: whatever the server's `instances` hold.
Instance = Any


class _Form(BaseModel):
    # A later manifest may have more.
    model_config = ConfigDict(extra="ignore")


class Feature(_Form):
    """A column of a table, with what training saw in it."""

    name: str
    kind: str
    minimum: float | None = None
    maximum: float | None = None
    categories: list[str] | None = None


class Input(_Form):
    name: str
    dtype: str
    shape: list[int | None]
    features: list[Feature] | None = None


class Tensor(_Form):
    name: str
    shape: list[int | None]


class Signature(_Form):
    outputs: list[Tensor]


class Manifest(_Form):
    name: str
    inputs: list[Input] = Field(min_length=1)
    signatures: dict[str, Signature]
    examples: list[Instance] = Field(min_length=1)

    @property
    def columns(self) -> list[str]:
        """The table's names, in the model's order; none where the rows are no table."""
        return [feature.name for item in self.inputs for feature in item.features or ()]

    def rows(self, seed: int = 0) -> list[Instance]:
        """The examples, and rows made within what training saw: of a table by its ranges and categories, of one array
        of float32 between two examples. The same for the same seed; the examples alone where neither is known.
        """
        choices = random.Random(seed)
        columns = [(feature, item.dtype) for item in self.inputs for feature in item.features or ()]
        if columns and all(_is_known(feature) for feature, _ in columns):
            made = [{one.name: _value(one, dtype, choices) for one, dtype in columns} for _ in range(MADE)]
            return [*self.examples, *made]
        if [item.dtype for item in self.inputs] == ["float32"] and not columns:
            pairs = [choices.choices(self.examples, k=2) for _ in range(MADE)]
            return [*self.examples, *(_between(one, other, choices.random()) for one, other in pairs)]
        return self.examples


def read(host: str, model: str) -> Manifest:
    """The manifest of the version that answers now; raises LoadTestError where the server has no such model."""
    url = f"{host}/models/{quote(model, safe='')}/manifest.json"
    try:
        response = httpx.get(url, timeout=TIMEOUT_S)
        if response.status_code == httpx.codes.NOT_FOUND:
            raise LoadTestError(f"{url}: {response.json()['error']}")
        return Manifest.model_validate_json(response.raise_for_status().content)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in wrong["loc"])
        raise LoadTestError(f"{url}: no manifest ({where}: {wrong['msg']}); wanted a dropserve server") from error
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise LoadTestError(f"{url}: no manifest ({error!r}); wanted a dropserve server") from error


def default_model(host: str) -> str | None:
    """The model that answers where no name is given; None where there are several and none of them does."""
    url = f"{host}/openapi.json"
    try:
        document = httpx.get(url, timeout=TIMEOUT_S)
        if document.status_code == httpx.codes.NOT_FOUND:
            return None
        operation = document.raise_for_status().json()["paths"]["/predict"]["post"]
        body = operation["requestBody"]["content"]["application/json"]["example"]
        return httpx.post(f"{host}/predict", json=body, timeout=TIMEOUT_S).raise_for_status().json()["model"]["name"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise LoadTestError(
            f"{url}: no example that /predict answers ({error!r}); wanted a dropserve server"
        ) from error


def _is_known(feature: Feature) -> bool:
    match feature.kind:
        case "boolean":
            return True
        case "categorical":
            return bool(feature.categories)
    return feature.minimum is not None and feature.maximum is not None


def _value(feature: Feature, dtype: str, choices: random.Random) -> Any:
    if feature.kind == "boolean":
        return choices.choice((False, True))
    if feature.kind == "categorical":
        return choices.choice(feature.categories or [])
    lowest, highest = feature.minimum or 0.0, feature.maximum or 0.0
    if "int" in dtype:
        return choices.randint(round(lowest), round(highest))
    return round(choices.uniform(lowest, highest), DIGITS)


def _between(one: Any, other: Any, share: float) -> Any:
    """Nested lists of numbers."""
    if isinstance(one, list):
        return [_between(a, b, share) for a, b in zip(one, other, strict=True)]
    return round(one + share * (other - one), DIGITS)
