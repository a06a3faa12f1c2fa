"""A dashboard's feed that says what a test wants it to say, when the test wants it."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from stanch.ledger import Stats
from stanch.measuring import Distribution, Holding, Leak, RouteTotals, Snapshot, StatementTotals

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PATIENCE = 25.0
NOON = 1_800_000_000.0
HOLDING = Holding(
    "GET /report",
    "reports.py:50 in build()",
    "reports.py:51 in build()",
    61.2,
    0.014,
    3,
    "in use, no SQL running",
)
ROUTE = RouteTotals(
    "GET /orders", units=40, statements=120, sql_time=0.5, waited=0.1, held=9.0, rolled_back=2, repeated=7
)
STATEMENT = StatementTotals(
    "SELECT * FROM orders WHERE id = ?",
    count=90,
    total=3.0,
    longest=0.2,
    errors=1,
    place="orders.py:9 in read()",
)
LEAK = Leak(
    NOON,
    "POST /exports",
    "exports.py:7 in begin()",
    "its task is gone",
    "its task is gone",
    5.0,
    returned=False,
)


def distribution(*seconds_in_bucket: int) -> Distribution:
    """So many in the first, the second … bucket."""
    buckets = (*seconds_in_bucket, *(0 for _ in range(17 - len(seconds_in_bucket))))
    return Distribution(sum(buckets), 0.01 * sum(buckets), buckets)


def snapshot(database: str = "main", **numbers: Any) -> Snapshot:
    """Numbers of one database; *numbers* replaces some."""
    defaults: dict[str, Any] = {
        "pid": 4711,
        "at": NOON,
        "started": NOON - 90,
        "stats": Stats(pool_size=15, max_overflow=5, in_use=18, idle=1, waiting=7),
        "holders": (HOLDING,),
        "waits": distribution(5, 0, 0, 3),
        "uses": distribution(0, 0, 0, 0, 0, 7),
        "creates": distribution(0, 0, 0, 4),
        "wait_ends": {"served": 8, "timeout": 0, "refused": 0, "unavailable": 0, "cancelled": 0},
        "routes": (ROUTE,),
        "statements": (STATEMENT,),
        "leaks": (LEAK,),
        "unit_ends": {"committed": 40, "rolled back": 2, "read": 9, "unknown": 0},
        "event_counts": {"ConnectionLeaked": 1, "WorkDropped": 0},
    }
    return Snapshot(database=database, **(defaults | numbers))


def message(*snapshots: Snapshot, run: str = "4711-1", samples: int = 30) -> dict[str, Any]:
    """A ``snapshot`` message about *snapshots*, each with so many *samples*."""
    columns: dict[str, Any] = {
        each.database: {
            "number": list(range(1, samples + 1)),
            "at": [NOON + number for number in range(samples)],
            "in_use": [each.stats.in_use] * samples,
            "idle": [each.stats.idle] * samples,
            "waiting": [each.stats.waiting] * samples,
            "bound": [each.stats.bound] * samples,
        }
        for each in snapshots
    }
    recent = {"waits": distribution(2), "uses": distribution(0, 0, 2)}
    lately = {
        name: {"count": each.count, "total": each.total, "buckets": list(each.buckets)}
        for name, each in recent.items()
    }
    return {
        "worker": {"run": run, "pid": 4711, "since": NOON, "at": NOON},
        "databases": [each.as_dict() | {"recent": lately} for each in snapshots],
        "samples": columns,
    }


def happening(number: int, text: str, level: str = "WARNING") -> dict[str, Any]:
    """A ``happening`` message."""
    return {
        "database": "main",
        "number": number,
        "at": NOON + number,
        "kind": "WorkDropped",
        "level": level,
        "text": text,
        "facts": {},
    }


class FakeFeed:
    """The app. What it is told is sent to all who listen, and to those who come later."""

    def __init__(self) -> None:
        self.app = Starlette(routes=[Route("/_stanch/feed", self._feed), Route("/page", self._page)])
        self.reply: Response | None = None
        """If set, the answer to whoever comes."""
        self.asked: list[Request] = []
        self._comes = asyncio.Condition()
        self._told: list[bytes] = []
        self._listeners: set[asyncio.Queue[bytes]] = set()

    def tell(self, payload: dict[str, Any], kind: str = "snapshot", *, mark: str = "4711-1.1.0") -> None:
        """Send one event."""
        self.write(f"id: {mark}\nevent: {kind}\ndata: {json.dumps(payload)}\n\n".encode())

    def write(self, raw: bytes) -> None:
        """Send *raw* as it is."""
        self._told.append(raw)
        for listener in self._listeners:
            listener.put_nowait(raw)

    def end(self) -> None:
        """End all streams."""
        for listener in self._listeners:
            listener.put_nowait(b"")

    async def until_asked(self, times: int) -> None:
        """Wait until somebody has come so many *times*."""
        async with asyncio.timeout(PATIENCE), self._comes:
            await self._comes.wait_for(lambda: len(self.asked) >= times)

    def forget(self) -> None:
        """Who comes from now on is told nothing of before."""
        self._told.clear()

    async def _feed(self, request: Request) -> Response:
        async with self._comes:
            self.asked.append(request)
            self._comes.notify_all()
        return self.reply or StreamingResponse(self._stream(), media_type="text/event-stream")

    async def _page(self, _request: Request) -> Response:
        return PlainTextResponse("a page of something else")

    async def _stream(self) -> AsyncIterator[bytes]:
        listener: asyncio.Queue[bytes] = asyncio.Queue()
        for told in self._told:
            listener.put_nowait(told)
        self._listeners.add(listener)
        try:
            yield b"retry: 1000\n\n"
            while told := await listener.get():
                yield told
        finally:
            self._listeners.discard(listener)
