"""The judge: holds what the clients were told against what the database says, over a connection of its own.

It asks through ``psql``: no driver, pool or process of a shop takes part in its verdict.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from statistics import quantiles
from typing import TYPE_CHECKING, Final
from uuid import UUID

import httpx

from stanch.demo.journal import ERRORS, REPLIES, Journal, Kind, Outcome
from stanch.demo.probes import HOLD

if TYPE_CHECKING:
    from stanch.embedded import EmbeddedPostgres

BECOMES_QUIET: Final = 6.0
"""Seconds after the last client has left; longer than a pool waits for a connection."""

HOLD_SECONDS: Final = 1.5
LOOK_AGAIN: Final = 0.1

ORDERS: Final = "SELECT id FROM orders"
HALF_WRITTEN: Final = """
    SELECT count(*) FROM orders FULL JOIN movements ON orders.id = movements.order_id
    WHERE orders.id IS NULL OR movements.order_id IS NULL
"""
BACKENDS: Final = """
    SELECT coalesce(state, ''), coalesce(wait_event, '') FROM pg_stat_activity
    WHERE datname = current_database() AND backend_type = 'client backend' AND application_name <> 'psql'
"""
"""All that a shop has opened; the judge's own last question may still be hanging up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What the database says about one shop, after the traffic."""

    stored: frozenset[UUID]
    half_written: int
    idle_in_transaction: int
    leaked: int


