"""What a run has shown: promises kept, a promise broken, or nothing at all."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from stanch.demo.finds import Culprit
from stanch.demo.server import Layer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stanch.demo.finds import Finds
    from stanch.demo.judge import Verdict


class Status(IntEnum):
    """How a run ended; the exit status of the process."""

    KEPT = 0
    BROKEN = 1
    VOID = 2


@dataclass(frozen=True, slots=True)
class Conclusion:
    """The status of a run, and a sentence for the person at the terminal."""

    status: Status
    sentence: str


def conclude(
    verdicts: Mapping[Layer, Verdict], finds: Mapping[Layer, Finds], *, kills: int, restarts: int
) -> Conclusion:
    """Broken if stanch broke a promise; void if what would have broken one did not happen; else kept.

    A culprit that it did not name is a promise broken. A run in which the hand-written pattern lost nothing is void,
    too: its eyes were shut.
    """
    ours, theirs = verdicts[Layer.STANCH], verdicts[Layer.HANDWRITTEN]
    unnamed = [f"{each.label} was not named" for each in Culprit if each not in finds[Layer.STANCH]]
    if broken := [*ours.broken, *unnamed]:
        return Conclusion(Status.BROKEN, f"stanch broke a promise: {', '.join(broken)}")
    happened = {
        "a backend killed": kills,
        "a restart": restarts,
        "losses of the hand-written pattern": theirs.broken,
    }
    unseen = [*ours.untested, *(name for name, seen in happened.items() if not seen)]
    if unseen:
        return Conclusion(Status.VOID, f"a void run, it proves nothing; not seen: {', '.join(unseen)}")
    return Conclusion(Status.KEPT, "stanch lost nothing, and named every culprit")
