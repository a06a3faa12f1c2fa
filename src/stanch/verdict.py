"""Learns from the server what became of a COMMIT whose answer was lost, and says *unknown* where it cannot be known.

A transaction has a number (``xid8``; PostgreSQL manual, *Transaction ID and Snapshot Information Functions*), and
``pg_xact_status`` tells its end. A number that had not reached the disk in a crash, or the standby in a failover, is
handed out again: then *committed* is said of somebody else's transaction. So the answer counts only from a server that
has not been through either since the connection was opened; see `Incarnation`.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, cast

from sqlalchemy import event
from sqlalchemy.util import await_only, greenlet_spawn

from stanch.deadlines import Deadline, only_under
from stanch.errors import CommitLost, DatabaseUnavailable
from stanch.events import CommitSettled, CommitsUnverified
from stanch.retry import backoff
from stanch.sqlstate import IN_FAILED_TRANSACTION, INVALID_PARAMETER_VALUE, sqlstate_of
from stanch.unverified import CLEAN_KEY, commit_unknown

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Dialect
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import ConnectionPoolEntry, Pool

    from stanch.drivers import Driver
    from stanch.events import Observers
    from stanch.settings import Settings
    from stanch.watch import Watch

WITNESS_KEY: Final = "stanch.witness"
"""In a pooled connection's ``info``: its `Witness`."""

_STARTED: Final = "(extract(epoch FROM backend_start) * 1000000)::bigint"
_WITNESS: Final = f"""
SELECT (SELECT system_identifier::text FROM pg_control_system()),
       CASE WHEN pg_is_in_recovery() THEN NULL ELSE substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) END,
       (SELECT (extract(epoch FROM stats_reset) * 1000000)::bigint FROM pg_stat_bgwriter),
       pg_backend_pid(),
       (SELECT {_STARTED} FROM pg_stat_activity WHERE pid = pg_backend_pid()),
       current_setting('synchronous_standby_names') <> ''
"""  # noqa: S608  # a constant
_NUMBER: Final = """
SELECT pg_current_xact_id_if_assigned()::text, pg_backend_pid(), current_setting('transaction_isolation')
"""
_END_BACKEND: Final = """
SELECT wait_event, CASE WHEN wait_event IS DISTINCT FROM 'SyncRep' THEN pg_terminate_backend(pid) END
FROM pg_stat_activity WHERE """


# What is known ----------------------------------------------------------------------------------------------


class Verdict(Enum):
    """What became of a transaction whose COMMIT was not answered."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict, and *why*: a clause that ends the sentence of an error."""

    verdict: Verdict
    why: str


@dataclass(frozen=True, slots=True)
class Incarnation:
    """One life of a server, in which no transaction number is used twice.

    *system* is the cluster (``pg_control_system``), *timeline* changes when a standby is promoted and is None on one
    that was not, and *stats_reset* (of ``pg_stat_bgwriter``, microseconds) changes when the server recovers from a
    crash. The start time of the postmaster would not do: it survives the crash of a backend.
    """

    system: str
    timeline: str | None
    stats_reset: int | None

    def is_that_of(self, other: Incarnation) -> bool:
        """Whether both are known to be the same life.

        >>> Incarnation("7", "00000001", 5).is_that_of(Incarnation("7", "00000001", 5))
        True
        >>> Incarnation("7", None, 5).is_that_of(Incarnation("7", None, 5))
        False
        """
        return self == other and self.timeline is not None and self.stats_reset is not None


@dataclass(frozen=True, slots=True)
class Witness:
    """What a connection saw when it was opened: the server's life, and its own backend (*started*: microseconds)."""

    incarnation: Incarnation
    pid: int
    started: int | None
    awaits_standbys: bool


@dataclass(frozen=True, slots=True)
class Ticket:
    """What to ask for, should COMMIT not be answered."""

    xid: int
    witness: Witness


