"""Does the same work again, whole and in a fresh transaction, where the database could not do it this time."""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Final,
    Generic,
    ParamSpec,
    Protocol,
    TypeVar,
    TypeVarTuple,
)
from weakref import WeakKeyDictionary

from sqlalchemy.ext.asyncio import AsyncSession

from stanch.callers import NOWHERE, Place, current_task, place_of_caller
from stanch.deadlines import Deadline, earlier, in_force, under
from stanch.errors import CommitUnknown, ConfigError, InsideTransaction
from stanch.events import AttemptFailed
from stanch.retry import Attempt, Retry
from stanch.sessions import guard_of
from stanch.sqlstate import classify, sqlstate_of
from stanch.transactions import judge_isolation_level

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator
    from contextlib import AbstractAsyncContextManager

    from stanch.events import Event
    from stanch.guards import Guard
    from stanch.ledger import Checkout, Stats
    from stanch.transactions import IsolationLevel

S = TypeVar("S", bound=AsyncSession)
S_co = TypeVar("S_co", bound=AsyncSession, covariant=True)
T = TypeVar("T")
P = ParamSpec("P")
Ts = TypeVarTuple("Ts")

_work_under_way: Final[WeakKeyDictionary[asyncio.Task[object], list[object]]] = WeakKeyDictionary()
"""Of which databases a task is now attempting some work, whether or not that holds a connection at the moment."""


class Host(Protocol[S_co]):
    """What is needed of a ``Database`` here."""

    @property
    def name(self) -> str: ...  # noqa: D102  # database.py says what each of these is

    def transaction(  # noqa: D102  # likewise
        self, *, isolation_level: IsolationLevel | None = None, read_only: bool = False
    ) -> AbstractAsyncContextManager[S_co]: ...

    def reader(self) -> AbstractAsyncContextManager[S_co]: ...  # noqa: D102  # likewise

    def held_by(self, task: asyncio.Task[object] | None) -> Checkout | None: ...  # noqa: D102  # likewise

    def stats(self) -> Stats: ...  # noqa: D102  # likewise

    def tell(self, event: Event) -> None: ...  # noqa: D102  # likewise


@dataclass(frozen=True, slots=True)
class Attempts(Generic[S]):
    """A way to do work: each attempt is the whole function, in a session and transaction of its own."""

    host: Host[S]
    retry: Retry
    isolation_level: IsolationLevel | None = None

    def __post_init__(self) -> None:
        judge_isolation_level(self.isolation_level)

    async def at(self, work: Callable[[S, *Ts], Awaitable[T]], *args: *Ts) -> T:
        """What *work* returns in the first attempt whose transaction commits.

        Raises what ended the last one. A cancellation ends it at once, also in a pause.
        """
        judge_function("run_transaction()", work)
        refuse_inside(self.host, "run_transaction()")
        deadline = self._deadline()
        place = place_of_caller()
        history = _History(self.retry.attempts)
        attempt = Attempt()
        with _under_way(self.host), under(deadline):
            while True:
                guard: Guard | None = None
                try:
                    async with self.host.transaction(isolation_level=self.isolation_level) as session:
                        guard = guard_of(session)
                        guard.holder = holder_of(work, place)
                        guard.attempt = attempt
                        return await awaited(work, session, *args)
                except Exception as error:  # noqa: BLE001  # it is raised, unless the work is done again
                    following = attempt.after(error, committed=guard is not None and guard.committed)
                    pause = self._pause_before(following, error, deadline)
                    if pause is None:
                        raise history.outcome(attempt, error)  # noqa: B904  # it is that error, or an earlier one
                    history.add(attempt, error)
                    self._tell(work, attempt, error, pause)
                attempt = following
                await asyncio.sleep(pause)

    def service(
        self, function: Callable[Concatenate[S, P], Awaitable[T]]
    ) -> Callable[P, Coroutine[Any, Any, T]]:
        """*function* without its session: each call is an ``at`` of its own."""
        signature = _signature_without_session(function)

        @functools.wraps(function)
        async def service(*args: P.args, **kwargs: P.kwargs) -> T:
            async def work(session: S) -> T:
                return await function(session, *args, **kwargs)

            return await self.at(functools.update_wrapper(work, function))

        service.__signature__ = signature  # type: ignore[attr-defined]  # what callers may pass
        return service

    def _deadline(self) -> Deadline | None:
        timeout = self.retry.timeout
        own = None if timeout is None else Deadline.after(timeout, f"Retry(timeout={timeout})")
        return earlier(own, in_force())

    def _pause_before(self, attempt: Attempt, error: Exception, deadline: Deadline | None) -> float | None:
        if deadline is None:
            return self.retry.pause_before(attempt, error)
        return self.retry.pause_before(attempt, error, remaining=deadline.remaining())

    def _tell(self, work: Callable[..., object], attempt: Attempt, error: Exception, pause: float) -> None:
        self.host.tell(
            AttemptFailed(
                database=self.host.name,
                work=name_of(work),
                attempt=attempt.number,
                reason=_in_words(error),
                pause=pause,
            )
        )


