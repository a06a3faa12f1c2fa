"""The page in a terminal, until somebody ends it."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from stanch.cli.top.feed import Address, FeedError, Sent
from stanch.cli.top.listen import listen
from stanch.cli.top.screen import Choice, full_screen, glyphs_for
from stanch.cli.top.state import Lost, State
from stanch.cli.top.terminal import TERMINAL_GONE, Terminal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

PAUSES: Final = (0.5, 1.0, 2.0, 5.0)
"""Seconds before each further attempt to reach a feed that was lost; the last one again and again."""


class Top:
    """The page at *address*, drawn on *console* until somebody ends it."""

    def __init__(self, address: Address, headers: Mapping[str, str], console: Console) -> None:
        self._address = address
        self._headers = headers
        self._console = console
        self._state = State()
        self._choice = Choice()
        self._is_stale = asyncio.Event()
        self._mark = ""

    async def run(self) -> int:
        """Draw until a key or a signal ends it. Raises ``FeedError`` where there was no feed in the first place."""
        self._end: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        async with Terminal(
            self._console, pressed=self._press, resized=self._is_stale.set, ended=self._finish
        ) as terminal:
            tasks = {asyncio.create_task(self._follow()), asyncio.create_task(self._draw(terminal))}
            for task in tasks:
                task.add_done_callback(self._over)
            try:
                return await self._end
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)

    async def _follow(self) -> None:
        """Read the feed, and come back to it whenever it ends. Raises ``FeedError`` if the first time fails.

        A feed ends by itself now and then, so that its server can stop; only what is then not there is lost.
        """
        failures = 0

        def told(sent: Sent) -> bool:
            nonlocal failures
            failures = 0
            self._mark = sent.mark
            if not self._choice.is_paused:
                self._is_stale.set()
            return False

        while True:
            try:
                await listen(self._address, self._headers, self._state, mark=self._mark, enough=told)
                await asyncio.sleep(PAUSES[0])
            except FeedError as error:
                if not self._state.databases:
                    raise
                pause = PAUSES[min(failures, len(PAUSES) - 1)]
                failures += 1
                self._state.lost = Lost(error.what, time.monotonic() + pause)
                self._is_stale.set()
                await asyncio.sleep(pause)

    async def _draw(self, terminal: Terminal) -> None:
        while True:
            self._is_stale.clear()
            size = self._console.size
            picture = full_screen(
                self._state,
                self._choice,
                title=f"stanch top {self._address.page}",
                width=size.width,
                height=size.height,
                glyphs=glyphs_for(self._console),
            )
            terminal.draw(picture)
            with suppress(TimeoutError):
                # the seconds until the next attempt are counted down
                async with asyncio.timeout(1.0 if self._state.lost else None):
                    await self._is_stale.wait()

    def _press(self, key: str) -> None:
        if key in "qQ":
            self._finish(0)
        elif key in self._choice.keys:
            self._choice.press(key)
            self._is_stale.set()

    def _finish(self, status: int) -> None:
        if not self._end.done():
            self._end.set_result(status)

    def _over(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if isinstance(error, OSError):
            self._finish(TERMINAL_GONE)
        elif error is not None and not self._end.done():
            self._end.set_exception(error)
