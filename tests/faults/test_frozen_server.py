"""Every process of PostgreSQL is stopped (SIGSTOP): each request is answered within its deadline plus one second.

A frozen server is the worst kind of away: connections are accepted, what is sent is taken, and nobody answers.
"""

from __future__ import annotations

import asyncio
import struct
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from stanch.embedded import EmbeddedPostgres
from tests.faults.served import serving
from tests.faults.subject import Subject, prepare
from tests.support.judge import FreshDatabase, assert_nothing_left, until
from tests.support.proxy import SSL_REQUEST

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.faults.served import Served
    from tests.faults.wire import Reply

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

REQUEST_TIMEOUT = 2.0
SLACK = 1.0
"""Seconds that a reply may be late."""
CROWD = 30
POOL: dict[str, int] = {"pool_size": 5, "max_overflow": 0}
AT_WORK = "SELECT pid FROM pg_stat_activity WHERE datname = $1 AND wait_event = 'PgSleep' AND query ILIKE $2"
IN_TRANSACTION = (
    "SELECT pid FROM pg_stat_activity WHERE application_name = $1 AND state = 'idle in transaction'"
)


@pytest.fixture(scope="module")
def fragile() -> Iterator[EmbeddedPostgres]:
    """A server of this module's own, to be frozen."""
    with EmbeddedPostgres() as server:
        yield server


@pytest.fixture
async def icy(fragile: EmbeddedPostgres, anyio_backend: str) -> AsyncIterator[FreshDatabase]:
    database = await FreshDatabase.create(fragile)
    await prepare(database)
    try:
        yield database
    finally:
        fragile.thaw()
        await database.drop()


@dataclass
class Crowd:
    """Replies, and how long each took."""

    replies: list[Reply] = field(default_factory=list["Reply"])
    took: list[float] = field(default_factory=list[float])

    async def ask(self, served: Served, path: str) -> Reply:
        began = time.monotonic()
        reply = await served.request("POST", path)
        self.took.append(time.monotonic() - began)
        self.replies.append(reply)
        return reply

    async def ask_all(self, served: Served, name: str) -> None:
        await asyncio.gather(*(self.ask(served, f"/entries/{name}-{number}") for number in range(CROWD)))

    @property
    def statuses(self) -> dict[int, int]:
        found = [reply.status for reply in self.replies]
        return {status: found.count(status) for status in sorted(set(found))}

    @property
    def kinds(self) -> set[str]:
        return {reply.json()["type"].removeprefix("urn:stanch:problem:") for reply in self.replies}


async def _freeze(server: EmbeddedPostgres) -> None:
    """Stop it, and see that it is stopped: a connection is accepted, and the first question gets no answer."""
    server.freeze()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(struct.pack("!II", 8, SSL_REQUEST))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.2)
    writer.close()


async def _is_well_again(served: Served, judged: FreshDatabase, server: EmbeddedPostgres) -> None:
    """Nothing is checked out while the server is still frozen; thawed, it serves the very next requests."""
    stats = await served.stats()
    assert (stats["in_use"], stats["waiting"]) == (0, 0)
    server.thaw()
    after = Crowd()
    await after.ask_all(served, "after")
    assert after.statuses == {201: CROWD}
    await assert_nothing_left(judged)
    stats = await served.stats()
    assert (stats["in_use"], stats["waiting"]) == (0, 0)
    assert served.complaints == []