class _History:
    """What became of the attempts so far: a line for each, without values; and whether one may have been stored."""

    def __init__(self, attempts: int) -> None:
        self._of = attempts
        self._lines: list[str] = []
        self._unknown: CommitUnknown | None = None

    def add(self, attempt: Attempt, error: Exception) -> None:
        self._lines.append(f"attempt {attempt.number} of {self._of}: {_in_words(error)}")
        if isinstance(error, CommitUnknown):
            self._unknown = error

    def outcome(self, attempt: Attempt, error: Exception) -> Exception:
        """What is raised in the end: the last *error* itself, with the earlier ones as its notes.

        After an unknown commit a later failure of the database does not make the outcome known: then it is that
        ``CommitUnknown``. Any other error is the work's own answer; it was told.
        """
        outcome = error
        if self._unknown is not None and classify(error) is not None:
            self.add(attempt, error)
            outcome = self._unknown
        for line in self._lines:
            outcome.add_note(line)
        return outcome


def attempt_of(session: AsyncSession) -> Attempt:
    """Which attempt at its work *session* belongs to; the first, where nothing is repeated.

    ``attempt_of(session).maybe_committed`` is True once an earlier attempt may be stored: look before you write.
    """
    return guard_of(session).attempt


# What stands before any work --------------------------------------------------------------------------------


def refuse_inside(host: Host[Any], what: str) -> None:
    """Raise ``InsideTransaction`` if the running task is in a transaction of *host*, as far as that is known.

    Known is what it holds now, and the work it is in. A connection that another task has taken for it, such as the
    one that ``asyncio.wait_for`` runs in before Python 3.12, is not.
    """
    task = asyncio.current_task()
    if task is not None and any(other is host for other in _work_under_way.get(task, ())):
        where = f"inside the work of another run_transaction() of database {host.name!r}"
    elif (held := host.held_by(task)) is not None:
        where = (
            f"by a task that holds a connection of database {host.name!r}: {held.told_at(time.monotonic())}"
        )
    else:
        return
    raise InsideTransaction(
        f"{what} was called {where}",
        remedies=[
            "End the open transaction first: await session.commit(), or await release(session).",
            "Or do the work in it: call the plain function with its session, in async with atomic(session).",
        ],
    )


def judge_function(what: str, function: object) -> None:
    """``ConfigError`` unless *function* can be called, as often as needed; above all for its coroutine."""
    if inspect.iscoroutine(function):
        function.close()  # nobody will await it, and Python need not say so as well
        _refuse_function(what, f"the coroutine of {function.__qualname__}(), which can run only once")
    if not callable(function):
        _refuse_function(what, f"a {type(function).__name__}")


async def awaited(function: Callable[[S, *Ts], Awaitable[T]], session: S, *args: *Ts) -> T:
    """What *function* gives for *session*; ``ConfigError`` if there is nothing to await."""
    answer = function(session, *args)
    _judge_answer(function, answer)
    return await answer


def _judge_answer(function: object, answer: object) -> None:
    if not inspect.isawaitable(answer):
        _refuse_function(
            name_of(function), f"a function whose answer, a {type(answer).__name__}, is not awaitable"
        )


def _refuse_function(what: str, got: str) -> None:
    raise ConfigError(
        f"{what}: expected an async function that takes a session, got {got}",
        remedies=[
            "Write async def work(session, a): ..., and hand over work itself and its arguments, not work(session, a)."
        ],
    )


def _signature_without_session(function: Callable[..., object]) -> inspect.Signature:
    if not inspect.iscoroutinefunction(function):
        judge_function("transactional", function)
        _refuse_function("transactional", f"{name_of(function)}, which is no async def")
    signature = inspect.signature(function)
    parameters = [*signature.parameters.values()]
    if not parameters or parameters[0].kind not in {
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    }:
        _refuse_function("transactional", f"{name_of(function)}, which takes no session")
    return signature.replace(parameters=parameters[1:])


@contextmanager
def _under_way(host: object) -> Generator[None]:
    task = current_task()
    assert task is not None
    hosts = _work_under_way.setdefault(task, [])
    hosts.append(host)
    try:
        yield
    finally:
        hosts.remove(host)


def holder_of(work: object, place: Place) -> str:
    """Whose session it is, in words; a task that runs *work* and nothing else was begun at no line of the user's."""
    return name_of(work) if place is NOWHERE else f"{name_of(work)} from {place}"


def name_of(work: object) -> str:
    """*work* by its name, as it is called; another callable by its class."""
    name = getattr(getattr(work, "func", work), "__qualname__", None)
    return f"{name}()" if isinstance(name, str) else type(work).__name__


def _in_words(error: Exception) -> str:
    state = sqlstate_of(error)
    return type(error).__name__ + ("" if state is None else f", SQLSTATE {state}")
