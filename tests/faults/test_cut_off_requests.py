"""Law 3: a thousand requests are cut off at random points, and nothing of them is left behind."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections import Counter
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import pytest

from tests.faults.served import serving
from tests.faults.subject import Subject
from tests.support.judge import assert_nothing_left

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from tests.faults.served import Served
    from tests.support.judge import FreshDatabase

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

CUTS = 250
"""Requests that are cut off in each of four runs: two drivers, with and without a BaseHTTPMiddleware."""

AT_MOST = 8 * CUTS
"""Requests, those that come through whole among them."""

CLIENTS = 6
POOL_SIZE, MAX_OVERFLOW = 4, 1
PAUSE = 0.003
CALIBRATION = 30
BEYOND = 1.6
"""A cut comes at the latest after so many times what a whole request takes here and now."""

IN_THE_APP = (
    "asyncio.timeout in the handler",
    "asyncio.timeout, unhandled",
    "anyio.move_on_after in the handler",
    "asyncio.timeout around the app",
    "anyio.move_on_after around the app",
    "double cancel around the app",
)
IN_A_STREAM = "hang-up in a stream"
HANG_UPS = ("hang-up", IN_A_STREAM)
WAYS = (*IN_THE_APP, *HANG_UPS)
CUT_OFF = {"cut", "500", "504"}
LAYERS = ("asyncio.timeout", "anyio.move_on_after", "double cancel")
HALVES = "SELECT unit, count(*) AS halves FROM pairs GROUP BY unit HAVING count(*) <> 2"


class Traffic:
    """What the clients did and what came back."""

    def __init__(self, served: Served, chance: random.Random) -> None:
        self._served = served
        self._chance = chance
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.acknowledged: list[str] = []
        self.wrong_answers: list[str] = []

    @property
    def cut(self) -> int:
        """How many were cut off, as far as a client can tell."""
        return sum(count for (_, end), count in self.outcomes.items() if end in CUT_OFF)

    async def run(self, cuts: int) -> None:
        """First learn how long whole requests take here and now, then cut off at random parts of that."""
        paths = ("/pairs/whole-pair-{}", "/streams/whole-stream-{}")
        takes = {path: await self._measure(path) for path in paths}
        print(f"whole requests take {', '.join(f'{seconds * 1e3:.0f} ms' for seconds in takes.values())}")
        plan = [(number, self._chance.choice(WAYS), self._chance.random()) for number in range(AT_MOST)]
        queue = itertools.takewhile(lambda _: self.cut < cuts, plan)

        async def client() -> None:
            for number, way, part in queue:
                if number % 5 == 0:
                    await self._canary(number)
                takes_now = takes[paths[way == IN_A_STREAM]]
                await self._one(f"{number}", way, part * BEYOND * takes_now)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))

    async def _measure(self, path: str) -> float:
        """The median of seconds until the reply is whole, while all clients are at work."""
        durations: list[float] = []
        queue = iter(range(CALIBRATION))

        async def client() -> None:
            for number in queue:
                began = time.monotonic()
                method = "GET" if "stream" in path else "POST"
                reply = await self._served.request(method, f"{path.format(number)}?pause={PAUSE}")
                assert reply.is_success
                durations.append(time.monotonic() - began)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        return statistics.median(durations)

    async def _one(self, key: str, way: str, moment: float) -> None:
        async with self._served.wire() as wire:
            if way in HANG_UPS:
                method, kind = ("GET", "streams") if way == IN_A_STREAM else ("POST", "pairs")
                reply = asyncio.create_task(wire.request(method, f"/{kind}/{key}?pause={PAUSE}"))
                await asyncio.wait({reply}, timeout=moment)
                if not reply.done():
                    self.outcomes[way, "cut"] += 1
                    reply.cancel()
                    await asyncio.wait({reply})
                    wire.hang_up(rudely=self._chance.random() < 0.5)
                    return
                answer = reply.result()
            else:
                wish = urlencode({"cut": way, "after": moment, "pause": PAUSE})
                answer = await wire.request("POST", f"/pairs/{key}?{wish}")
            if answer.is_success:
                self.acknowledged.append(key)
            self.outcomes[way, f"{answer.status}"] += 1

    async def _canary(self, number: int) -> None:
        answer = await self._served.request("GET", f"/nonces/{number}")
        if answer.json() != {"nonce": f"{number}"}:
            self.wrong_answers.append(f"asked for {number}, was told {answer.body!r}")


@pytest.mark.parametrize(
    "outer", [LAYERS, ("BaseHTTPMiddleware", *LAYERS)], ids=["bare", "BaseHTTPMiddleware"]
)
async def test_requests_cut_off_at_random_points_leave_nothing_behind(
    driver: str, outer: tuple[str, ...], judged: FreshDatabase, chance: random.Random, tmp_path: Path
) -> None:
    """Hang-ups, also in streams; timeouts in the handler and around the app; a second cancel while the first works."""
    settings = {"pool_size": POOL_SIZE, "max_overflow": MAX_OVERFLOW, "pool_timeout": 20.0}
    async with serving(Subject(url=judged.url(driver), outer=outer, settings=settings), tmp_path) as served:
        traffic = Traffic(served, chance)
        await traffic.run(CUTS)
        await assert_nothing_left(judged)
        await _quiet(served)
        stats = await served.stats()
        lent = await served.ask("POST", f"/_/lend/{POOL_SIZE + MAX_OVERFLOW}")
        cuts: Counter[str] = Counter(await served.ask("GET", "/_/cuts"))
        await served.ask("POST", "/_/collect")
        await assert_nothing_left(judged)
        backends = await judged.activity()
    cuts += Counter({way: traffic.outcomes[way, "cut"] for way in HANG_UPS})
    total = traffic.outcomes.total()
    print(f"{driver}, {outer}: {traffic.cut} of {total} requests cut off: {dict(cuts)}; {stats}")
    print(f"    {dict(traffic.outcomes)}")
    assert traffic.cut >= CUTS
    assert set(cuts) == set(WAYS), "a way to cut off never happened"
    assert len(traffic.acknowledged) >= total // 20, "all were cut off early: nothing random about that"
    assert (stats["in_use"], stats["waiting"]) == (0, 0)
    assert len(set(lent)) == POOL_SIZE + MAX_OVERFLOW
    assert len(backends) <= POOL_SIZE + MAX_OVERFLOW
    assert traffic.wrong_answers == []
    assert [str(row["unit"]) for row in await judged.fetch(HALVES)] == []
    stored = {row["unit"] for row in await judged.fetch("SELECT DISTINCT unit FROM pairs")}
    assert set(traffic.acknowledged) <= stored
    assert served.complaints == []


async def test_the_commit_after_yield_dependency_stores_halves(
    judged: FreshDatabase, chance: random.Random, tmp_path: Path
) -> None:
    """The run above has teeth: who hung up in a stream, or was told 504, has half of their work stored."""
    subject = Subject(url=judged.url(), wiring="commit after yield", outer=LAYERS)
    async with serving(subject, tmp_path) as served:
        await Traffic(served, chance).run(CUTS // 2)
        await assert_nothing_left(judged)
    halves = await judged.fetch(HALVES)
    print(f"half-written: {len(halves)} of {CUTS // 2} cut off")
    assert halves != []


async def _quiet(served: Served) -> None:
    """Wait until no request is under way: what hung up is still being worked on for a moment."""
    async with asyncio.timeout(10):
        while (stats := await served.stats())["in_use"] or stats["waiting"]:  # noqa: ASYNC110  # the event is in another process
            await asyncio.sleep(0.02)
