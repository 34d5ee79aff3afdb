"""What no answer tells: whether the load test itself kept its schedule, and what was sent and never answered."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

SHARE = 0.99


class Pace:
    """Of one process of the load test, or of all of them together."""

    def __init__(self) -> None:
        # How often a user that was free sent so many ms after the request was due.
        self._late_ms: Counter[int] = Counter()
        # Due when the test ended, and not sent: all users were busy.
        self.unsent = 0
        # Sent, and without an answer, be it an error; negative in a message that has more answers than requests.
        self.unanswered = 0

    def sent(self, late_s: float) -> None:
        self._late_ms[math.ceil(1000 * late_s)] += 1

    @property
    def late_ms(self) -> int | None:
        """Of a hundred requests for which a user was free, 99 were sent at most so late; None where none was."""
        wanted, found = SHARE * self._late_ms.total(), 0
        for late_ms in sorted(self._late_ms):
            found += self._late_ms[late_ms]
            if found >= wanted:
                return late_ms
        return None

    def taken(self) -> dict[str, Any]:
        """What was noted since the last time, as a message to Locust's master."""
        message = {"late_ms": dict(self._late_ms), "unsent": self.unsent, "unanswered": self.unanswered}
        self._late_ms.clear()
        self.unsent = self.unanswered = 0
        return message

    def add(self, message: dict[str, Any]) -> None:
        self._late_ms.update(message["late_ms"])
        self.unsent += message["unsent"]
        self.unanswered += message["unanswered"]
