"""Law 1, as a client sees it: what was acknowledged can be read, at once, by anybody."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.faults.served import serving
from tests.faults.subject import Subject
from tests.support.judge import assert_nothing_left

if TYPE_CHECKING:
    from pathlib import Path

    from tests.faults.subject import Wiring
    from tests.support.judge import FreshDatabase

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

PAIRS = 500
"""On each of two drivers."""
PAIRS_OF_THE_BAD_SUBJECT = 100
CLIENTS = 10
SLOW_COMMIT = 0.03
"""Seconds that COMMIT takes on the server, as with a standby that has to confirm it."""


async def _misses(wiring: Wiring, driver: str, pairs: int, judged: FreshDatabase, folder: Path) -> int:
    """How often a GET does not find what a POST has just acknowledged, on another connection of another client."""
    misses = 0
    async with serving(Subject(url=judged.url(driver), wiring=wiring), folder) as served:
        queue = iter(range(pairs))

        async def client() -> None:
            nonlocal misses
            async with served.wire() as writer, served.wire() as reader:
                for number in queue:
                    written = await writer.request("POST", f"/entries/{number}?slow={SLOW_COMMIT}")
                    assert written.status == 201
                    read = await reader.request("GET", f"/entries/{number}")
                    assert read.status in {200, 404}
                    misses += read.status == 404

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        await assert_nothing_left(judged)
    assert await judged.fetchval("SELECT count(*) FROM entries WHERE key <> 'taken'") == pairs
    print(f"{wiring} on {driver}: {misses} of {pairs} reads missed the write acknowledged just before")
    return misses


async def test_every_acknowledged_write_is_read_by_the_next_request(
    driver: str, judged: FreshDatabase, tmp_path: Path
) -> None:
    assert await _misses("stanch", driver, PAIRS, judged, tmp_path) == 0


async def test_the_commit_after_yield_dependency_acknowledges_what_cannot_be_read_yet(
    judged: FreshDatabase, tmp_path: Path
) -> None:
    """The run above has teeth: the reply leaves before COMMIT does."""
    missed = await _misses("commit after yield", "asyncpg", PAIRS_OF_THE_BAD_SUBJECT, judged, tmp_path)
    assert missed > 0
