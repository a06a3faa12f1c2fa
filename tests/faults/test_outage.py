"""The server freezes, restarts, goes away, or has no room; the app says so in time, and recovers by itself."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from stanch.embedded import EmbeddedPostgres
from tests.faults.served import serving
from tests.faults.subject import Subject, prepare
from tests.support.judge import FreshDatabase, assert_nothing_left, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.faults.served import Served
    from tests.faults.wire import Reply

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

POOL_SIZE = 3
TIMEOUT = 1.0
"""Seconds for each of the app's deadlines: connect, ping, COMMIT, close, pool wait."""

PATIENCE = 8 * TIMEOUT
"""Seconds in which every request must be answered, whatever the server does."""

SETTINGS = {
    "pool_size": POOL_SIZE,
    "max_overflow": 0,
    "pool_timeout": TIMEOUT,
    "pool_pre_ping": True,
    "connect_timeout": TIMEOUT,
    "commit_timeout": TIMEOUT,
    "close_timeout": TIMEOUT,
}
AT_WORK = "SELECT pid FROM pg_stat_activity WHERE datname = $1 AND wait_event = 'PgSleep' AND query ILIKE $2"


@pytest.fixture(scope="module")
def fragile() -> Iterator[EmbeddedPostgres]:
    """A server of this module's own, to be frozen and stopped."""
    with EmbeddedPostgres(durable=True) as server:
        yield server


@pytest.fixture
async def broken(fragile: EmbeddedPostgres, anyio_backend: str) -> AsyncIterator[FreshDatabase]:
    """A database on the server that will suffer; the judge comes back after each crash."""
    database = await FreshDatabase.create(fragile)
    await prepare(database)
    yield database
    fragile.thaw()
    if not fragile.is_running:
        fragile.start()
    await database.drop()


