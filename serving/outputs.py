"""What a call gave to one of the requests that shared it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from serving.errors import InvalidRequest

Made = TypeVar("Made")


class Outputs(Mapping[str, np.ndarray]):
    """One request's rows of a call's outputs, by tensor: views, made when somebody looks.

    Most requests have one row, and what is made of an array's rows costs little more for all of a call's than for one:
    `made` shares it among the requests.
    """

    __slots__ = ("_all", "_first", "_last", "_made")

    def __init__(
        self, arrays: Mapping[str, np.ndarray], first: int, last: int, made: dict[Hashable, list[Any]] | None = None
    ) -> None:
        """arrays: of the whole call. made: what was made of them, the same object for all of the call's requests."""
        self._all = arrays
        self._first = first
        self._last = last
        self._made = {} if made is None else made

    @classmethod
    def whole(cls, arrays: Mapping[str, np.ndarray]) -> Outputs:
        """All rows."""
        return cls(arrays, 0, len(next(iter(arrays.values()))))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._all[name][self._first : self._last]

    def __contains__(self, name: object) -> bool:
        return name in self._all

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def made(self, key: Hashable, make: Callable[[Mapping[str, np.ndarray]], list[Made]]) -> list[Made]:
        """What `make` gives for this request's rows, one item each; raises InvalidRequest where it does.

        make: a row's item follows from that row alone, and equal keys make equal items.
        """
        found = self._made.get(key)
        if found is None:
            try:
                found = self._made[key] = make(self._all)
            except InvalidRequest:
                # Another request's rows may be to blame.
                return make(dict(self))
        return found[self._first : self._last]
