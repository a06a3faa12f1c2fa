"""One unit of work: the sessions of one request (or websocket, or job), settled together and always closed."""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from stanch.completion import run_to_completion
from stanch.deadlines import earlier
from stanch.errors import ConfigError, NotInstalled, PartialCommit, UnitConflict, UnsavedWrites
from stanch.events import WorkDropped
from stanch.guards import Owner
from stanch.sessions import guarded_session, refuse_changes
from stanch.transactions import ISOLATION_LEVELS, Ending, IsolationLevel, connection_options

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    from sqlalchemy.ext.asyncio import AsyncSession

    from stanch.database import Database
    from stanch.deadlines import Deadline

    class Line(Protocol):
        """The watched line to a client, which must end before anything is committed."""

        def end(self) -> None:
            """Watch no longer."""
            ...


Unsaved = Literal["warn", "raise", "ignore"]
"""What becomes of writes that a successful unit in manual mode left uncommitted, besides being rolled back."""


class Mode(IntEnum):
    """How the end of a unit treats a session; of several wishes the strongest holds."""

    READ = 0  # refuses to end with writes
    MANUAL = 1  # the handler commits; what it left is rolled back
    AUTO = 2  # commits when the unit succeeds


class Kind(Enum):
    """What a unit belongs to. In a websocket nothing is committed but by hand."""

    REQUEST = "request"
    WEBSOCKET = "websocket"


# Python 3.11 finds a member of an enum by a function of its own, at each use.
_READ: Final = Mode.READ
_AUTO: Final = Mode.AUTO
_WEBSOCKET: Final = Kind.WEBSOCKET


class Wish(NamedTuple):
    """What one place of the app asks of the unit's session. *source* names the place in a conflict.

    >>> reader = Wish(source="ReaderDep", mode=Mode.READ)
    >>> reader.join(Wish(source="SessionDep", mode=Mode.AUTO)).mode
    <Mode.AUTO: 2>
    """

    source: str
    mode: Mode
    isolation_level: IsolationLevel | None = None
    read_only: bool = False
    deadline: Deadline | None = None

    @property
    def reads_alone(self) -> bool:
        """Whether each statement may stand alone: nothing was asked for that only a transaction can give."""
        return self.mode is _READ and self.isolation_level is None and not self.read_only

    @property
    def is_common(self) -> bool:
        """Whether its transaction is one as the engine's own."""
        return self.mode is not _READ and self.isolation_level is None and not self.read_only

    def join(self, other: Wish) -> Wish:
        """Both wishes as one: the stronger mode and isolation, the earlier deadline; ``read_only`` bans writers.

        Raises ``UnitConflict``, naming both places, when one is a writer and the other bans it.
        """
        ban, rival = (self, other) if self.read_only else (other, self)
        if ban.read_only and rival.mode is not Mode.READ:
            raise UnitConflict(
                f"{rival.source} asks for a session that may write, but {ban.source} is read_only",
                remedies=[
                    "Ask for ReaderDep where nothing is written.",
                    f"Or take read_only=True off {ban.source}.",
                ],
            )
        return Wish(
            source=(self if self.mode >= other.mode else other).source,
            mode=max(self.mode, other.mode),
            isolation_level=max(self.isolation_level, other.isolation_level, key=_strength),
            read_only=ban.read_only,
            deadline=earlier(self.deadline, other.deadline),
        )


def _strength(level: IsolationLevel | None) -> int:
    return -1 if level is None else ISOLATION_LEVELS.index(level)


