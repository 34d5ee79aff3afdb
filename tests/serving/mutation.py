"""Bytes that are nearly a valid request: what a fuzzer sends."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

# Values at the edges of what a parser, a tensor or a limit takes.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 60, 61, 10**4, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**400),
    *(0.5, -0.0, 1e39, 1e308, 5e-324, float("nan"), float("inf"), -float("inf")),
    *("", "features", "num_samples", "sonar", "\0", "\ud800", "é" * 300, "FP32", "BYTES", "mc_draws", {"b64": "AAAA"}),
    *([], {}, [[]], [[[]]], [None], {"": {}}, [0.1] * 60, [[0.1] * 60]),
)
TOKENS = (
    *(b"", b"[", b"]", b"{", b"}", b'"', b",", b":", b"\0", b"\xff\xfe", b"\\u0000", b"\\ud800", b"1e999", b"NaN"),
    *(
        b"-Infinity",
        b"[" * 300,
        b'{"":' * 300,
        b"9" * 500,
        b"\r\n",
        b"\r\n\r\n",
        b"chunked",
        b"%00",
        b"%",
        b"//",
        b"\x80",
    ),
)
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_MOST_STEPS = 3


def mutated(chosen: random.Random, seed: bytes, others: Sequence[bytes]) -> bytes:
    """One to three changes of a valid request; `others` are requests to take parts from."""
    content = seed
    for _ in range(chosen.randint(1, _MOST_STEPS)):
        content = chosen.choice(_STEPS)(chosen, content, others)
    return content


def _flip(chosen: random.Random, content: bytes, _: Sequence[bytes]) -> bytes:
    changed = bytearray(content)
    for _bit in range(chosen.randint(1, 8) if changed else 0):
        changed[chosen.randrange(len(changed))] ^= 1 << chosen.randrange(8)
    return bytes(changed)


def _cut(chosen: random.Random, content: bytes, _: Sequence[bytes]) -> bytes:
    start, stop = _span(chosen, content)
    return content[:start] + content[stop:]


def _repeat(chosen: random.Random, content: bytes, _: Sequence[bytes]) -> bytes:
    start, stop = _span(chosen, content)
    return content[:stop] + content[start:stop] * chosen.randint(1, 3) + content[stop:]


def _truncate(chosen: random.Random, content: bytes, _: Sequence[bytes]) -> bytes:
    return content[: chosen.randint(0, len(content))]


def _insert(chosen: random.Random, content: bytes, _: Sequence[bytes]) -> bytes:
    place = chosen.randint(0, len(content))
    return content[:place] + chosen.choice(TOKENS) + content[place:]


def _splice(chosen: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    other = chosen.choice(others)
    return content[: chosen.randint(0, len(content))] + other[chosen.randint(0, len(other)) :]


def _renumber(chosen: random.Random, content: bytes, _: Sequence[bytes]) -> bytes:
    """Another number in the place of one."""
    found = list(_NUMBER.finditer(content))
    if not found:
        return content
    start, stop = chosen.choice(found).span()
    number = chosen.choice([value for value in VALUES if isinstance(value, int | float)])
    return content[:start] + json.dumps(number).encode() + content[stop:]


def _replace_member(chosen: random.Random, content: bytes, _: Sequence[bytes]) -> bytes:
    """Another value in some place of a JSON document; other bytes stay as they are."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return content
    places = list(_places(document))
    if not places:
        return json.dumps(chosen.choice(VALUES)).encode()
    container, key = chosen.choice(places)
    if chosen.random() < 0.2:
        del container[key]
    else:
        container[key] = chosen.choice(VALUES)
    return json.dumps(document).encode()


def _places(document: Any) -> Iterable[tuple[Any, Any]]:
    members = document.items() if isinstance(document, dict) else enumerate(document)
    if isinstance(document, dict | list):
        for key, value in members:
            yield document, key
            if isinstance(value, dict | list):
                yield from _places(value)


def _span(chosen: random.Random, content: bytes) -> tuple[int, int]:
    start = chosen.randint(0, len(content))
    return start, min(len(content), start + chosen.randint(1, 40))


_STEPS: tuple[Callable[[random.Random, bytes, Sequence[bytes]], bytes], ...] = (
    *(_flip, _cut, _repeat, _truncate, _insert, _splice, _renumber),
    *[_replace_member] * 4,
)
