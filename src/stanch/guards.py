"""The facts about one session that SQLAlchemy does not keep, and the door at which one task at a time comes in."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from stanch.accounts import Account
from stanch.callers import current_task, whereabouts
from stanch.completion import is_ours
from stanch.deadlines import impose, lift
from stanch.errors import SessionOverlap
from stanch.hooks import Frame, Hooks, Outcome
from stanch.retry import Attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextvars import Token

    from sqlalchemy.orm import SessionTransaction

    from stanch.callers import Place
    from stanch.deadlines import Deadline

_FIRST: Final = Attempt()


class Owner(NamedTuple):
    """Who has promised to end a transaction; *is_block*: with a block of the user's that is still open."""

    what: str
    is_block: bool = False

    def __str__(self) -> str:
        return self.what


class Guard:
    """The facts about one session that SQLAlchemy does not keep: whose it is, who is inside, what it wrote."""

    __slots__ = (
        "_depth",
        "_imposed",
        "_left",
        "_on_end",
        "account",
        "attempt",
        "barred",
        "commits",
        "committed",
        "connection_options",
        "database",
        "deadline",
        "doubtful",
        "dropped",
        "ended_at",
        "hooks",
        "hooks_wait",
        "inside",
        "locks",
        "owners",
        "reading",
        "rollback_only",
        "streams",
        "wrote",
    )

    def __init__(
        self,
        holder: str,
        *,
        database: str = "?",
        place: Place | None = None,
        on_end: Callable[[Guard, tuple[str, ...]], None] | None = None,
    ) -> None:
        self.account = Account(holder, place)
        self.database = database
        self._on_end = on_end
        self.connection_options: Mapping[str, Any] = {}
        self.deadline: Deadline | None = None
        """When the unit of work must be over; in force while a task is inside. Set by ``Ending.keep_to()``."""
        self._imposed: Token[Deadline | None] | None = None
        self.attempt = _FIRST
        """Which of several attempts at the same work this is."""
        self.committed = False
        """Whether a transaction of this session has been committed."""
        self.commits = False
        """Whether that is the one which is ending now."""
        self.ended_at: datetime | None = None
        self.rollback_only = False
        self.hooks: Hooks[SessionTransaction] = Hooks()
        self.hooks_wait = False
        """Whether callbacks that are due wait for ``run_due()``: other sessions of the unit still hold something."""
        self.owners: list[Owner] = []
        """Who has promised to commit, the innermost last; nobody has for a transaction merely begun by a read."""
        self.reading = False
        """Whether each statement stands alone, in no transaction, and must only read."""
        self.wrote: list[str] = []
        self.doubtful: list[str] = []
        """Texts of which only the server knows whether they wrote."""
        self.locks: list[str] = []
        """Texts that did no more than lock rows."""
        self.dropped: tuple[str, ...] = ()
        """What a close() has dropped uncommitted."""
        self.streams: list[Any] = []
        """Results that are still fetching on the session's connection."""
        self.barred = False
        """Whether nobody may come in until everyone has left: set when waiting for that took too long."""
        self.inside: asyncio.Task[object] | None = None
        self._depth = 0
        self._left: asyncio.Event | None = None

    @property
    def holder(self) -> str:
        """Whose session it is, in words."""
        return self.account.holder

    @holder.setter
    def holder(self, holder: str) -> None:
        self.account.holder = holder

    def enter(self) -> None:
        """The running task comes in; it may come in again. Another task is refused.

        It waits instead while the unit is being settled, of which it cannot know: the start of a stream and the
        first statement of the stream's own task may come at the same moment.
        """
        task = current_task()
        if self.inside is not task and (self._depth or self.barred):
            self._wait_or_refuse(task)
        if not self._depth:
            self.inside = task
            if self.deadline is not None:
                self._imposed = impose(self.deadline)
        self._depth += 1

    def _wait_or_refuse(self, task: asyncio.Task[object] | None) -> None:
        while self._depth and is_ours(self.inside) and in_greenlet():
            await_only(self.left())
        if self._depth or self.barred:
            raise SessionOverlap(
                f"two tasks are inside the session of {self.holder} at once: {whereabouts(self.inside)},"
                f" and {whereabouts(task)}",
                remedies=["Give each task a session of its own: async with db.session() as session."],
            )

    def leave(self) -> None:
        """The running task goes out again, as often as it came in."""
        self._depth -= 1
        if not self._depth:
            self.inside = None
            if self._imposed is not None:
                imposed, self._imposed = self._imposed, None
                lift(imposed)
            if self._left is not None:
                self._left.set()
                self._left = None

    async def left(self) -> None:
        """Wait until nobody is inside."""
        while self._depth:
            if self._left is None:
                self._left = asyncio.Event()  # one for all who wait
            await self._left.wait()
        self.barred = False

    @property
    def outermost(self) -> bool:
        """Whether the running task, which is inside, came in only once."""
        return self._depth == 1

    def __enter__(self) -> None:
        """The running task is inside meanwhile."""
        self.enter()

    def __exit__(self, *_exception: object) -> None:
        self.leave()

    def end(self, *, dropped: tuple[str, ...]) -> bool:
        """The session was closed for good, dropping these uncommitted writes; the owner is told. False: told before."""
        if self.ended_at is not None:
            return False
        self.ended_at = datetime.now(UTC)
        self.dropped = dropped
        if self._on_end is not None:
            self._on_end(self, dropped)
        return True

    def refuse_overdue(self) -> None:
        """Raise ``DeadlinePassed`` once there is a deadline and it has passed."""
        if self.deadline is not None and self.deadline.has_passed:
            raise self.deadline.passed(
                f"{self.holder}: {self.deadline} have passed; its session does nothing more"
            )

    def note_write(self, what: str) -> None:
        """Remember that *what* was written and is not committed yet."""
        if what not in self.wrote:
            self.wrote.append(what)

    def note_commit(self, frame: Frame | None) -> None:
        """What was done is stored, although SQLAlchemy will not say so."""
        self.committed = self.commits = True
        self.forget_writes()
        if frame is not None:
            frame.outcome = Outcome.COMMITTED

    def forget_writes(self) -> None:
        """The transaction is over."""
        self.wrote.clear()
        self.doubtful.clear()
        self.locks.clear()

    def note_doubt(self, what: str) -> None:
        """Remember that *what* was executed, of which only the server knows whether it wrote."""
        if what not in self.doubtful:
            self.doubtful.append(what)

    def note_lock(self, what: str) -> None:
        """Remember that *what* was executed, which locks rows and no more."""
        if what not in self.locks:
            self.locks.append(what)