def _subject(icy: FreshDatabase, driver: str, *, cold: bool = False) -> Subject:
    return Subject(url=icy.url(driver), settings=POOL, request_timeout=REQUEST_TIMEOUT, cold=cold)


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
async def test_thirty_requests_on_a_frozen_server_are_answered_within_their_deadline(
    driver: str, cold: bool, fragile: EmbeddedPostgres, icy: FreshDatabase, tmp_path: Path
) -> None:
    """Cold: not even the first connection was open, and whoever opens it keeps nobody else from their answer."""
    async with serving(_subject(icy, driver, cold=cold), tmp_path) as served:
        if not cold:
            before = Crowd()
            await before.ask_all(served, "before")
            assert before.statuses == {201: CROWD}
        assert len(await icy.activity()) == (0 if cold else POOL["pool_size"])
        await _freeze(fragile)
        frozen = Crowd()
        await frozen.ask_all(served, "frozen")
        print(
            f"{driver}, {'cold' if cold else 'warm'}: {frozen.statuses} {frozen.kinds}, "
            f"{min(frozen.took):.2f} to {max(frozen.took):.2f} s"
        )
        assert set(frozen.statuses) <= {503, 504}
        assert max(frozen.took) <= REQUEST_TIMEOUT + SLACK
        await _is_well_again(served, icy, fragile)
        assert await icy.fetchval("SELECT count(*) FROM entries WHERE key LIKE 'frozen%'") == 0


async def test_without_a_request_timeout_the_same_requests_wait_longer(
    driver: str, fragile: EmbeddedPostgres, icy: FreshDatabase, tmp_path: Path
) -> None:
    """The bad subject: each wait has its own limit, and a statement that was sent has none on this side."""
    async with serving(Subject(url=icy.url(driver), settings=POOL), tmp_path) as served:
        before = Crowd()
        await before.ask_all(served, "before")
        await _freeze(fragile)
        frozen = Crowd()
        asking = asyncio.create_task(frozen.ask_all(served, "frozen"))
        done, _ = await asyncio.wait({asking}, timeout=REQUEST_TIMEOUT + SLACK)
        fragile.thaw()
        assert not done
        assert frozen.replies == []
        await asking


async def test_frozen_while_a_statement_runs(
    driver: str, fragile: EmbeddedPostgres, icy: FreshDatabase, tmp_path: Path
) -> None:
    async with serving(_subject(icy, driver), tmp_path) as served:
        frozen = Crowd()
        asking = asyncio.create_task(frozen.ask(served, "/naps/20/frozen"))
        await until(icy, AT_WORK, icy.name, "%")
        await _freeze(fragile)
        await asking
        assert (frozen.statuses, frozen.kinds) == ({504: 1}, {"timeout"})
        assert max(frozen.took) <= REQUEST_TIMEOUT + SLACK
        assert "the 2.00 s of request_timeout passed while a statement was running" in served.log
        await _is_well_again(served, icy, fragile)
        assert await icy.fetchval("SELECT count(*) FROM entries WHERE key = 'frozen'") == 0


async def test_frozen_while_commit_is_on_its_way(
    driver: str, fragile: EmbeddedPostgres, icy: FreshDatabase, tmp_path: Path
) -> None:
    async with serving(_subject(icy, driver), tmp_path) as served:
        frozen = Crowd()
        asking = asyncio.create_task(frozen.ask(served, "/slow/frozen/0.6"))
        await until(icy, AT_WORK, icy.name, "commit%")
        await _freeze(fragile)
        await asking
        assert (frozen.statuses, frozen.kinds) == ({503: 1}, {"commit-outcome-unknown"})
        assert max(frozen.took) <= REQUEST_TIMEOUT + SLACK
        await _is_well_again(served, icy, fragile)


async def test_frozen_before_the_rollback_of_an_error_reply(
    driver: str, fragile: EmbeddedPostgres, icy: FreshDatabase, tmp_path: Path
) -> None:
    """The app's own error reply is the answer; the ROLLBACK that nobody hears of holds it up no longer than that."""
    async with serving(_subject(icy, driver), tmp_path) as served:
        frozen = Crowd()
        asking = asyncio.create_task(frozen.ask(served, "/errors/held/frozen"))
        await until(icy, IN_TRANSACTION, "frozen")
        await _freeze(fragile)
        await served.ask("POST", "/_/open/frozen")
        await asking
        assert frozen.statuses == {422: 1}
        assert max(frozen.took) <= REQUEST_TIMEOUT + SLACK
        assert "ending the session of POST /errors/held/{key} failed: DeadlinePassed" in served.log
        await _is_well_again(served, icy, fragile)
        assert await icy.fetchval("SELECT count(*) FROM entries WHERE key = 'frozen'") == 0