class Charge:
    """One database's session in a unit, and what was asked of it."""

    __slots__ = ("_guard", "_sync", "database", "ending", "session", "wish")

    def __init__(self, database: Database[Any], wish: Wish, holder: str) -> None:
        self.database = database
        self.wish = wish
        self.session: AsyncSession = database.new_session(holder)
        self._sync = guarded_session(self.session)
        self._guard = self._sync.guard
        self.ending = Ending(self.session)
        if wish.deadline is not None:
            self.ending.keep_to(wish.deadline)
        if not wish.is_common:
            self._apply_options()
        if wish.mode is _AUTO:
            self._guard.owners.append(self._promise())

    async def join(self, wish: Wish) -> None:
        """Ask one thing more of the session; ``UnitConflict`` if its transaction has begun too weak for that."""
        if self.wish.mode is _READ is not wish.mode:
            # Whoever is inside reads on what a writer must not have, or waits for it: a reader to the end.
            await self.ending.everyone_out()
        joined = self.wish.join(wish)
        stronger = (joined.isolation_level, joined.read_only) != (
            self.wish.isolation_level,
            self.wish.read_only,
        )
        begun = self._sync.in_transaction_on_server()
        if stronger and begun:
            raise UnitConflict(
                f"{wish.source} asks for another transaction than {self.wish.source} has already begun",
                remedies=["Put @unit(...) on the endpoint: it is known before any dependency runs a query."],
            )
        starts_writing = self.wish.mode is _READ is not joined.mode
        self.wish = joined
        self.ending.keep_to(joined.deadline)
        if starts_writing and begun:
            await self.ending.roll_back()  # clean, and begun READ ONLY; what was read stays usable
        if stronger or starts_writing:
            self._apply_options()
        if joined.mode is _AUTO and (promise := self._promise()) not in self._guard.owners:
            # Outermost, though a block was opened before anybody wished for it.
            self._guard.owners.insert(0, promise)

    @property
    def quiet(self) -> bool:
        """Nothing is begun, nothing pending: there is nothing to settle, and it costs nothing to say so."""
        return self._sync.is_at_rest and not self._guard.dropped

    @property
    def marked(self) -> bool:
        """Whether ``rollback_only`` marks what is settled next."""
        return self._guard.rollback_only

    @property
    def unsaved(self) -> tuple[str, ...]:
        """Names of what was written and not committed."""
        return self._sync.unsaved()

    async def lost_without_commit(self) -> tuple[str, ...]:
        """The same, and what only the server can know, which is asked where there is a doubt."""
        session = self._sync
        return await self.session.run_sync(lambda _session: session.lost_without_commit())

    def take_dropped(self) -> tuple[str, ...]:
        """What the handler has dropped by closing the session itself; told once."""
        dropped, self._guard.dropped = self._guard.dropped, ()
        return dropped

    @property
    def holder(self) -> str:
        """Whose session it is, in words."""
        return self._guard.holder

    def take_rollback_only(self) -> bool:
        """The same, and the mark is spent."""
        marked, self._guard.rollback_only = self._guard.rollback_only, False
        return marked

    def hold_callbacks(self) -> None:
        """Let callbacks wait, also those that are due."""
        self._guard.hooks_wait = True

    async def run_callbacks(self) -> None:
        """Run those that are due, and no longer let any wait."""
        await self._sync.run_due()

    def _apply_options(self) -> None:
        wish, session = self.wish, self._sync
        if wish.reads_alone:
            session.start_reading()
            return
        if self._guard.reading:
            session.stop_reading()
        # Who asked to read and needs a transaction for it gets one in which the server refuses what we cannot see.
        self._guard.connection_options = connection_options(
            self.database.driver,
            isolation_level=wish.isolation_level,
            read_only=wish.read_only or wish.mode is _READ,
        )

    def _promise(self) -> Owner:
        return Owner(f"{self.holder}, which commits at its end")


