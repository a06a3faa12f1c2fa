"""Callbacks that wait for the end of a transaction: one frame for each transaction or savepoint, then their run.

What is gathered in a savepoint moves out to the transaction around it when the savepoint is released, and is
dropped when it is rolled back. Nothing runs before the outermost end, when the connection is back in the pool.
"""

from __future__ import annotations

import asyncio
import inspect
from enum import Enum
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from stanch.accounts import is_owed
from stanch.deadlines import only_under
from stanch.events import HookFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from stanch.callers import Place
    from stanch.events import Observers

Key = TypeVar("Key")


class Outcome(Enum):
    """How a transaction or savepoint ended."""

    COMMITTED = "committed"
    ROLLED_BACK = "rolled back"
    UNKNOWN = "unknown"  # the connection was lost during COMMIT: neither kind of callback would be true


class Hook:
    """One callback with its arguments, and the line of user code that gave it.

    No ``repr`` of the arguments: they may be row content.
    """

    __slots__ = ("arguments", "call", "keywords", "place")

    def __init__(
        self,
        call: Callable[..., object],
        arguments: tuple[Any, ...],
        keywords: Mapping[str, Any],
        place: Place,
    ) -> None:
        self.call = call
        self.arguments = arguments
        self.keywords = keywords
        self.place = place

    @property
    def name(self) -> str:
        """The callback in words."""
        return getattr(self.call, "__qualname__", None) or type(self.call).__name__

    def __repr__(self) -> str:
        return f"<Hook {self.name}, given at {self.place}>"


class Frame:
    """What one transaction or savepoint has gathered, and what went wrong in it first."""

    __slots__ = ("doom", "gathered", "outcome", "trouble", "written_before")

    def __init__(self) -> None:
        self.written_before = 0
        """How many writes had been noted when it began."""
        self.gathered: list[tuple[Outcome | None, Hook]] = []
        """Each with the outcome it waits for; None runs after either."""
        self.outcome = Outcome.ROLLED_BACK
        """Until it is known to be another."""
        self.trouble: str | None = None
        """The first database error in it, and where."""
        self.doom: str | None = None
        """Why it must not commit, although nothing but us stands against it."""


class Hooks(Generic[Key]):
    """The callbacks of one session; a *key* is whatever names a transaction or savepoint.

    >>> from stanch.callers import NOWHERE
    >>> hooks, root, savepoint = Hooks[str](), "root", "savepoint"
    >>> hooks.frame(savepoint).gathered.append((Outcome.COMMITTED, Hook(print, ("hello",), {}, NOWHERE)))
    >>> hooks.frame(savepoint).outcome = Outcome.COMMITTED
    >>> ended = hooks.ended(savepoint, parent=root)
    >>> hooks.take_due()
    []
    >>> hooks.frame(root).outcome = Outcome.COMMITTED
    >>> ended = hooks.ended(root, parent=None)
    >>> hooks.take_due()
    [<Hook print, given at ?>]
    """

    __slots__ = ("due", "frames")

    def __init__(self) -> None:
        self.frames: dict[Key, Frame] = {}
        """Of what is open now, and only where something was gathered or went wrong."""
        self.due: list[Hook] = []
        """Those whose time has come, in the order they were given; see ``take_due()``."""

    def frame(self, key: Key) -> Frame:
        """The frame of *key*, made on first use: a transaction that nobody waits for has none."""
        frame = self.frames.get(key)
        if frame is None:
            frame = self.frames[key] = Frame()
        return frame

    def find(self, key: Key | None) -> Frame | None:
        """The frame of *key*, if it has one."""
        return self.frames.get(key) if key is not None else None

    def ended(self, key: Key, *, parent: Key | None) -> Frame | None:
        """*key* has ended with the outcome its frame says; without a *parent* it was the outermost."""
        frame = self.frames.pop(key, None)
        if frame is None:
            return None
        if parent is None:
            self.due += [hook for awaited, hook in frame.gathered if awaited in (None, frame.outcome)]
        elif frame.outcome is Outcome.COMMITTED:
            self.frame(parent).gathered += frame.gathered
        else:
            # A savepoint that was rolled back holds its connection still: what waited for that waits on.
            left = [(None, hook) for awaited, hook in frame.gathered if awaited is not Outcome.COMMITTED]
            if left:
                self.frame(parent).gathered += left
        return frame

    def waiting(self, awaited: Outcome) -> list[Hook]:
        """Callbacks that wait for *awaited* in any open frame whose end is not known yet."""
        return [
            hook
            for frame in self.frames.values()
            if frame.outcome is Outcome.ROLLED_BACK
            for each, hook in frame.gathered
            if each is awaited
        ]

    def __bool__(self) -> bool:
        """Whether any are due."""
        return bool(self.due)

    def take_due(self) -> list[Hook]:
        """Those that are due, handed out once."""
        due, self.due = self.due, []
        return due


class Runner:
    """Runs callbacks one by one, each within *timeout* seconds; what they raise is told, and goes no further."""

    __slots__ = ("_database", "_observers", "_timeout", "instead")

    def __init__(self, *, database: str, observers: Observers, timeout: float) -> None:
        self._database = database
        self._observers = observers
        self._timeout = timeout
        self.instead: Callable[[Hook], bool] | None = None
        """Asked before each; True: it has taken the callback, which is not run. For tests."""

    async def run(self, hooks: Sequence[Hook], *, holder: str) -> None:
        """Run *hooks* in order. Nobody else's deadline is in force in them: the work they wait for is done."""
        token = is_owed.set(True)
        try:
            with only_under(None):
                for hook in hooks:
                    if self.instead is None or not self.instead(hook):
                        await self._run(hook, holder)
        finally:
            is_owed.reset(token)

    async def _run(self, hook: Hook, holder: str) -> None:
        # In a task that may be cancelled. Ours may not: no operation in it is kept from being cut short.
        task = asyncio.create_task(_called(hook))
        try:
            async with asyncio.timeout(self._timeout):
                await task
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # told in full; this task is ours, so a cancellation is the callback's own
            self._observers.tell(
                HookFailed(
                    database=self._database, holder=holder, hook=hook.name, place=str(hook.place), error=error
                )
            )


async def _called(hook: Hook) -> None:
    outcome = hook.call(*hook.arguments, **hook.keywords)
    if inspect.isawaitable(outcome):
        await outcome