class Judge:
    """Reads the truth about one shop from its database.

    *pool_size* is all the connections that the shop may have, *patience* how many seconds it gets to return them.
    """

    def __init__(
        self,
        postgres: EmbeddedPostgres,
        database: str,
        *,
        pool_size: int,
        patience: float = BECOMES_QUIET,
    ) -> None:
        self._postgres = postgres
        self._database = database
        self._pool_size = pool_size
        self._patience = patience

    async def look(self, shop_url: str) -> Findings:
        """Wait, bounded, until the shop is quiet, then look at everything.

        A connection has leaked if, with no client left, it does something or is one too many, or if the shop at
        *shop_url* cannot use as many connections at once as its pool has.
        """
        states = await self._when_quiet()
        busy = [state for state, _ in states if state != "idle"]
        not_back = len(busy) + max(0, len(states) - self._pool_size)
        unusable = self._pool_size - await self._used_at_once(shop_url)
        return Findings(
            stored=frozenset(UUID(identity) for (identity,) in await self._ask(ORDERS)),
            half_written=int((await self._ask(HALF_WRITTEN))[0][0]),
            idle_in_transaction=sum(state.startswith("idle in transaction") for state in busy),
            leaked=max(not_back, unusable),
        )

    async def _when_quiet(self) -> list[tuple[str, ...]]:
        give_up_at = time.monotonic() + self._patience
        while True:
            states = await self._states()
            quiet = len(states) <= self._pool_size and all(state == "idle" for state, _ in states)
            if quiet or time.monotonic() > give_up_at:
                return states
            await asyncio.sleep(LOOK_AGAIN)

    async def _used_at_once(self, shop_url: str) -> int:
        """How many connections the shop can have busy at the same moment, as the server sees them."""
        most = 0
        async with httpx.AsyncClient(base_url=shop_url, timeout=4 * HOLD_SECONDS, trust_env=False) as client:
            asking = [
                asyncio.create_task(client.get(HOLD, params={"seconds": HOLD_SECONDS}))
                for _ in range(self._pool_size)
            ]
            while most < self._pool_size and not all(task.done() for task in asking):
                sleeping = sum(event == "PgSleep" for _, event in await self._states())
                most = max(most, sleeping)
                await asyncio.sleep(LOOK_AGAIN)
            await asyncio.gather(*asking, return_exceptions=True)
        return most

    async def _states(self) -> list[tuple[str, ...]]:
        return await self._ask(BACKENDS)

    async def _ask(self, statement: str) -> list[tuple[str, ...]]:
        return await asyncio.to_thread(self._postgres.sql, statement, self._database)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was promised, and what of it was not kept."""

    answered: int
    acknowledged: int
    missing: int
    error_replies: int
    left_rows: int
    ways_to_fail: int
    """Of the four ways in which a handler can end in an error after it has written: how many were answered."""
    failing_commits: int
    failing_commits_acknowledged: int
    swallowed: int
    swallowed_acknowledged: int
    pairs: int
    misses: int
    hang_ups: int
    half_written: int
    streams: int
    unknown: int
    leaked: int
    idle_in_transaction: int
    median: float
    slowest: float
    """The 99th percentile; both in seconds, over orders and reads that were answered 2xx."""

    @property
    def broken(self) -> list[str]:
        """The promises that were broken."""
        must_be_zero = {
            "acknowledged writes are missing": self.missing,
            "error replies left rows behind": self.left_rows,
            "commits that failed were acknowledged": self.failing_commits_acknowledged,
            "swallowed errors were acknowledged": self.swallowed_acknowledged,
            "acknowledged writes could not be read": self.misses,
            "orders are half-written": self.half_written,
            "connections leaked": self.leaked,
            "connections are idle in transaction": self.idle_in_transaction,
        }
        return [promise for promise, number in must_be_zero.items() if number]

    @property
    def untested(self) -> list[str]:
        """What a run must have seen to prove anything, and this one did not."""
        seen = {
            "acknowledged writes": self.acknowledged,
            "handlers that end in an error": self.ways_to_fail == len(ERRORS),
            "commits that fail": self.failing_commits,
            "swallowed errors": self.swallowed,
            "write-then-read pairs": self.pairs,
            "hang-ups": self.hang_ups,
            "streams": self.streams,
        }
        return [name for name, number in seen.items() if not number]


def judge(journal: Journal, findings: Findings) -> Verdict:
    """Hold what the clients were told against what was found.

    An error reply promises that nothing was stored, unless it says itself that the outcome is unknown. Of a
    request without a reply nothing was promised.
    """
    stored = findings.stored
    told = [entry for entry in journal if entry.wrote is not None]
    acknowledged = [entry for entry in told if entry.outcome is Outcome.SUCCESS]
    refused = [entry for entry in told if entry.outcome is Outcome.ERROR]
    lost = [entry for entry in acknowledged if entry.wrote not in stored]
    answered = [entry for entry in told if entry.outcome in REPLIES]
    pairs = [entry for entry in told if entry.found is not None]
    times = [
        entry.seconds
        for entry in journal
        if entry.outcome is Outcome.SUCCESS and entry.kind in (Kind.ORDER, Kind.PAIR, Kind.READ)
    ]
    cuts = quantiles(times, n=100) if len(times) > 1 else [0.0] * 99
    return Verdict(
        answered=sum(entry.outcome in REPLIES for entry in journal),
        acknowledged=len(acknowledged),
        missing=len(lost),
        error_replies=len(refused),
        left_rows=sum(entry.wrote in stored for entry in refused),
        ways_to_fail=len({entry.kind for entry in refused} & ERRORS),
        failing_commits=sum(entry.kind is Kind.FAILING_COMMIT for entry in answered),
        failing_commits_acknowledged=sum(entry.kind is Kind.FAILING_COMMIT for entry in lost),
        swallowed=sum(entry.kind is Kind.SWALLOWED for entry in answered),
        swallowed_acknowledged=sum(entry.kind is Kind.SWALLOWED for entry in lost),
        pairs=len(pairs),
        misses=sum(entry.found is False for entry in pairs),
        hang_ups=sum(entry.outcome is Outcome.HUNG_UP for entry in journal),
        half_written=findings.half_written,
        streams=sum(entry.kind is Kind.STREAM and entry.outcome is Outcome.SUCCESS for entry in journal),
        unknown=sum(entry.outcome is Outcome.UNKNOWN for entry in journal),
        leaked=findings.leaked,
        idle_in_transaction=findings.idle_in_transaction,
        median=cuts[49],
        slowest=cuts[98],
    )
