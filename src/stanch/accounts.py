"""What one unit of work has asked of its database so far: whose it is, and what it cost."""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final
from weakref import ref

from stanch.callers import current_task

if TYPE_CHECKING:
    from weakref import ReferenceType

    from sqlalchemy.orm import Session

    from stanch.callers import Place


class Account:
    """The running costs of one unit of work. Lengths of time are in seconds; moments are monotonic.

    Whoever opens the unit opens the account; the pool, the statements and the session's end write into it.
    """

    __slots__ = (
        "__weakref__",  # a meter may keep something of its own for each
        "held",
        "holder",
        "opened_at",
        "place",
        "repeated",
        "rolled_back",
        "session",
        "shapes",
        "sql_time",
        "statements",
        "task",
        "waited",
    )

    def __init__(self, holder: str, place: Place | None = None) -> None:
        self.holder = holder
        """The route (its template), or the line that opened the unit."""
        self.place = place
        """The line of user code that opened it, where that is known."""
        task = current_task()
        self.task = None if task is None else ref(task)
        """The task that opened it; not kept, for it may have failed and hold what the unit has left behind."""
        self.opened_at = time.monotonic()
        self.statements = 0
        self.sql_time = 0.0
        self.waited = 0.0
        """For a connection, all waits together."""
        self.held = 0.0
        """With a connection out, all checkouts together that have ended."""
        self.rolled_back = False
        """Whether work of it was undone."""
        self.session: ReferenceType[Session] | None = None
        """The session of the unit, which may have been dropped."""
        self.shapes: dict[str, int] | None = None
        """How often each text of a statement was sent in the transaction now open; None where that is not counted."""
        self.repeated = False
        """Whether one of them came suspiciously often; see ``repeated_statement``."""


paying: Final[ContextVar[Account | None]] = ContextVar("stanch account", default=None)
"""On whose account the pool is asked for a connection now; set by the session around each checkout."""


is_owed: Final[ContextVar[bool]] = ContextVar("stanch owed", default=False)
"""Whether what is done now is owed to a commit that has happened: refused, nobody could try it again."""
