"""Begins and ends the work of one session: with which options, committed or rolled back, and always closed."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

from sqlalchemy import text

from stanch.completion import run_to_completion
from stanch.deadlines import earlier, give_reason, to_tidy_up, under
from stanch.errors import ConfigError, TransactionAborted
from stanch.events import TeardownFailed, WorkDropped
from stanch.sessions import guard_of, guarded_session
from stanch.stopping import stop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Mapping

    from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction

    from stanch.deadlines import Deadline
    from stanch.drivers import Driver

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

    __slots__ = ("_alarm", "_commit_timeout", "_observers", "_stop", "_timeout", "session")

    def __init__(self, session: AsyncSession) -> None:
        terms = guarded_session(session).terms
        self.session = session
        # Where COMMIT does not pass our seam, or has two phases, nobody can tell whether it is on its way.
        knows = terms.judges_statements and not guarded_session(session).twophase
        self._stop = partial(stop, terms.driver) if knows else terms.driver.sever
        self._observers = terms.observers
        self._timeout = terms.settings.close_timeout
        self._commit_timeout = terms.settings.commit_timeout
        self._alarm: asyncio.TimerHandle | None = None

    def keep_to(self, deadline: Deadline | None) -> None:
        """From now on the session must be done by *deadline*, if it has no earlier one already.

        At that moment the connection in hand is severed: whoever waits for it is told ``DeadlinePassed`` (at COMMIT
        ``CommitUnknown``), and so is every later use of the session. What is neither in a transaction nor waiting
        has nothing in hand and is not disturbed. Rolling back and closing stay possible.
        """
        guard = guard_of(self.session)
        kept = earlier(guard.deadline, deadline)
        if kept is None or kept is guard.deadline:
            return
        self.lift_deadline()
        guard.deadline = kept
        # A hair later: when the alarm comes, whoever asks finds that the deadline has passed.
        self._alarm = asyncio.get_running_loop().call_later(kept.remaining() + 0.001, self._cut_short, kept)

    def lift_deadline(self) -> None:
        """Let the session go on without a deadline."""
        guard_of(self.session).deadline = None
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    async def commit(self) -> None:
        """Flush, then COMMIT; raises what made it fail."""
        await self.everyone_out()
        if guarded_session(self.session).has_pending():
            # What an earlier error has aborted is refused by the commit below, which has the word for it.
            with self._severed_after(self._commit_timeout), suppress(TransactionAborted):
                await self.session.flush()
            # A stream's next statement may have come in while the flush was under way.
            await self.everyone_out()
        # COMMIT bounds itself and tells why; a before_commit listener of the user's does not.
        with self._severed_after(self._commit_timeout + self._timeout):
            await self.session.commit()
        if writes := guarded_session(self.session).unsaved():
            # A callback was given this very session, of whose end it was told. What comes next is a rollback.
            guard = guard_of(self.session)
            self._observers.tell(WorkDropped(database=guard.database, holder=guard.holder, writes=writes))

    async def prepare(self) -> None:
        """Flush, and provoke what else can fail before COMMIT: PostgreSQL's deferred constraints."""
        await self.everyone_out()
        with self._severed_after(self._commit_timeout):
            await self.session.flush()
            if self.session.get_bind().dialect.name == "postgresql":
                await self.session.execute(text("SET CONSTRAINTS ALL IMMEDIATE"))

    async def roll_back(self) -> None:
        """ROLLBACK; what was only read keeps its state. A failure is told, not raised: nothing is stored anyway."""
        await self._quietly(self._roll_back)

    async def end(self, *, commit: bool) -> None:
        """Commit or roll back; raises only what made the commit fail."""
        try:
            if commit:
                await self.commit()
        finally:
            await self.roll_back()  # nothing is left to do after a COMMIT that succeeded

    async def close(self) -> None:
        """Close the session for good. A failure is told, not raised: the outcome was decided before."""
        try:
            await self._quietly(self.session.close)
        finally:
            if self._alarm is not None:
                self._alarm.cancel()

    async def release(self, savepoint: AsyncSessionTransaction) -> None:
        """Flush, and release *savepoint*: its work is now that of the transaction around it."""
        with self._severed_after(self._commit_timeout):
            await savepoint.commit()

    async def roll_back_to(self, savepoint: AsyncSessionTransaction) -> None:
        """Undo what was done since *savepoint*. A failure is told, not raised: nothing of it is stored anyway."""
        await self._quietly(savepoint.rollback)

    async def everyone_out(self) -> None:
        """Wait until no task is inside the session; after the timeout its connection is severed first."""
        guard = guard_of(self.session)
        if guard.inside is None:
            return
        with under(guard.deadline):
            timeout = to_tidy_up(self._timeout)
        alarm = asyncio.get_running_loop().call_later(timeout, self._turn_out)
        try:
            await guard.left()
        finally:
            alarm.cancel()

    def _turn_out(self) -> None:
        # Whoever is sent out by the severing must not come straight in again, or left() would never end.
        guard_of(self.session).barred = True
        self._sever()

    async def _roll_back(self) -> None:
        sync_session = guarded_session(self.session)
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
            with under(guard_of(self.session).deadline), self._severed_after(to_tidy_up(self._timeout)):
                await ending()
        except Exception as error:  # noqa: BLE001  # told in full; raising would hide the error under way
            guard = guard_of(self.session)
            self._observers.tell(TeardownFailed(database=guard.database, holder=guard.holder, error=error))

    @contextmanager
    def _severed_after(self, timeout: float) -> Generator[None]:
        alarm = asyncio.get_running_loop().call_later(timeout, self._sever)
        try:
            yield
        finally:
            alarm.cancel()

    def _cut_short(self, deadline: Deadline) -> None:
        guard = guard_of(self.session)
        for connection in guarded_session(self.session).driver_connections():
            ran = self._stop(connection) or guard.inside is not None
            when = "a statement was running" if ran else "its transaction was open"
            what = f"{guard.holder}: {deadline} passed while {when}; its connection was severed"
            give_reason(connection, deadline, what)

    def _sever(self) -> None:
        for connection in guarded_session(self.session).driver_connections():
            self._stop(connection)


async def finish(ending: Ending, *, commit: bool) -> None:
    """Commit or roll back, then close, out of reach of cancellation; raises only what made the commit fail."""

    async def go() -> None:
        try:
            await ending.end(commit=commit)
        finally:
            await ending.close()

    await run_to_completion(go())
