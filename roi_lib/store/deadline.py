"""The time that a run is given, for machines that are lent, preempted or shared."""

import math
import time
from dataclasses import dataclass


class OutOfTime(Exception):
    """The time given to a run is over; what it says is done is on disk."""


@dataclass(frozen=True)
class Deadline:
    """When a run is to stop at its next checkpoint, on the clock that all processes share."""

    end: float = math.inf  # of `time.monotonic`

    @classmethod
    def after(cls, minutes: float | None) -> "Deadline":
        """So many minutes from now; None: never. `ValueError`: below 0."""
        if minutes is not None and not minutes >= 0:
            raise ValueError(f"minutes must be 0 or more, not {minutes}")
        return cls() if minutes is None else cls(time.monotonic() + 60 * minutes)

    @property
    def over(self) -> bool:
        """Whether the time has passed."""
        return time.monotonic() >= self.end

    def check(self, done: str) -> None:
        """`OutOfTime`, with what is `done` and kept, once the time has passed."""
        if self.over:
            raise OutOfTime(done)


NEVER = Deadline()
