"""`--minutes`: stop cleanly once so many have passed, at the next line of a log or the next step of
a training, whose state is saved first. The same command goes on from there."""

import math
import os
import time

_end = math.inf  # of this process, on the monotonic clock


class TimeUp(Exception):
    """The minutes are over; what is done is kept."""


def set_deadline(minutes: float | None) -> None:
    """Begin to count (None: no end). `ValueError`: no positive number, or several processes, whose
    clocks might disagree about the step at which to stop."""
    global _end
    if minutes is not None and not 0 < minutes < math.inf:
        raise ValueError(f"--minutes must be above 0, not {minutes}")
    if minutes and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--minutes is for one process; stop several with Ctrl-C: what they have "
                         "saved is gone on from")
    _end = time.monotonic() + 60 * minutes if minutes else math.inf


def minutes_left() -> float | None:
    """What is left of them, for processes of this one; None: no end."""
    return None if _end == math.inf else max(_end - time.monotonic(), 1e-3) / 60


def time_is_up() -> bool:
    """Whether the minutes are over."""
    return time.monotonic() > _end


def check_time() -> None:
    """Raise `TimeUp` if the minutes are over."""
    if time_is_up():
        raise TimeUp
