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
    """

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line} in {self.function}()"


NOWHERE: Final = Place("?", 0, "?")
"""No line of user code was on the stack."""


def place_of_caller() -> Place:
    """The nearest line of user code on the stack of whoever calls, or ``NOWHERE``.

    Frames of stanch and of installed packages are passed over; SQLAlchemy's greenlets are crossed.
    """
    return next((_place(frame) for frame in _running_frames() if _is_users(frame)), NOWHERE)


def whereabouts(task: asyncio.Task[object] | None) -> str:
    """Who *task* is and where it stands now, in words; costs nothing until somebody asks.

    Named is the innermost line of user code: of a suspended task, along the coroutines it awaits; of the
    running one, along the stack, across SQLAlchemy's greenlets.
    """
    if task is None:
        return "no task"
    if task.done():
        return f"{task.get_name()}, which is gone"
    frames = _running_frames() if task is current_task() else reversed([*_awaiting_frames(task)])
    here = next((f", now at {_place(frame)}" for frame in frames if _is_users(frame)), "")
    return f"{task.get_name()}{here}"


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


def _is_users(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return not (file.startswith((_SELF, "<")) or any(library in file for library in _LIBRARIES))


def _place(frame: FrameType) -> Place:
    return Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname)
