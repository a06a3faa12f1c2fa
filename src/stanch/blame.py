"""What to say of those who hold connections: who they are, and what would make them hold for less long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from stanch.sqltext import shape_of

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from stanch.ledger import Checkout

_SHOWN: Final = 3
"""How many holders are named; more would hide the first."""

_MOST_OF_IT: Final = 0.5
"""From which share of its time on SQL is what a holder does."""

_MANY: Final = 50
"""From how many statements on their number is worth a word."""


def lines_of(held: Sequence[Checkout], now: float) -> str:
    """The longest holders, one indented line for each; *held* begins with the longest."""
    shown = [checkout.told_at(now) for checkout in held[:_SHOWN]]
    return "".join(
        f"\n  {'held longest' if number == 0 else 'then'}: {line}" for number, line in enumerate(shown)
    )


def remedies_for(
    held: Sequence[Checkout], now: float, caller: asyncio.Task[object] | None = None
) -> list[str]:
    """What may help *caller*, by what the longest holder is doing; first of all, if it waits for itself."""
    if not held:
        return []
    itself = caller is not None and any(checkout.task is caller for checkout in held)
    own = ["Whoever asks holds one already: use that session, or end it first."] if itself else []
    return own + _against(held[0], now)


def _against(longest: Checkout, now: float) -> list[str]:
    if not longest.is_tracked and not longest.is_orphan:
        return [
            "Look at who holds longest: await release(session) before work that waits for something else."
        ]
    if longest.is_orphan:
        return ["That holder's task is gone. Close what it has opened: async with db.session() does."]
    lasted = now - longest.since
    if (began := longest.running_since) is not None and now - began >= _MOST_OF_IT * lasted:
        running, shape = now - began, shape_of(longest.statement)
        return [
            f"That holder has been in one statement for {running:.2f} s. Is it slow, or locked out? {shape}"
        ]
    if longest.sql_time_at(now) < _MOST_OF_IT * lasted:
        how = (
            "Release first: await release(session)."
            if longest.account is not None
            else "End its block first."
        )
        return [f"That holder is waiting for something that is not the database. {how}"]
    if longest.statements >= _MANY:
        return [
            f"That holder has sent {longest.statements} statements. Load what it needs with fewer of them."
        ]
    return ["That holder works with the database all the time: make its transaction shorter."]
