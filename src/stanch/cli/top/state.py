"""What is known at one moment: the latest numbers of each database, those of the last minutes, the latest events."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stanch.cli.top.readings import Happening, Message, Sample, Told

MINUTES: Final = 5
EVENTS: Final = 200


@dataclass(slots=True)
class Watched:
    """One database of one process."""

    told: Told
    samples: deque[Sample] = field(default_factory=lambda: deque["Sample"](maxlen=60 * MINUTES))

    def take(self, told: Told) -> None:
        """Make *told* the latest."""
        self.told = told
        known = self.samples[-1].number if self.samples else 0
        self.samples.extend(sample for sample in told.samples if sample.number > known)


@dataclass(frozen=True, slots=True)
class Lost:
    """The feed is away. *again_at* is the monotonic moment of the next attempt."""

    why: str
    again_at: float


class State:
    """All that the screen can show."""

    def __init__(self) -> None:
        self.lost: Lost | None = None
        self._run = ""
        self._databases: dict[str, Watched] = {}
        self._happenings: dict[tuple[str, int], Happening] = {}
        self._untold: list[Happening] = []

    @property
    def databases(self) -> Sequence[Watched]:
        """In the order of the app; empty before the first message."""
        return [*self._databases.values()]

    @property
    def happenings(self) -> Sequence[Happening]:
        """The latest first."""
        return sorted(self._happenings.values(), key=lambda each: -each.at)

    def take(self, message: Message) -> None:
        """Make *message* the latest. Of another process it leaves nothing of the one before."""
        if message.run != self._run:
            self._databases.clear()
            self._happenings.clear()
            self._run = message.run
        for told in message.databases:
            self._databases.setdefault(told.snapshot.database, Watched(told)).take(told)
        for happening in self._untold:
            self._happenings[happening.database, happening.number] = happening
        while len(self._happenings) > EVENTS:
            del self._happenings[next(iter(self._happenings))]
        self._untold.clear()
        self.lost = None

    def note(self, happening: Happening) -> None:
        """Keep *happening* for the next message, which says of which process it is; told twice, it is kept once."""
        self._untold.append(happening)
