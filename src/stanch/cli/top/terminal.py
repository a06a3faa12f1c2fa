"""The terminal, taken over for a while and given back as it was: the screen, the keys, the signals."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import signal
import sys
import termios
import tty
from typing import TYPE_CHECKING, Any, Final, Self

from rich.live import Live

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console, RenderableType

_ENDINGS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""The signals that end the picture, in order."""

TERMINAL_GONE: Final = 128 + 1
"""The exit status where nobody can look any more: as after SIGHUP."""

_SEQUENCE: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|O.|.)?")
"""What an arrow or a function key sends: the letters in it are no keys."""


class Terminal:
    """``async with``: the other screen, no cursor, keys one by one; at the end, however it comes, all as before.

    *pressed* is told of each key, *resized* that everything must be drawn anew, *ended* that it must end, and with
    which exit status.
    """

    def __init__(
        self,
        console: Console,
        *,
        pressed: Callable[[str], None],
        resized: Callable[[], None],
        ended: Callable[[int], None],
    ) -> None:
        self._console = console
        self._pressed = pressed
        self._resized = resized
        self._ended = ended
        self._stack = contextlib.ExitStack()
        self._before: list[Any] | None = None
        self._live = Live(
            console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )

    def draw(self, picture: RenderableType) -> None:
        """Show *picture*, which fills the screen. Raises ``OSError`` if there is no terminal any more."""
        if not sys.stdout.isatty():
            raise OSError(errno.EIO, "the terminal is gone")  # Rich would draw nothing, and say nothing
        self._live.update(picture, refresh=True)

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            for number in _ENDINGS:
                stack.callback(loop.remove_signal_handler, number)
                loop.add_signal_handler(number, self._ended, 128 + number)
            for number, then in {signal.SIGWINCH: self._resized, signal.SIGTSTP: self._suspend}.items():
                stack.callback(loop.remove_signal_handler, number)
                loop.add_signal_handler(number, then)
            stack.callback(self._leave)
            self._enter()
            if sys.stdin.isatty():
                stack.callback(loop.remove_reader, sys.stdin.fileno())
                loop.add_reader(sys.stdin.fileno(), self._read)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self._stack.close()

    # Private --------------------------------------------------------------------------------------------

    def _enter(self) -> None:
        if sys.stdin.isatty():
            self._before = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)
        self._live.start()

    def _leave(self) -> None:
        """Give the terminal back; one that is gone needs nothing."""
        with contextlib.suppress(OSError):
            self._live.stop()
        if self._before is not None:
            with contextlib.suppress(OSError, termios.error):
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._before)

    def _suspend(self) -> None:
        """Ctrl-Z: the shell gets its screen back, and we go on when it says so."""
        self._leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._enter()
        self._resized()

    def _read(self) -> None:
        try:
            keys = os.read(sys.stdin.fileno(), 1024)
        except OSError:
            keys = b""
        if not keys:
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self._ended(TERMINAL_GONE)
        for key in _SEQUENCE.sub("", keys.decode(errors="ignore")):
            self._pressed(key)
