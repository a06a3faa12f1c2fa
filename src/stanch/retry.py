"""After how long another attempt is worth it: pure, the caller sleeps."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Attempt:
    """Which attempt at the same work this is; *maybe_committed*: the outcome of an earlier one is not known."""

    number: int = 1
    maybe_committed: bool = False


def backoff(
    attempt: int, *, base: float = 0.05, cap: float = 2.0, draw: random.Random | None = None
) -> float:
    """Seconds to wait before *attempt* (1 is the first repetition): exponential, capped, fully jittered.

    Full jitter keeps many clients of a recovering server apart (M. Brooker, *Exponential Backoff And
    Jitter*).

    >>> all(0.0 <= backoff(attempt) <= 2.0 for attempt in range(1, 50))
    True
    """
    ceiling = min(cap, base * 2.0 ** min(attempt, 32))
    return (draw or random).uniform(0.0, ceiling)
