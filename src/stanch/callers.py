"""Names whoever holds or asks for something: the task, and the nearest line of the user's own code."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from greenlet import getcurrent  # type: ignore[import-untyped]  # its stubs are a package of their own

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from greenlet import greenlet

_SELF: Final = str(Path(__file__).parent) + os.sep
_DEMO: Final = _SELF + "demo" + os.sep
"""A shop as a user would write it: its lines are to be named."""

_LIBRARIES: Final = (
    f"{os.sep}site-packages{os.sep}",
    f"{os.sep}dist-packages{os.sep}",
    str(Path(os.__file__).parent),
)
"""Where code lives that the user did not write."""


class Place(NamedTuple):
    """A line of code: what a complaint points at.

    >>> print(Place("orders.py", 12, "place_order"))
    orders.py:12 in place_order()
    >>> print(NOWHERE)
    ?
    """

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line} in {self.function}()" if self.line else self.file


NOWHERE: Final = Place("?", 0, "?")
"""No line of user code was on the stack."""

_KEPT: Final = 10_000
"""How many files are remembered as the user's or not; generated code could have any number."""

_users: Final[dict[str, bool]] = {}
"""Whether a file is the user's: the question is asked for some twenty frames at each checkout."""


_SQLALCHEMY_ASYNC: Final = str(Path("sqlalchemy", "ext", "asyncio"))

_entrances: Final[dict[str, bool]] = {}
"""Whether a file is of SQLAlchemy's async classes."""


def place_of_caller() -> Place:
    """The nearest line of user code on the stack of whoever calls, or ``NOWHERE``.

    Frames of stanch and of installed packages are passed over; SQLAlchemy's greenlets are crossed. Where the running
    task begins the search ends: what runs the event loop has asked for nothing.
    """
    # Plain loops, and no call for a frame: this is the dearest part of a checkout.
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]  # CPython's documented way to a frame without a traceback
    fiber: greenlet | None = None
    task = current_task()
    outermost = None if task is None else getattr(task.get_coro(), "cr_frame", None)
    is_users = _users.get
    while True:
        while frame is not None:
            known = is_users(frame.f_code.co_filename)
            if known or (known is None and _is_users(frame)):
                return _place(frame)
            if frame is outermost:
                return NOWHERE
            frame = frame.f_back
        fiber = (getcurrent() if fiber is None else fiber).parent
        if fiber is None:
            return NOWHERE
        frame = fiber.gr_frame


def place_of_asker(task: asyncio.Task[object] | None) -> Place:
    """The line of user code by which *task*, the running one, has asked SQLAlchemy for something, or ``NOWHERE``.

    As ``place_of_caller()``, in a quarter of the time: under a method of SQLAlchemy's async classes are some twenty
    frames of SQLAlchemy's own, which are not looked at. So a listener of the user's in there is passed over, and the
    line that called the method is named. ``run_sync()`` runs the user's own code, which is looked at.
    """
    parent = getcurrent().parent
    entered = None if parent is None else parent.gr_frame
    frame = None if entered is None else entered.f_back
    if frame is None or not _is_entrance(frame):
        return place_of_caller()
    outermost = None if task is None else getattr(task.get_coro(), "cr_frame", None)
    is_users = _users.get
    while frame is not outermost and (frame := frame.f_back) is not None:
        known = is_users(frame.f_code.co_filename)
        if known or (known is None and _is_users(frame)):
            return _place(frame)
    return place_of_caller()  # a listener's, then; or another greenlet began this one


def whereabouts(task: asyncio.Task[object] | None) -> str:
    """Who *task* is and where it stands now, in words; costs nothing until somebody asks.

    Named is the innermost line of user code: of a suspended task, along the coroutines it awaits; of the
    running one, along the stack, across SQLAlchemy's greenlets.
    """
    if task is None:
        return "no task"
    if task.done():
        return f"{task.get_name()}, which is gone"
    here = place_of_task(task)
    return task.get_name() if here is NOWHERE else f"{task.get_name()}, now at {here}"


def place_of_task(task: asyncio.Task[object] | None) -> Place:
    """The innermost line of user code at which *task* stands now, or ``NOWHERE``."""
    if task is None or task.done():
        return NOWHERE
    frames = _running_frames() if task is current_task() else reversed([*_awaiting_frames(task)])
    return next((_place(frame) for frame in frames if _is_users(frame)), NOWHERE)


def current_loop() -> asyncio.AbstractEventLoop | None:
    """The running event loop, or None."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def current_task() -> asyncio.Task[object] | None:
    """The running task, or None outside any event loop."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def _running_frames() -> Iterator[FrameType]:
    """The stack of whoever calls, innermost first; a greenlet's stack ends where it was switched to."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]  # CPython's documented way to a frame without a traceback
    fiber: greenlet | None = getcurrent()
    while fiber is not None:
        while frame is not None:
            yield frame
            frame = frame.f_back
        fiber = fiber.parent
        frame = None if fiber is None else fiber.gr_frame


def _awaiting_frames(task: asyncio.Task[object]) -> Iterator[FrameType]:
    """The frames of the coroutines that *task* is suspended in, outermost first.

    ``Task.get_stack()`` gives the outermost alone: in a request that is the server's.
    """
    coroutine: Any = task.get_coro()
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None)
        if frame is not None:
            yield frame
        coroutine = getattr(coroutine, "cr_await", None)


def _is_entrance(frame: FrameType) -> bool:
    """Whether *frame* is of a method by which SQLAlchemy's async classes enter a greenlet, with no code but its own."""
    code = frame.f_code
    file = code.co_filename
    known = _entrances.get(file)
    if known is None:
        known = _SQLALCHEMY_ASYNC in file and not _is_users(frame)
        if len(_entrances) < _KEPT:
            _entrances[file] = known
    return known and code.co_name != "run_sync"


def _is_users(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    known = _users.get(file)
    if known is None:
        is_ours = file.startswith((_SELF, "<")) or any(library in file for library in _LIBRARIES)
        known = not is_ours or file.startswith(_DEMO)
        if len(_users) < _KEPT:
            _users[file] = known
    return known


def _place(frame: FrameType) -> Place:
    return Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname)