class Unit:
    """The unit of work of one request: at most one session for each database, opened on first use.

    ``settle`` is called as the reply is about to leave, ``close`` when the app call has ended. A session used
    between the two is a unit of its own, settled by the next ``settle`` or by ``close``.
    """

    __slots__ = (
        "_charges",
        "connection",
        "databases",
        "deadline",
        "holder",
        "kind",
        "line",
        "mode",
        "unsaved",
    )

    def __init__(self, databases: Sequence[Database[Any]], *, kind: Kind) -> None:
        self.databases = databases
        self.kind = kind
        self.mode = _AUTO
        self.unsaved: Unsaved = "warn"
        self.deadline: Deadline | None = None
        """When the reply must be on its way; for every session of the unit."""
        self.holder = kind.value
        self.connection: Any = None
        """The framework's connection object, for whoever must answer in place of a failed reply."""
        self.line: Line | None = None
        """Watched where the route stops reading when its client hangs up."""
        self._charges: dict[int, Charge] = {}

    @property
    def used(self) -> bool:
        """Whether any session was asked for."""
        return bool(self._charges)

    async def session(self, database: Database[Any], wish: Wish) -> AsyncSession:
        """The unit's session of *database*: made on the first wish, joined by the later ones.

        It holds no connection until its first statement. ``PoolOverloaded`` if whoever asked for one now would be
        refused.
        """
        if self.kind is _WEBSOCKET:
            wish = self._of_a_websocket(wish)
        if self.deadline is not None:
            wish = wish._replace(deadline=earlier(self.deadline, wish.deadline))
        charge = self._charges.get(id(database))
        if charge is None:
            # Now, before anything was done that would be in vain.
            database.refuse_overload(reads=wish.reads_alone)
            charge = self._charges[id(database)] = Charge(database, wish, self.holder)
        else:
            await charge.join(wish)
        return charge.session

    def _of_a_websocket(self, wish: Wish) -> Wish:
        if wish.deadline is not None:
            raise ConfigError(
                f"{wish.deadline.source} was given for {self.holder}: a websocket lasts as long as its peer wants",
                remedies=["Give each message a deadline: async with db.transaction(timeout=...) as session."],
            )
        # Another socket's broadcast passes through this socket's send: no message can mean "commit".
        return wish._replace(mode=Mode.MANUAL) if wish.mode is _AUTO else wish

    def database(self, wanted: Database[Any] | str | None) -> Database[Any]:
        """The database *wanted*, by itself or its name, or the first; ``NotInstalled`` if it is not among ours."""
        if wanted is None and self.databases:
            return self.databases[0]
        for database in self.databases:
            if wanted in (database, database.name):
                return database
        name = wanted if isinstance(wanted, str) else getattr(wanted, "name", None)
        known = ", ".join(repr(database.name) for database in self.databases) or "none"
        raise NotInstalled(
            f"no database called {name!r} is installed (installed: {known})",
            remedies=[
                f"Name it where it is made: Database(url, name={name!r}).",
                "Pass it to install(app, db, ...).",
            ],
        )

    def will_commit(self, database: Database[Any]) -> bool:
        """Whether success commits the session of *database*."""
        charge = self._charges.get(id(database))
        return charge is not None and charge.wish.mode is _AUTO

    async def vacate(self, database: Database[Any]) -> None:
        """Wait, as before a commit, until no task is inside the session of *database*."""
        await self._charges[id(database)].ending.everyone_out()

    def committing(self) -> list[str]:
        """The names of the databases in which success would commit writes, as far as can be known now."""
        return [
            charge.database.name
            for charge in self._in_order()
            if charge.wish.mode is _AUTO and charge.unsaved
        ]

    def adopt(self, databases: Sequence[Database[Any]]) -> None:
        """Put the databases of an app mounted inside before the others: its default is its own first."""
        self.databases = [*databases, *(other for other in self.databases if other not in databases)]

    @property
    def quiet(self) -> bool:
        """Whether ``settle()`` would find nothing to do."""
        if self.line is not None:
            return False
        for charge in self._charges.values():  # noqa: SIM110  # a generator costs more than what it would ask
            if charge.marked or not charge.quiet:
                return False
        return True

    async def settle(self, *, commit: bool) -> None:
        """Commit or roll back what every session has done so far, and give all connections back.

        Raises what made a commit fail; then nothing of that database is stored. With several databases all of
        them flush and check their deferred constraints before the first COMMIT, commits follow the order of
        installation, and a failure after the first success is ``PartialCommit``. Cannot be cancelled halfway.
        """
        if self.line is not None:
            line, self.line = self.line, None
            line.end()
        charges = self._in_order()
        marked = [charge for charge in charges if charge.take_rollback_only()]
        busy = [charge for charge in charges if not charge.quiet]
        if busy:
            await run_to_completion(self._settle(busy, commit=commit and not marked))

    def answered(self) -> None:
        """The reply is on its way: what its body and background tasks do is no longer bound by its deadline."""
        self.deadline = None
        for charge in self._charges.values():
            if charge.wish.deadline is not None:
                charge.ending.lift_deadline()

    async def close(self, *, well: bool) -> None:
        """Settle what was done since the reply (commit if the call ended *well*), then close every session."""
        if not self._charges:
            return
        if not self.quiet or not self._closes_at_once:
            await run_to_completion(self._close(well=well))
            return
        for charge in self._in_order():
            charge.ending.close_at_once()
        self._charges.clear()

    async def pause(self) -> None:
        """Before a websocket waits for its peer: give connections back; ``UnsavedWrites`` if there are writes."""
        for charge in self._in_order():
            if charge.quiet:
                continue
            if writes := await charge.lost_without_commit():
                raise UnsavedWrites(
                    f"{charge.holder} waits for its peer with uncommitted writes ({', '.join(writes)})",
                    remedies=["Commit each message: async with atomic(session), or await session.commit()."],
                )
            await charge.ending.roll_back()

    # Private --------------------------------------------------------------------------------------------

    @property
    def _closes_at_once(self) -> bool:
        for charge in self._charges.values():  # noqa: SIM110  # as in quiet
            if not charge.ending.closes_at_once:
                return False
        return True

    def _in_order(self) -> list[Charge]:
        if len(self._charges) < 2:  # one alone is in order
            return [*self._charges.values()]
        order = {id(database): position for position, database in enumerate(self.databases)}
        return sorted(self._charges.values(), key=lambda charge: order.get(id(charge.database), len(order)))

    async def _settle(self, charges: list[Charge], *, commit: bool) -> None:
        for charge in charges:
            charge.hold_callbacks()
        try:
            for charge in charges:
                await charge.ending.everyone_out()
            if commit:
                saving = [charge for charge in charges if await self._is_to_commit(charge)]
                if len(saving) == 1:
                    await saving[0].ending.commit()
                else:
                    await _prepare(saving)
                    await _commit_in_order(saving)
        finally:
            for charge in charges:
                await charge.ending.roll_back()
            # Only now: none of them holds a connection, or a lock that a callback could wait for.
            for charge in charges:
                await charge.run_callbacks()

    async def _is_to_commit(self, charge: Charge) -> bool:
        if charge.wish.mode is _AUTO:
            if dropped := charge.take_dropped():
                raise UnsavedWrites(
                    f"{charge.holder} succeeded, but had closed its session with uncommitted writes"
                    f" ({', '.join(dropped)})",
                    remedies=["Do not close the unit's session: it is committed and closed for you."],
                )
            return True
        if charge.wish.mode is _READ:
            refuse_changes(charge.session)
        elif self.unsaved != "ignore" and (writes := await charge.lost_without_commit()):
            self._tell_unsaved(charge, writes)
        return False

    def _tell_unsaved(self, charge: Charge, writes: tuple[str, ...]) -> None:
        if self.unsaved == "raise":
            raise UnsavedWrites(
                f"{charge.holder} succeeded with uncommitted writes ({', '.join(writes)})",
                remedies=[
                    "Commit them: await session.commit().",
                    "Or let the unit commit: commit_mode='auto'.",
                ],
            )
        charge.database.tell(WorkDropped(database=charge.database.name, holder=charge.holder, writes=writes))

    async def _close(self, *, well: bool) -> None:
        try:
            await self.settle(commit=well)
        finally:
            for charge in self._in_order():
                await charge.ending.close()
            self._charges.clear()


async def _prepare(saving: list[Charge]) -> None:
    """Before the first of several COMMITs, provoke what can still fail in any of them."""
    for charge in saving:
        await charge.ending.prepare()


async def _commit_in_order(saving: list[Charge]) -> None:
    committed: list[str] = []
    for charge in saving:
        try:
            await charge.ending.commit()
        except Exception as error:
            if not committed:
                raise
            partial = PartialCommit(
                f"database {charge.database.name!r} failed to commit after {', '.join(map(repr, committed))} had",
                remedies=[
                    "There is no two-phase commit: look what is stored, and make the work repeatable.",
                    "Put the database that fails most often first in install(app, ...).",
                ],
            )
            partial.committed, partial.failed = tuple(committed), charge.database.name
            raise partial from error
        committed.append(charge.database.name)