class Answers:
    """Replies and how long they took."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.acknowledged: list[str] = []
        self.slowest = 0.0

    async def write(self, served: Served, key: str, path: str | None = None) -> Reply:
        began = time.monotonic()
        reply = await served.request("POST", path or f"/entries/{key}")
        self.slowest = max(self.slowest, time.monotonic() - began)
        self.replies.append(reply)
        if reply.is_success:
            self.acknowledged.append(key)
        return reply

    @property
    def statuses(self) -> Counter[int]:
        return Counter(reply.status for reply in self.replies)

    async def all_stored(self, judged: FreshDatabase) -> bool:
        stored = {row["key"] for row in await judged.fetch("SELECT key FROM entries")}
        return set(self.acknowledged) <= stored


async def _recovers(served: Served, judged: FreshDatabase, answers: Answers, name: str) -> float:
    """Write until it succeeds; the seconds that took, and afterwards nothing may be left."""
    began = time.monotonic()
    async with asyncio.timeout(PATIENCE):
        number = 0
        while not (await answers.write(served, f"{name}-{number}")).is_success:
            number += 1
    took = time.monotonic() - began
    await assert_nothing_left(judged)
    stats = await served.stats()
    assert (stats["in_use"], stats["waiting"]) == (0, 0)
    assert len(set(await served.ask("POST", f"/_/lend/{POOL_SIZE}"))) == POOL_SIZE
    assert await answers.all_stored(judged)
    assert served.complaints == []
    return took


async def test_a_frozen_server_is_answered_for_in_time(
    driver: str, fragile: EmbeddedPostgres, broken: FreshDatabase, tmp_path: Path
) -> None:
    """Warm connections, new connections and a COMMIT under way: nobody waits for the thaw."""
    async with serving(Subject(url=broken.url(driver), settings=SETTINGS), tmp_path) as served:
        before = Answers()
        await asyncio.gather(*(before.write(served, f"before-{number}") for number in range(POOL_SIZE)))
        assert set(before.statuses) == {201}
        frozen = Answers()
        committing = asyncio.create_task(frozen.write(served, "committing", "/slow/committing/0.5"))
        await until(broken, AT_WORK, broken.name, "commit%")
        fragile.freeze()
        await asyncio.gather(*(frozen.write(served, f"frozen-{number}") for number in range(2 * POOL_SIZE)))
        await committing
        fragile.thaw()
        took = await _recovers(served, broken, before, "thawed")
        print(
            f"{driver}: frozen {dict(frozen.statuses)}, slowest {frozen.slowest:.2f} s; recovered in {took:.2f} s"
        )
    assert set(frozen.statuses) <= {503, 504}
    assert frozen.slowest < PATIENCE
    assert [reply.json()["type"] for reply in frozen.replies].count(
        "urn:stanch:problem:commit-outcome-unknown"
    ) == 1


@pytest.mark.parametrize("how", ["fast", "crash"])
async def test_a_restarted_server_costs_only_the_requests_of_that_moment(
    driver: str, how: str, fragile: EmbeddedPostgres, broken: FreshDatabase, tmp_path: Path
) -> None:
    """Under load: every reply is a success or a 503, every success is stored, and it goes on by itself."""
    settings = SETTINGS | {"pool_pre_ping": False}
    async with serving(Subject(url=broken.url(driver), settings=settings), tmp_path) as served:
        answers = Answers()
        stop = asyncio.Event()

        async def client(name: int) -> None:
            number = 0
            while not stop.is_set() and number < 2000:
                await answers.write(served, f"{name}-{number}")
                number += 1

        clients = [asyncio.create_task(client(name)) for name in range(4)]
        await until(broken, "SELECT 1 FROM entries HAVING count(*) > 50")
        began = await broken.fetchval("SELECT clock_timestamp()")
        if how == "fast":
            await asyncio.to_thread(fragile.restart)
        else:
            await asyncio.to_thread(fragile.crash)
            await asyncio.to_thread(fragile.start)
        enough = len(answers.acknowledged) + 50
        async with asyncio.timeout(PATIENCE):
            while len(answers.acknowledged) < enough:  # noqa: ASYNC110  # the clients report to nobody
                await asyncio.sleep(0.02)
        stop.set()
        await asyncio.gather(*clients)
        after = dict(answers.statuses)
        took = await _recovers(served, broken, answers, "restarted")
        print(f"{driver}, {how}: {after}, slowest {answers.slowest:.2f} s; then a write in {took:.3f} s")
        assert await broken.fetchval("SELECT pg_postmaster_start_time() > $1", began), "it did restart"
    # It may meet none of the four in a transaction, and be over before one has waited too long.
    assert set(answers.statuses) <= {201, 503}, "every reply is a success or says that the database is away"


async def test_an_idle_pool_survives_a_restart_without_one_failure(
    driver: str, fragile: EmbeddedPostgres, broken: FreshDatabase, tmp_path: Path
) -> None:
    """Also without pool_pre_ping: a connection that the server has closed is seen before it is lent."""
    settings = SETTINGS | {"pool_pre_ping": False}
    async with serving(Subject(url=broken.url(driver), settings=settings), tmp_path) as served:
        answers = Answers()
        await asyncio.gather(*(answers.write(served, f"before-{number}") for number in range(POOL_SIZE)))
        await asyncio.to_thread(fragile.restart)
        await asyncio.gather(*(answers.write(served, f"after-{number}") for number in range(20)))
        await _recovers(served, broken, answers, "restarted")
    print(f"{driver}: {dict(answers.statuses)}")
    assert set(answers.statuses) == {201}


async def test_a_refused_connection_is_a_503_until_the_server_is_back(
    driver: str, fragile: EmbeddedPostgres, broken: FreshDatabase, tmp_path: Path
) -> None:
    async with serving(Subject(url=broken.url(driver), settings=SETTINGS), tmp_path) as served:
        before, refused = Answers(), Answers()
        await before.write(served, "before")
        await asyncio.to_thread(fragile.crash)
        await asyncio.gather(*(refused.write(served, f"refused-{number}") for number in range(2 * POOL_SIZE)))
        await asyncio.to_thread(fragile.start)
        took = await _recovers(served, broken, before, "back")
    print(f"{driver}: {dict(refused.statuses)}, slowest {refused.slowest:.2f} s; recovered in {took:.2f} s")
    assert set(refused.statuses) == {503}
    assert all("retry-after" in reply.headers for reply in refused.replies)


async def test_a_full_pool_is_a_503_with_retry_after(
    driver: str, judged: FreshDatabase, tmp_path: Path
) -> None:
    async with serving(Subject(url=judged.url(driver), settings=SETTINGS), tmp_path) as served:
        answers = Answers()
        naps = [
            asyncio.create_task(answers.write(served, f"nap-{number}", f"/naps/{TIMEOUT * 2}/nap-{number}"))
            for number in range(POOL_SIZE)
        ]
        await until(
            judged, f"SELECT 1 WHERE (SELECT count(*) FROM ({AT_WORK}) naps) = {POOL_SIZE}", judged.name, "%"
        )
        late = Answers()
        await asyncio.gather(*(late.write(served, f"late-{number}") for number in range(POOL_SIZE)))
        await asyncio.gather(*naps)
        await _recovers(served, judged, answers, "after")
    print(
        f"{driver}: {dict(late.statuses)} after {late.slowest:.2f} s; those who held: {dict(answers.statuses)}"
    )
    assert set(late.statuses) == {503}
    assert all(int(reply.headers["retry-after"]) > 0 for reply in late.replies)
    assert set(answers.statuses) == {201}


async def test_sigterm_lets_work_under_way_finish_and_closes_every_connection(
    driver: str, judged: FreshDatabase, tmp_path: Path
) -> None:
    async with serving(Subject(url=judged.url(driver), settings=SETTINGS), tmp_path) as served:
        answers = Answers()
        naps = [
            asyncio.create_task(answers.write(served, f"nap-{number}", f"/naps/1/nap-{number}"))
            for number in range(POOL_SIZE)
        ]
        await until(
            judged, f"SELECT 1 WHERE (SELECT count(*) FROM ({AT_WORK}) naps) = {POOL_SIZE}", judged.name, "%"
        )
        status = await served.terminate()
        await asyncio.gather(*naps)
        backends = await judged.activity()
    print(f"{driver}: exit {status}, {dict(answers.statuses)}, {len(backends)} backends left")
    assert status in {0, -signal.SIGTERM}
    assert answers.statuses == {201: POOL_SIZE}
    assert await answers.all_stored(judged)
    assert backends == []
    assert served.complaints == []
