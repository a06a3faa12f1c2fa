"""Puts what a feed tells into the state, and judges it: what is not understood is no feed of ours."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Final

from stanch.cli.top.feed import Address, FeedError, Sent, Status, connected
from stanch.cli.top.readings import Unreadable, read_happening, read_message

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from stanch.cli.top.state import State

FIRST: Final = 10.0
"""Seconds in which a feed must have sent its first numbers."""


async def listen(
    address: Address, headers: Mapping[str, str], state: State, *, mark: str, enough: Callable[[Sent], bool]
) -> None:
    """Put what the feed tells into *state* until it ends, or a snapshot is *enough*. Raises ``FeedError``."""
    try:
        async with asyncio.timeout(FIRST) as first, connected(address, headers, mark=mark) as events:
            async for sent in events:
                if _take(state, sent, address):
                    first.reschedule(None)
                    if enough(sent):
                        return
    except TimeoutError:
        raise FeedError(
            Status.NO_FEED, f"{address} is a stream of events, but no numbers came within {FIRST:g} s"
        ) from None
    if first.when() is not None:
        raise FeedError(Status.NO_FEED, f"{address} ended before it had sent any numbers")


def _take(state: State, sent: Sent, address: Address) -> bool:
    """Put what was *sent* into *state*; True if it was a snapshot. Raises ``FeedError``."""
    try:
        match sent.kind:
            case "happening":
                state.note(read_happening(json.loads(sent.data)))
            case "snapshot":
                state.take(read_message(json.loads(sent.data)))
                return True
            case _:
                pass  # of a later release
    except (Unreadable, json.JSONDecodeError, RecursionError) as error:
        raise FeedError(
            Status.NO_FEED,
            f"{address} says what this release of stanch does not understand: {error}",
            "Use the release that the app has: pip install stanch==...",
        ) from None
    return False