class Status(Enum):
    """What ``pg_xact_status`` says of a number."""

    IN_PROGRESS = "in progress"
    COMMITTED = "committed"
    ABORTED = "aborted"
    IN_THE_FUTURE = "in the future"  # its error 22023: not handed out yet
    FORGOTTEN = "forgotten"  # its NULL: so old that the record is gone


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server says, the life it speaks from, and whether we had to end the backend to hear it."""

    status: Status
    witness: Witness
    forced: bool = False


NOTHING_WRITTEN: Final = Finding(Verdict.COMMITTED, "it had written nothing")
_DOOMED: Final = Finding(Verdict.ABORTED, "an earlier error had aborted the transaction")
_UNCONFIRMED_READS: Final = Finding(
    Verdict.ABORTED, "a serializable transaction may rely on what it read only after its COMMIT"
)
_UNWITNESSED: Final = Finding(Verdict.UNKNOWN, "this server does not let us see whether it has crashed since")
_POOLED: Final = Finding(
    Verdict.UNKNOWN, "another server process commits than the one at connect: there is a pooler between"
)
_UNREPLICATED: Final = Finding(
    Verdict.UNKNOWN, "the server has it, but waits for a synchronous standby to confirm it"
)


def judge(ticket: Ticket, answer: Answer) -> Finding:
    """What *answer* proves about the transaction of *ticket*. Pure.

    *Not committed* is sound also after a crash or failover, whoever owned the number: a commit record that survived
    would have kept the number from being handed out again, or from lying in the future. *Committed* is sound only
    from the same life of the server. Nothing is, from another cluster.
    """
    then, now = ticket.witness.incarnation, answer.witness.incarnation
    if then.system != now.system:
        return Finding(Verdict.UNKNOWN, "the server that answers is another one")
    match answer.status:
        case Status.ABORTED | Status.IN_THE_FUTURE:
            return Finding(Verdict.ABORTED, "the server says that the transaction was rolled back")
        case Status.COMMITTED if not then.is_that_of(now):
            return Finding(
                Verdict.UNKNOWN,
                "the server crashed, was failed over or had its statistics reset since, so its answer proves nothing",
            )
        case Status.COMMITTED if answer.forced and answer.witness.awaits_standbys:
            return Finding(
                Verdict.UNKNOWN, "the server has it, but a synchronous standby may not: it was not confirmed"
            )
        case Status.COMMITTED:
            return Finding(Verdict.COMMITTED, "the server says that it was committed")
        case Status.IN_PROGRESS:
            return Finding(Verdict.UNKNOWN, "the server is still at it, and could not be made to stop")
        case Status.FORGOTTEN:
            return Finding(Verdict.UNKNOWN, "the server no longer has a record of it")


# Who asks ---------------------------------------------------------------------------------------------------


class Asking:
    """Asks a PostgreSQL server, on a connection of its own beside the pool, which may be full.

    An answer or *unknown* is there within twice ``connect_timeout``, whatever deadline the unit has. If the server is
    starting, or a standby is about to be promoted, it is asked again (jittered backoff). All of it runs in sync style
    under SQLAlchemy's greenlet, out of reach of cancellation.
    """

    def __init__(
        self,
        dialect: Dialect,
        settings: Settings,
        *,
        driver: Driver,
        watch: Watch,
        observers: Observers,
        database: str,
        open_beside: Callable[[], DBAPIConnection],
    ) -> None:
        self._dialect = dialect
        self._driver = driver
        self._watch = watch
        self._observers = observers
        self._database = database
        self._open_beside = open_beside
        self._round_trip_timeout = settings.connect_timeout
        self._close_timeout = settings.close_timeout
        self._timeout = 2 * settings.connect_timeout
        self._complained = False

    # Before ---------------------------------------------------------------------------------------------

    def attach(self, pool: Pool) -> None:
        """Read the `Witness` of every new connection, before anybody else has used it."""
        event.listen(pool, "connect", self._meet, insert=True)

    def _meet(self, connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        # Outside of any transaction: what the server refuses here must not abort somebody's work.
        adapted = cast("Any", connection)
        autocommit = adapted.autocommit
        try:
            adapted.autocommit = True
            entry.info[WITNESS_KEY] = _witness(_row(connection, _WITNESS))
            adapted.autocommit = autocommit
        except Exception as error:
            if self._driver.looks_dead(self._dialect.get_driver_connection(connection)):
                # At this moment SQLAlchemy cannot tell a lost connection of psycopg's from any other error.
                raise DatabaseUnavailable(
                    f"a new connection was lost before it was ready for use ({_trouble(error)})",
                    remedies=["See whether the server was restarted just now: its log says so."],
                ) from error
            adapted.autocommit = autocommit
            self._complain(f"the server refused what must be known of it ({_trouble(error)})")

    def stake(self, connection: DBAPIConnection) -> Ticket | Finding:
        """The transaction's number; nothing is asked where none can have been given."""
        info: dict[str, Any] = cast("Any", connection).info
        inner = self._dialect.get_driver_connection(connection)
        if info.pop(CLEAN_KEY, False) or self._driver.is_idle(inner):
            return NOTHING_WRITTEN
        witness: Witness | None = info.get(WITNESS_KEY)
        if witness is None:
            return _UNWITNESSED
        try:
            number, pid, isolation = self._watch.run(
                _row,
                connection,
                _NUMBER,
                connection=inner,
                timeout=self._round_trip_timeout,
                what="the question for the transaction's number, before COMMIT,",
            )
        except Exception as error:
            if sqlstate_of(error) == IN_FAILED_TRANSACTION:
                return _DOOMED  # COMMIT will say so
            raise
        if number is None:
            return _UNCONFIRMED_READS if isolation == "serializable" else NOTHING_WRITTEN
        if pid != witness.pid:
            self._complain(_POOLED.why)
            return _POOLED
        return Ticket(int(number), witness)

    def rolled_back(self, connection: DBAPIConnection) -> None:
        """Take the mark of a clean transaction out again: the next one may write."""
        # While the dialect gets to know the server, SQLAlchemy hands in a stand-in without an info.
        with suppress(NotImplementedError):
            cast("Any", connection).info.pop(CLEAN_KEY, None)

    def _complain(self, reason: str) -> None:
        if not self._complained:
            self._complained = True
            self._observers.tell(CommitsUnverified(database=self._database, reason=reason))

    # After ----------------------------------------------------------------------------------------------

    def settle(self, stake: Ticket | Finding, error: Exception) -> None:
        """Ask, tell ``CommitSettled``, and say it by returning or raising."""
        begun = time.monotonic()
        finding = self._ask(stake) if isinstance(stake, Ticket) else stake
        self._observers.tell(
            CommitSettled(
                database=self._database,
                verdict=finding.verdict.value,
                reason=finding.why,
                waited=time.monotonic() - begun,
            )
        )
        match finding.verdict:
            case Verdict.COMMITTED:
                return
            case Verdict.ABORTED:
                raise _lost(finding.why) from error
            case Verdict.UNKNOWN:
                raise commit_unknown(finding.why) from error

    def _ask(self, ticket: Ticket) -> Finding:
        # The unit's own deadline may be what ended the COMMIT; it must not end the question too.
        with only_under(Deadline.after(self._timeout, "verify_commits")):
            return self._ask_until_answered(ticket)

    def _ask_until_answered(self, ticket: Ticket) -> Finding:
        due = time.monotonic() + self._timeout
        attempt = 0
        while True:
            try:
                return self._ask_once(ticket, due)
            except Exception as error:  # noqa: BLE001  # whatever it is, it is no answer; it is named in the verdict
                trouble = _trouble(error)
            attempt += 1
            pause = backoff(attempt)
            if time.monotonic() + pause > due:
                told = f"no primary could be asked within {self._timeout:.2f} s ({trouble})"
                return Finding(Verdict.UNKNOWN, told)
            await_only(asyncio.sleep(pause))

    def _ask_once(self, ticket: Ticket, due: float) -> Finding:
        connection: DBAPIConnection = await_only(self._open(due))
        inner = self._dialect.get_driver_connection(connection)
        try:
            return self._watch.run(
                self._hear,
                connection,
                ticket,
                due,
                connection=inner,
                timeout=max(0.0, due - time.monotonic()),
                what="the question for a transaction's end",
            )
        finally:
            self._close(connection, inner)

    async def _open(self, due: float) -> DBAPIConnection:
        async with asyncio.timeout(due - time.monotonic()):
            connection: DBAPIConnection = await greenlet_spawn(self._open_beside)
        return connection

    def _close(self, connection: DBAPIConnection, inner: Any) -> None:
        try:
            self._watch.run(
                connection.close, connection=inner, timeout=self._close_timeout, what="closing a connection"
            )
        except Exception:  # noqa: BLE001  # it is of no more use, and what it said counts
            self._driver.sever(inner)

    def _hear(self, connection: DBAPIConnection, ticket: Ticket, due: float) -> Finding:
        # Each statement by itself: one of them may fail, and pg_stat_activity stands still in a transaction.
        cast("Any", connection).autocommit = True
        # Before the status: on a standby, a number may lie in the future whose commit has not been replayed yet.
        if _row(connection, "SELECT pg_is_in_recovery()")[0]:
            raise DatabaseUnavailable("a standby answered")
        forced = False
        attempt = 0
        while (status := _status(connection, ticket.xid)) is Status.IN_PROGRESS:
            if self._waits_for_standby(connection, ticket.witness):
                return _UNREPLICATED
            forced = True
            attempt += 1
            pause = backoff(attempt, base=0.01, cap=0.1)
            if time.monotonic() + pause > due:
                break
            await_only(asyncio.sleep(pause))
        # After it, and on the same connection, which no crash survives.
        return judge(ticket, Answer(status, _witness(_row(connection, _WITNESS)), forced))

    @staticmethod
    def _waits_for_standby(connection: DBAPIConnection, witness: Witness) -> bool:
        """Whether the lost connection's backend waits for a synchronous standby; if not, end it.

        What it had not committed then never will be. One that waits has committed, and would only stop waiting.
        """
        if witness.started is None:
            return False
        # The start time: the pid may be another backend's by now.
        this_one = f"pid = {witness.pid:d} AND {_STARTED} = {witness.started:d}"
        row = _row(connection, _END_BACKEND + this_one)
        return row is not None and row[0] == "SyncRep"


