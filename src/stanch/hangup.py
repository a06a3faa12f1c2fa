"""Stops the reading of a client that has hung up: its running statement, and those that would follow.

A task waits at the client's end of the line. When the client leaves, whoever is inside the unit's session is
cancelled, as by ``asyncio.timeout``, and the cancellation becomes ``ClientGone`` where the session is left: nothing
outside ever sees a cancellation that it did not ask for, and one that comes from elsewhere at the same time wins.
``GuardedSession._execute_internal``, the funnel of every statement, is ours; see ``stanch.sessions``.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, cast

from stanch.callers import current_task
from stanch.completion import is_ours
from stanch.errors import ClientGone
from stanch.events import logger
from stanch.sessions import GuardedSession, guarded_session

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    from sqlalchemy.ext.asyncio import AsyncSession


_MADE: Final = "_stanch_readers_class"


class HangUp:
    """The line to one client, and the sessions that stop reading when it goes dead.

    It acts while nothing was written: from the first write on the work goes to its end, because a COMMIT may be on its
    way, or wanted, although nobody waits for the reply. It ends when the unit is settled or closed.
    """

    __slots__ = ("_readers", "_watching", "happened")

    def __init__(self, receive: Callable[[], Awaitable[MutableMapping[str, Any]]]) -> None:
        self.happened = False
        self._readers: list[ReadersSession] = []
        self._watching = asyncio.create_task(self._watch(receive), name="stanch: waits for a hang-up")

    def stop_reading(self, session: AsyncSession) -> None:
        """Let *session* be one of those that stop."""
        reader = guarded_session(session)
        if not isinstance(reader, ReadersSession):
            reader.__class__ = _readers_class(type(reader))
            reader = cast("ReadersSession", reader)
            reader.line, reader.running = self, None
            self._readers.append(reader)

    def end(self) -> None:
        """Watch no longer: a commit may be next, or nobody is reading any more."""
        self._watching.cancel()
        self._readers.clear()
        self.happened = False  # what still reads now, a background task say, reads for itself

    async def _watch(self, receive: Callable[[], Awaitable[MutableMapping[str, Any]]]) -> None:
        try:
            message = await receive()
        except Exception as error:  # noqa: BLE001  # the server's business; then the queries simply run on
            logger.debug("a hang-up can not be noticed here: %s", type(error).__name__)
            return
        if message["type"] == "http.disconnect":
            self.happened = True
            for reader in self._readers:
                reader.cancel_reading()


class ReadersSession(GuardedSession):
    """A session of a client that may hang up, as long as the line is watched."""

    line: HangUp
    running: Reading | None

    def cancel_reading(self) -> None:
        """Cancel the statement that is running, if it only reads, as far as can be known."""
        if self.running is not None and not self._has_written():
            self.running.cancel()

    def _execute_internal(self, statement: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.running is not None or is_ours(current_task()):
            # Within another statement, or of ours: settling is not for anybody to stop.
            return super()._execute_internal(statement, *arguments, **keywords)
        if self.line.happened and not self._has_written():
            raise _gone(self.guard.holder)
        self.running = Reading(self.guard.holder)
        try:
            with self.running:
                return super()._execute_internal(statement, *arguments, **keywords)
        finally:
            self.running = None

    def _has_written(self) -> bool:
        return bool(self.guard.wrote) or self.has_pending()


class Reading:
    """One statement that a hang-up may cancel. Its accounting is that of ``asyncio.timeout``."""

    __slots__ = ("_cancelled", "_holder", "_requests", "_task")

    def __init__(self, holder: str) -> None:
        self._holder = holder
        self._task = current_task()
        self._requests = 0 if self._task is None else self._task.cancelling()
        self._cancelled = False

    def cancel(self) -> None:
        """Cancel it, once."""
        if self._task is not None and not self._cancelled:
            self._cancelled = True
            self._task.cancel()

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if not self._cancelled or self._task is None:
            return
        # Our own request is taken back. What is left was somebody else's, and wins.
        if self._task.uncancel() <= self._requests and isinstance(error, asyncio.CancelledError):
            raise _gone(self._holder) from error


def _readers_class(base: type[GuardedSession]) -> type[ReadersSession]:
    # Kept on the class itself, so that it lives no longer than its Database.
    made: type[ReadersSession] | None = vars(base).get(_MADE)
    if made is None:
        made = type(f"Readers{base.__name__}", (ReadersSession, base), {})
        setattr(base, _MADE, made)
    return made


def _gone(holder: str) -> ClientGone:
    return ClientGone(
        f"the client of {holder} has hung up, so its reading was stopped",
        remedies=[
            "Nothing needs to be done; let it pass.",
            "If the work matters without its client, take cancel_on_disconnect off the route.",
        ],
    )
