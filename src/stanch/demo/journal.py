"""What the clients of one shop asked and what they were told: the promises that the database is then held to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID


class Kind(Enum):
    """What a client can do."""

    ORDER = "order"
    READ = "read"
    PAIR = "order, then read it"
    RAISED = "error raised"
    RETURNED = "error returned"
    STATUS_SET = "error status set"
    INVALID = "reply does not validate"
    FAILING_COMMIT = "commit that fails"
    SWALLOWED = "error swallowed by handler"
    SLEEPS = "handler that sleeps"
    STREAM = "stream"
    HANGS_UP = "hang-up while handler works"
    HANGS_UP_IN_STREAM = "hang-up in a stream"


ERRORS = frozenset({Kind.RAISED, Kind.RETURNED, Kind.STATUS_SET, Kind.INVALID})
"""What a handler ends with an error reply after it has written."""

HANG_UPS = frozenset({Kind.HANGS_UP, Kind.HANGS_UP_IN_STREAM})


class Outcome(Enum):
    """How it ended, as the client saw it."""

    SUCCESS = "2xx"
    ERROR = "error"
    UNKNOWN = "outcome unknown"  # an error reply that says: the work may or may not be stored
    NO_REPLY = "no reply"  # broken off, by the server or the network
    HUNG_UP = "hung up"  # broken off by the client, before there was a whole reply


REPLIES = frozenset({Outcome.SUCCESS, Outcome.ERROR, Outcome.UNKNOWN})


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One exchange. *wrote* is the id of the order that the client tried to place.

    *found*: whether an order read back at once was there; None where nobody looked, or the look failed.
    """

    kind: Kind
    outcome: Outcome
    seconds: float
    wrote: UUID | None = None
    found: bool | None = None


class Journal:
    """All entries of one shop, in the order in which they ended."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.counts: Counter[tuple[Kind, Outcome]] = Counter()

    def add(self, entry: Entry) -> None:
        """Write *entry* down."""
        self.entries.append(entry)
        self.counts[entry.kind, entry.outcome] += 1

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)
