"""A program on a real pseudo-terminal, and what a person would see there (pyte emulates the screen)."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import time
from typing import TYPE_CHECKING, Any, Self

import pyte

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

PATIENCE = 25.0
"""Seconds that the screen has to show what is waited for."""

OTHER_SCREEN, BACK_AGAIN, CURSOR = b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[?25h"


class NotShown(AssertionError):
    """The screen did not come to show something; the text has what it showed."""


class Terminal:
    """``async with``: *command* runs on a terminal of *lines* × *columns*, and is gone at the end.

    It is the terminal that the command is controlled by, unless it is not *owned*: then no signal comes from there. Not
    *typed* into, it is only written to.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        lines: int = 24,
        columns: int = 80,
        environment: Mapping[str, str] | None = None,
        owned: bool = True,
        typed: bool = True,
    ) -> None:
        self._owned = owned
        self._typed = typed
        self._command = command
        inherited = {
            name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES", "NO_COLOR"}
        }
        self._environment = (
            inherited | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"} | dict(environment or {})
        )
        self._screen: Any = pyte.Screen(columns, lines)
        self._stream: Any = pyte.ByteStream(self._screen)
        self.raw = b""
        """All that was written to the terminal."""
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._master, self._slave = pty.openpty()
        self._set_size()
        self.modes_before = self.modes
        self.process = subprocess.Popen(  # noqa: ASYNC220  # starting it does not wait for it
            self._command,
            stdin=self._slave if self._typed else subprocess.DEVNULL,
            stdout=self._slave,
            stderr=self._slave,
            env=self._environment,
            start_new_session=True,
            preexec_fn=_own_it if self._owned else None,  # noqa: PLW1509  # one system call, no lock
        )
        asyncio.get_running_loop().add_reader(self._master, self._read)
        return self

    async def __aexit__(self, *_exception: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        self.hang_up()

    def hang_up(self) -> None:
        """Take the terminal away."""
        if self._master < 0:
            return
        asyncio.get_running_loop().remove_reader(self._master)
        os.close(self._master)
        os.close(self._slave)
        self._master = self._slave = -1

    # What is to be seen -----------------------------------------------------------------------------------------

    @property
    def lines(self) -> list[str]:
        """The lines of the screen, as wide as it is."""
        return list(self._screen.display)

    @property
    def text(self) -> str:
        """The screen, without the blanks at the ends of its lines."""
        return "\n".join(line.rstrip() for line in self.lines)

    @property
    def colours(self) -> set[str]:
        """All colours in which something is written."""
        return {cell.fg for row in self._screen.buffer.values() for cell in row.values()} - {"default"}

    @property
    def modes(self) -> list[Any]:
        """The settings of the line, as ``stty`` shows them."""
        return termios.tcgetattr(self._slave)

    async def until(self, pattern: str) -> None:
        """Wait until the screen matches *pattern*, a regular expression. Raises ``NotShown``."""
        await self._until(lambda: re.search(pattern, self.text) is not None, pattern)

    async def until_gone(self, pattern: str) -> None:
        """Wait until the screen no longer matches *pattern*. Raises ``NotShown``."""
        await self._until(lambda: re.search(pattern, self.text) is None, f"no {pattern}")

    async def until_written(self, sequence: bytes, *, after: int = 0) -> None:
        """Wait until *sequence* was written, beyond the first *after* bytes. Raises ``NotShown``."""
        await self._until(lambda: sequence in self.raw[after:], repr(sequence))

    # What a person does -----------------------------------------------------------------------------------------

    def type(self, keys: str) -> None:
        """Press *keys*, of which ``chr(3)`` is Ctrl-C."""
        os.write(self._master, keys.encode())

    def resize(self, lines: int, columns: int) -> None:
        """Pull the window; the kernel sends SIGWINCH."""
        self._screen.resize(lines, columns)
        self._screen.reset()
        self._set_size()

    async def status(self) -> int:
        """Wait until the program has ended, and say how."""
        give_up_at = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            if time.monotonic() > give_up_at:
                raise NotShown(f"the program still runs; its screen:\n{self.text}")
            await asyncio.sleep(0.02)
        if self._master >= 0:
            self._drain()
        return self.process.returncode

    # Private ----------------------------------------------------------------------------------------------------

    async def _until(self, condition: Callable[[], bool], wanted: str) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                while not condition():
                    self._changed.clear()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._changed.wait(), 0.5)
        except TimeoutError:
            raise NotShown(f"{wanted} was not shown, but\n{self.text}") from None

    def _set_size(self) -> None:
        size = struct.pack("HHHH", self._screen.lines, self._screen.columns, 0, 0)
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, size)

    def _drain(self) -> None:
        os.set_blocking(self._master, False)
        with contextlib.suppress(OSError):
            while self._read():
                pass

    def _read(self) -> bool:
        try:
            written = os.read(self._master, 65536)
        except BlockingIOError:
            raise
        except OSError:  # Linux: nobody has the other end any more
            written = b""
        self.raw += written
        self._stream.feed(written)
        self._changed.set()
        return bool(written)


def _own_it() -> None:
    """In the child: this is the terminal whose Ctrl-C it hears."""
    fcntl.ioctl(1, termios.TIOCSCTTY, 0)
