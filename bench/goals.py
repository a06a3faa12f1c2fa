"""What we want of stanch: bounds that the report sets beside what was measured.

Each rests on what a prototype reached, or on what hurts below it; a goal that is missed is told as plainly as one that
is met, and nothing else depends on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from bench.shop import Kind
from bench.subjects import BASELINE

if TYPE_CHECKING:
    from collections.abc import Mapping

READ: Final = Kind.READ.ask.title
BARE: Final = Kind.BARE.ask.title


class Goal(NamedTuple):
    """A bound for one quantity: of its ratio to what another subject has in the same rounds or, alone, of itself."""

    case: str
    subject: str
    where: Mapping[str, str | float]
    """The part of the setting that counts; what it does not name may be anything."""
    quantity: str
    says: str
    """The goal, as a sentence."""
    than: str | None = BASELINE
    """The subject that it is a ratio to; None: the bounds are of the figure itself."""
    ratio_at_least: float | None = None
    ratio_at_most: float | None = None


GOALS: Final = (
    Goal(
        "distance",
        "stanch-reader",
        {"rtt_ms": 0.5},
        "requests",
        "A read at 0.5 ms to the server: twice as many requests, for one round trip is needed and not three.",
        ratio_at_least=2.0,
    ),
    Goal(
        "distance",
        "stanch-reader",
        {"rtt_ms": 2},
        "requests",
        "A read at 2 ms to the server: the longer the way, the nearer to three times.",
        ratio_at_least=2.4,
    ),
    Goal(
        "rates",
        "stanch-reader",
        {"kind": READ, "rtt_ms": 0.5, "clients": 1},
        "requests",
        "The same over HTTP, where a client waits for two of the three: its next request takes another connection.",
        ratio_at_least=2.0,
    ),
    Goal(
        "rates",
        "stanch-reader",
        {"kind": READ, "rtt_ms": 2, "clients": 1},
        "requests",
        "The same over HTTP at 2 ms. By the count of what a client waits for, twice is the most there can be.",
        ratio_at_least=2.4,
    ),
    Goal(
        "rates",
        "stanch-reader",
        {"kind": READ, "rtt_ms": 0.5, "clients": 1},
        "requests",
        "A read at 0.5 ms to the server, beside the pattern with `pool_pre_ping`, which awaits six round trips.",
        than="article-ping",
        ratio_at_least=3.0,
    ),
    Goal(
        "instructions",
        "stanch-reader",
        {"kind": READ},
        "instructions",
        "A read by a reader takes less of the processor.",
        ratio_at_most=0.87,
    ),
    Goal(
        "instructions",
        "stanch",
        {"kind": READ},
        "instructions",
        "So does a read by `SessionDep`.",
        ratio_at_most=0.95,
    ),
    Goal(
        "instructions",
        "stanch",
        {"kind": BARE},
        "instructions",
        "An endpoint without a session hardly notices that stanch is installed.",
        than="bare",
        ratio_at_most=1.02,
    ),
    *(
        goal
        for subject in ("stanch", "stanch-reader")
        for goal in (
            Goal(
                "fairness",
                subject,
                {"clients": 32, "pool": 10},
                "p99",
                "Nobody is overtaken: of 32 clients on a pool of 10 the slowest wait an eighth as long.",
                ratio_at_most=1 / 8,
            ),
            Goal(
                "fairness",
                subject,
                {"clients": 32, "pool": 10},
                "requests",
                "And that costs no throughput.",
                ratio_at_least=1.0,
            ),
            Goal(
                "fairness",
                subject,
                {"loops": 6},
                "least turns / most turns",
                "Six greedy loops on a pool of 2 all have their turns.",
                than=None,
                ratio_at_least=0.9,
            ),
        )
    ),
    Goal(
        "hold_time",
        "stanch-reader",
        {},
        "requests",
        "A reader keeps no connection while its handler waits for something else.",
        ratio_at_least=4.5,
    ),
    *(
        Goal(
            "overload",
            "stanch",
            {"load": load},
            "good answers / capacity",
            f"At {load} times the capacity nearly all of it is left for good answers.",
            than=None,
            ratio_at_least=0.85,
        )
        for load in (2, 4)
    ),
    Goal(
        "imports",
        "stanch",
        {},
        "instructions",
        "It adds little to the start of an app.",
        ratio_at_most=1.05,
    ),
    *(
        Goal(
            "instruments",
            told,
            {"what": "checkout"},
            "more",
            "To know who holds what costs microseconds.",
            than=None,
            ratio_at_most=25.0,
        )
        for told in ("as it is", "measured")
    ),
)
