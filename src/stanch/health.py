"""Answers the probes of whoever runs the app: is the process alive, can it serve, has it started.

A reply is JSON with the words of the IETF's draft of health checks (draft-inadarei-api-health-check-06): ``status`` is
``pass``, ``warn`` or ``fail``. It tells counts and reasons by name, and nothing of where a database is. Who holds the
connections is for the log, which is told when a database stops being ready and when it is ready again.
"""

from __future__ import annotations

import asyncio
import time
from contextvars import Context
from typing import TYPE_CHECKING, Any, Final, Literal

from sqlalchemy import text
from starlette.responses import JSONResponse

from stanch.deadlines import GRACE, Deadline, judged_length
from stanch.errors import ConfigError, StanchError
from stanch.events import logger
from stanch.lifetime import State
from stanch.pool import Pool
from stanch.sessions import guarded_session
from stanch.sqlstate import Kind, classify, sqlstate_of
from stanch.transactions import Ending, finish
from stanch.values import Value

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine
    from starlette.types import Receive, Scope, Send

    from stanch.database import Database

Status = Literal["pass", "warn", "fail"]

_SEVERITY: Final[tuple[Status, ...]] = ("pass", "warn", "fail")
_RETRY_AFTER: Final = "1"
"""Seconds until it is worth asking again: what stood in the way may be gone as soon as that."""

_HOLDER: Final = "health probe"
"""On whose account the connection goes, where routes and holders are told apart."""

_NEVER_STORED: Final = {"cache-control": "no-store"}
_OVER: Final[Mapping[State, str]] = {State.DRAINING: "database-closing", State.CLOSED: "database-closed"}


