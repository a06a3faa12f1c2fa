"""What goes wrong with the database while the traffic runs; both shops stand on the same server."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Final

from stanch.embedded import EmbeddedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from stanch.embedded import EmbeddedPostgres

COMES_BACK: Final = 20.0
"""Seconds that the server may take to be back after a fault."""

LOOK_AGAIN: Final = 0.05
FIRST: Final = 0.25
LAST: Final = 0.85
"""Faults happen between these parts of a run; before and after them nothing goes wrong."""

EVERY: Final = 6.0
"""Seconds from one fault to the next, about."""

CALM: Final = 1.5
"""Seconds after a recovery in which nothing goes wrong, so that there is traffic to hit."""

STATISTICS_SINCE: Final = "SELECT stats_reset FROM pg_stat_bgwriter"
"""A crash throws the statistics away, so this tells crashes apart (PostgreSQL manual, *Statistics Collection*)."""

STARTED_AT: Final = "SELECT pg_postmaster_start_time()"


class Faults:
    """Kills backends and restarts the server, by a seeded timetable. It counts only what the server bears out."""

    def __init__(self, postgres: EmbeddedPostgres, *, seed: int, seconds: float) -> None:
        self._postgres = postgres
        self._dice = random.Random(seed)
        self._seconds = seconds
        self.kills = 0
        self.restarts = 0
        self.last = "none yet"

    async def run(self) -> None:
        """Kill, restart, kill, kill …, spread over the run; the first two in any case, the others if there is time."""
        start = time.monotonic()
        number = max(2, round(self._seconds / EVERY))
        for turn in range(number):
            part = (turn + self._dice.uniform(0.0, 0.8)) / number
            due = start + self._seconds * (FIRST + (LAST - FIRST) * part)
            await asyncio.sleep(max(due - time.monotonic(), CALM if turn else 0.0))
            if turn > 1 and time.monotonic() > start + self._seconds * LAST:
                return
            await asyncio.to_thread(self._restart if turn == 1 else self._kill)

    def _kill(self) -> None:
        before = self._ask(STATISTICS_SINCE)
        victim = self._kill_one()
        self._tell(f"kill -9 of backend {victim}; PostgreSQL recovers")
        self._wait_until(lambda: self._ask(STATISTICS_SINCE) != before)
        self.kills += 1
        self._tell(f"kill -9 of backend {victim}; PostgreSQL is back")

    def _kill_one(self) -> int:
        """Kill a backend that serves a shop at this moment, whichever comes first to hand."""
        give_up_at = time.monotonic() + COMES_BACK
        while time.monotonic() < give_up_at:
            if pids := self._postgres.backend_pids():
                victim = self._dice.choice(pids)
                try:
                    self._postgres.kill_backend(victim)
                except EmbeddedError:
                    continue  # it ended in this very moment
                return victim
            time.sleep(LOOK_AGAIN)
        raise EmbeddedError(f"no shop had a connection for {COMES_BACK:.0f} s")

    def _restart(self) -> None:
        before = self._ask(STARTED_AT)
        self._tell("PostgreSQL restarts")
        self._postgres.restart()
        self.restarts += self._ask(STARTED_AT) != before
        self._tell("PostgreSQL has restarted")

    def _ask(self, statement: str) -> str:
        return self._postgres.sql(statement)[0][0]

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        give_up_at = time.monotonic() + COMES_BACK
        while time.monotonic() < give_up_at and self._postgres.is_running:
            try:
                if condition():
                    return
            except EmbeddedError:
                pass  # it does not accept connections yet
            time.sleep(LOOK_AGAIN)
        raise EmbeddedError(f"the server was not back {COMES_BACK:.0f} s after the kill")

    def _tell(self, what: str) -> None:
        self.last = what