def _row(connection: DBAPIConnection, sql: str) -> Any:
    cursor = connection.cursor()
    try:
        cursor.execute(sql)
        return cursor.fetchone()
    finally:
        cursor.close()


def _witness(row: Any) -> Witness:
    system, timeline, stats_reset, pid, started, awaits_standbys = row
    return Witness(Incarnation(system, timeline, stats_reset), pid, started, awaits_standbys)


def _status(connection: DBAPIConnection, xid: int) -> Status:
    try:
        (said,) = _row(connection, f"SELECT pg_xact_status('{xid:d}'::xid8)")
    except Exception as error:
        if sqlstate_of(error) == INVALID_PARAMETER_VALUE:
            return Status.IN_THE_FUTURE
        raise
    return Status.FORGOTTEN if said is None else Status(said)


def _trouble(error: Exception) -> str:
    """What stood in the way, for an error's text: no host and no message of the server's."""
    state = sqlstate_of(error)
    return type(error).__name__ if state is None else f"SQLSTATE {state}"


def _lost(why: str) -> CommitLost:
    return CommitLost(
        f"the connection was lost during COMMIT, and {why}: nothing is stored",
        remedies=[
            "The work can be done again, all of it.",
            "Look for the cause in the server's log and in the network between.",
        ],
    )