class HealthApp:
    """The ASGI app behind ``install(health=)``: what *databases* say, within *timeout* seconds.

    ``/live`` is 200 as long as the event loop answers, and asks no database: restarting the process mends no database.
    ``/ready``, and the path itself, is 503 with ``Retry-After`` unless each database gives a connection that answers in
    time. ``/startup`` is the same until that has once been so, and 200 from then on.

    At most one probe is under way for each database; whoever asks meanwhile shares its answer. It waits its turn in the
    pool like everybody else, holds one connection for one statement and its end, and is severed at its deadline.
    A pool that is full but still hands connections on is ready all the same (``warn``): a pod that is taken away for
    its load makes the load of the others worse. One that hands none on is not.
    """

    def __init__(self, databases: Sequence[Database[Any]], *, timeout: float) -> None:
        length = judged_length("health_timeout", timeout)
        if length is None:
            raise ConfigError(
                "health_timeout must be seconds, got None", remedies=["Write health_timeout=0.7."]
            )
        self._timeout = length
        self._databases = databases
        self._probes: dict[str, _Probe] = {}
        self._answers: dict[str, Callable[[], Awaitable[Sequence[_Finding] | None]]] = {
            "live": _nothing_to_ask,
            "": self._ask_all,
            "ready": self._ask_all,
            "startup": self._ask_those_not_seen_yet,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one probe."""
        await (await self._reply(scope))(scope, receive, send)

    async def _reply(self, scope: Scope) -> JSONResponse:
        answer = self._answers.get(scope["path_params"].get("rest", ""))
        if answer is None:
            return JSONResponse({"title": "Not Found", "status": 404}, 404)
        if scope["method"] not in {"GET", "HEAD"}:
            return JSONResponse({"title": "Method Not Allowed", "status": 405}, 405, {"allow": "GET, HEAD"})
        findings = await answer()
        if findings is None:
            return JSONResponse({"status": "pass"}, 200, _NEVER_STORED)
        worst = max((finding.status for finding in findings), key=_SEVERITY.index, default="pass")
        body = {"status": worst, "databases": [finding.as_dict() for finding in findings]}
        if worst == "fail":
            return JSONResponse(body, 503, {**_NEVER_STORED, "retry-after": _RETRY_AFTER})
        return JSONResponse(body, 200, _NEVER_STORED)

    async def _ask_all(self) -> Sequence[_Finding]:
        return await asyncio.gather(*(self._probe_of(database).ask() for database in self._databases))

    async def _ask_those_not_seen_yet(self) -> Sequence[_Finding] | None:
        unseen = [probe for probe in map(self._probe_of, self._databases) if not probe.has_answered]
        return await asyncio.gather(*(probe.ask() for probe in unseen)) if unseen else None

    def _probe_of(self, database: Database[Any]) -> _Probe:
        # by name: a database that a later install adds is not known when this app is made
        probe = self._probes.get(database.name)
        if probe is None:
            probe = self._probes[database.name] = _Probe(database, self._timeout)
        return probe


async def _nothing_to_ask() -> None:
    """The loop has come here; that is the answer."""


class _Finding(Value):
    """What one probe of one database has found out."""

    database: str
    status: Status
    reason: str | None
    """By name: an error's code, which ``stanch explain`` knows, or what state the database or its pool is in."""
    sqlstate: str | None
    waited: float
    """Until there was an answer, or no hope of one."""
    in_use: int
    idle: int
    bound: int
    waiting: int

    def as_dict(self) -> dict[str, object]:
        """As JSON has it; what there is nothing to say of is left out."""
        shown = {name: getattr(self, name) for name in self.fields()}
        return {
            name: round(value, 4) if name == "waited" else value
            for name, value in shown.items()
            if value is not None
        }


class _Probe:
    """Asks one database, once at a time."""

    def __init__(self, database: Database[Any], timeout: float) -> None:
        self._database = database
        self._timeout = timeout
        self._under_way: asyncio.Task[_Finding] | None = None
        self._asked: AsyncEngine | None = None
        self._was_ready = True
        self.has_answered = False
        """Whether it has been ready at least once."""

    async def ask(self) -> _Finding:
        """What the probe finds that is under way, or else a new one."""
        task = self._under_way
        if task is None or task.done() or task.get_loop() is not asyncio.get_running_loop():
            # A context of its own: a deadline of whoever asks first is not one of those who join.
            task = self._under_way = asyncio.create_task(
                self._find_out(), name=f"health probe of {self._database.name}", context=Context()
            )
        # Shielded: whoever asks may hang up, the others still wait for the answer.
        return await asyncio.shield(task)

    async def _find_out(self) -> _Finding:
        began = time.monotonic()
        if (over := _OVER.get(self._database.state)) is not None:
            return self._judged("fail", over, None, began)
        try:
            # The deadline inside severs and says what was waited for. A pool that is not ours does not know it.
            async with asyncio.timeout(self._timeout + GRACE):
                await self._touch()
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the answer
            return self._failed(error, began)
        return self._judged("pass", None, None, began)

    async def _touch(self) -> None:
        """Have each pool of the database give a connection, and the server answer on it."""
        database, deadline = self._database, Deadline.after(self._timeout, "health_timeout")
        self._asked = database.reader_engine
        await _ask(database, deadline, reading=True)
        if database.engine is not self._asked:
            self._asked = database.engine
            await _ask(database, deadline, reading=False)

    def _failed(self, error: Exception, began: float) -> _Finding:
        failure = classify(error)
        if failure is not None and failure.kind is Kind.POOL_FULL and self._still_hands_on():
            return self._judged("warn", "pool-busy", None, began)
        return self._judged("fail", _reason(error), error, began)

    def _still_hands_on(self) -> bool:
        """Whether the pool that was asked has given somebody a connection in as much time as a probe has."""
        pool = None if self._asked is None else self._asked.pool
        # All are out, or there would have been one for us; so the latest that was given is among them.
        since = time.monotonic() - self._timeout
        return isinstance(pool, Pool) and any(checkout.since >= since for checkout in pool.held())

    def _judged(self, status: Status, reason: str | None, error: Exception | None, began: float) -> _Finding:
        stats = self._database.stats()
        finding = _Finding(
            database=self._database.name,
            status=status,
            reason=reason,
            sqlstate=None if error is None else sqlstate_of(error),
            waited=time.monotonic() - began,
            in_use=stats.in_use,
            idle=stats.idle,
            bound=stats.bound,
            waiting=stats.waiting,
        )
        self._tell_a_change(finding, error)
        return finding

    def _tell_a_change(self, finding: _Finding, error: Exception | None) -> None:
        """Once for each time that it changes: probes come every few seconds for as long as it lasts."""
        is_ready = finding.status != "fail"
        self.has_answered = self.has_answered or is_ready
        if is_ready is not self._was_ready:
            self._was_ready = is_ready
            if is_ready:
                logger.warning("health: database %r is ready again", finding.database)
            else:
                told = error.what if isinstance(error, StanchError) else type(error).__name__
                logger.warning(
                    "health: database %r is not ready: %s%s",
                    finding.database,
                    finding.reason,
                    "" if error is None else f": {told}",
                )


async def _ask(database: Database[Any], deadline: Deadline, *, reading: bool) -> None:
    session = database.new_session(_HOLDER)
    ending = Ending(session)
    ending.keep_to(deadline)
    if reading:  # one round trip
        guarded_session(session).start_reading()
    try:
        await session.execute(text("SELECT 1"))
    finally:
        await finish(ending, commit=False)


def _reason(error: Exception) -> str:
    if isinstance(error, StanchError):
        return error.error_code
    failure = classify(error)
    if isinstance(error, TimeoutError):
        return "deadline"
    return "error" if failure is None else failure.kind.value.replace(" ", "-")
