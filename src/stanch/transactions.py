"""Begins and ends the work of one session: with which options, committed or rolled back, and always closed."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Literal

from sqlalchemy import text

from stanch.completion import run_to_completion
from stanch.deadlines import earlier, give_reason, to_tidy_up, under
from stanch.errors import ConfigError, TransactionAborted
from stanch.events import TeardownFailed, WorkDropped
from stanch.sessions import guarded_session
from stanch.stopping import stop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction

    from stanch.deadlines import Deadline
    from stanch.drivers import Driver
    from stanch.events import Event
    from stanch.settings import Settings

IsolationLevel = Literal["READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]

ISOLATION_LEVELS: Final[tuple[IsolationLevel, ...]] = (
    "READ UNCOMMITTED",
    "READ COMMITTED",
    "REPEATABLE READ",
    "SERIALIZABLE",
)
"""Weakest first (PostgreSQL manual, *Transaction Isolation*)."""


def connection_options(
    driver: Driver, *, isolation_level: IsolationLevel | None, read_only: bool
) -> Mapping[str, Any]:
    """What a transaction's connection must be told before it begins; nothing for the defaults.

    Both drivers put these into BEGIN itself: they cost no round trip, and end with the transaction.
    """
    options: dict[str, Any] = {}
    if isolation_level is not None:
        judge_isolation_level(isolation_level)
        # PostgreSQL knows no weaker level than READ COMMITTED, and SQLAlchemy's asyncpg dialect no name for one.
        weakest = driver.name == "asyncpg" and isolation_level == "READ UNCOMMITTED"
        options["isolation_level"] = "READ COMMITTED" if weakest else isolation_level
    if read_only:
        options |= driver.read_only_options
    return options


def judge_isolation_level(isolation_level: IsolationLevel | None) -> None:
    """``ConfigError`` for what is no isolation level; None is the engine's own."""
    if isolation_level is not None and isolation_level not in ISOLATION_LEVELS:
        raise ConfigError(
            f"isolation_level: got {isolation_level!r}",
            remedies=[f"Use one of {', '.join(ISOLATION_LEVELS)}."],
        )


class Ending:
    """Ends the transaction of one session, in bounded time, although somebody may still be inside.

    Settling under a running statement would poison the pooled connection. So an ending first waits for whoever is
    inside; when the time is over the connection is severed, which sends them out with a disconnect error.
    """

    __slots__ = ("_alarm", "_guard", "_sync", "session")

    def __init__(self, session: AsyncSession) -> None:
        self.session = session
        self._sync = guarded_session(session)
        self._guard = self._sync.guard
        self._alarm: asyncio.TimerHandle | None = None

    def keep_to(self, deadline: Deadline | None) -> None:
        """From now on the session must be done by *deadline*, if it has no earlier one already.

        At that moment the connection in hand is severed: whoever waits for it is told ``DeadlinePassed`` (at COMMIT
        ``CommitUnknown``), and so is every later use of the session. What is neither in a transaction nor waiting
        has nothing in hand and is not disturbed. Rolling back and closing stay possible.
        """
        kept = earlier(self._guard.deadline, deadline)
        if kept is None or kept is self._guard.deadline:
            return
        self.lift_deadline()
        self._guard.deadline = kept
        # A hair later: when the alarm comes, whoever asks finds that the deadline has passed.
        self._alarm = asyncio.get_running_loop().call_later(kept.remaining() + 0.001, self._cut_short, kept)

    def lift_deadline(self) -> None:
        """Let the session go on without a deadline."""
        self._guard.deadline = None
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    async def commit(self) -> None:
        """Flush, then COMMIT; raises what made it fail."""
        await self.everyone_out()
        if self._sync.has_pending():
            # What an earlier error has aborted is refused by the commit below, which has the word for it.
            with _Severed(self, self._settings.commit_timeout), suppress(TransactionAborted):
                await self.session.flush()
            # A stream's next statement may have come in while the flush was under way.
            await self.everyone_out()
        # COMMIT bounds itself and tells why; what listeners of the user's do before it and after it does not.
        with _Severed(self, self._settings.commit_timeout + self._settings.close_timeout):
            await self.session.commit()
        if self._sync.in_transaction() and (writes := self._sync.unsaved()):
            # A callback was given this very session, of whose end it was told. What comes next is a rollback.
            self._tell(WorkDropped(database=self._guard.database, holder=self._guard.holder, writes=writes))

    async def prepare(self) -> None:
        """Flush, and provoke what else can fail before COMMIT: PostgreSQL's deferred constraints."""
        await self.everyone_out()
        with _Severed(self, self._settings.commit_timeout):
            await self.session.flush()
            if self.session.get_bind().dialect.name == "postgresql":
                await self.session.execute(text("SET CONSTRAINTS ALL IMMEDIATE"))

    async def roll_back(self) -> None:
        """ROLLBACK; what was only read keeps its state. A failure is told, not raised: nothing is stored anyway."""
        if self._sync.in_transaction() or self._guard.inside is not None:
            await self._quietly(self._roll_back)

    async def end(self, *, commit: bool) -> None:
        """Commit or roll back; raises only what made the commit fail."""
        try:
            if commit:
                await self.commit()
        finally:
            await self.roll_back()  # nothing is left to do after a COMMIT that succeeded

    @property
    def closes_at_once(self) -> bool:
        """Whether nothing has to be awaited to close the session: it holds nothing, and nothing waits for its end."""
        guard, sync_session = self._guard, self._sync
        return not (sync_session.in_transaction() or guard.inside is not None or guard.hooks) and (
            sync_session.closes_plainly
        )

    async def close(self) -> None:
        """Close the session for good. A failure is told, not raised: the outcome was decided before."""
        try:
            if self.closes_at_once:
                self.close_at_once()
            else:
                await self._quietly(self.session.close)
        finally:
            if self._alarm is not None:
                self._alarm.cancel()

    def close_at_once(self) -> None:
        """The same where it ``closes_at_once``: nothing can cut it short, so it needs no task out of reach."""
        try:
            self._sync.close()
        except Exception as error:  # noqa: BLE001  # as when it is awaited
            self._tell_failed(error)
        finally:
            if self._alarm is not None:
                self._alarm.cancel()

    async def release(self, savepoint: AsyncSessionTransaction) -> None:
        """Flush, and release *savepoint*: its work is now that of the transaction around it."""
        with _Severed(self, self._settings.commit_timeout):
            await savepoint.commit()

    async def roll_back_to(self, savepoint: AsyncSessionTransaction) -> None:
        """Undo what was done since *savepoint*. A failure is told, not raised: nothing of it is stored anyway."""
        await self._quietly(savepoint.rollback)

    async def everyone_out(self) -> None:
        """Wait until no task is inside the session; after the timeout its connection is severed first."""
        guard = self._guard
        if guard.inside is None:
            return
        with under(guard.deadline):
            timeout = to_tidy_up(self._settings.close_timeout)
        alarm = asyncio.get_running_loop().call_later(timeout, self._turn_out)
        try:
            await guard.left()
        finally:
            alarm.cancel()

    def _turn_out(self) -> None:
        # Whoever is sent out by the severing must not come straight in again, or left() would never end.
        self._guard.barred = True
        self.sever()

    async def _roll_back(self) -> None:
        sync_session = self._sync
        transaction = sync_session.get_transaction()
        if transaction is None:
            return
        if sync_session.unsaved() or sync_session.in_nested_transaction() or not transaction.is_active:
            await self.session.rollback()
        else:
            # rollback() would expire what was read; ending the transaction alone does not.
            await self.session.run_sync(lambda _session: transaction.close())

    async def _quietly(self, ending: Callable[[], Awaitable[None]]) -> None:
        try:
            await self.everyone_out()
            with under(self._guard.deadline), _Severed(self, to_tidy_up(self._settings.close_timeout)):
                await ending()
        except Exception as error:  # noqa: BLE001  # told in full; raising would hide the error under way
            self._tell_failed(error)

    def _tell_failed(self, error: Exception) -> None:
        self._tell(TeardownFailed(database=self._guard.database, holder=self._guard.holder, error=error))

    def _tell(self, event: Event) -> None:
        self._sync.terms.observers.tell(event)

    @property
    def _settings(self) -> Settings:
        return self._sync.terms.settings

    def _cut_short(self, deadline: Deadline) -> None:
        guard = self._guard
        for connection in self._sync.driver_connections():
            ran = self._stop(connection) or guard.inside is not None
            when = "a statement was running" if ran else "its transaction was open"
            what = f"{guard.holder}: {deadline} passed while {when}; its connection was severed"
            give_reason(connection, deadline, what)

    def sever(self) -> None:
        """Cut off what the session holds, and have the server stop what it does for it."""
        for connection in self._sync.driver_connections():
            self._stop(connection)

    def _stop(self, connection: Any) -> bool:
        """Whether a statement was running on *connection*, as far as can be known; it is severed."""
        terms = self._sync.terms
        # Where COMMIT does not pass our seam, or has two phases, nobody can tell whether it is on its way.
        if terms.judges_statements and not self._sync.twophase:
            return stop(terms.driver, connection)
        terms.driver.sever(connection)
        return False


class _Severed:
    """What the session of *ending* holds is severed if the block lasts longer than *timeout* seconds."""

    __slots__ = ("_alarm", "_ending", "_timeout")

    def __init__(self, ending: Ending, timeout: float) -> None:
        self._ending = ending
        self._timeout = timeout

    def __enter__(self) -> None:
        self._alarm = asyncio.get_running_loop().call_later(self._timeout, self._ending.sever)

    def __exit__(self, *_exception: object) -> None:
        self._alarm.cancel()


async def finish(ending: Ending, *, commit: bool) -> None:
    """Commit or roll back, then close, out of reach of cancellation; raises only what made the commit fail."""
    if not commit and ending.closes_at_once:
        ending.close_at_once()
        return

    async def go() -> None:
        try:
            await ending.end(commit=commit)
        finally:
            await ending.close()

    await run_to_completion(go())


async def close_for_good(ending: Ending) -> None:
    """Close without having ended anything, out of reach of cancellation; what that drops is told."""
    if ending.closes_at_once:
        ending.close_at_once()
    else:
        await run_to_completion(ending.close())
