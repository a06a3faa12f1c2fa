"""Law 2: an error reply leaves nothing behind, however the error came about."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from tests.faults.served import serving
from tests.faults.subject import Subject
from tests.support.judge import assert_nothing_left

if TYPE_CHECKING:
    from pathlib import Path

    from tests.faults.subject import Wiring
    from tests.support.judge import FreshDatabase

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

STATUS_OF = {"status": 409, "returned": 400, "raised": 422, "invalid": 500}
"""The ways to fail: the status set, a response returned, raised, a response that fails its own validation."""

OF_EACH = 10


async def _rows_left(wiring: Wiring, driver: str, judged: FreshDatabase, folder: Path) -> Counter[str]:
    """How many rows each way to fail has left, of ten; a control that succeeds must leave its own."""
    async with serving(Subject(url=judged.url(driver), wiring=wiring), folder) as served:
        assert (await served.request("POST", "/entries/control")).status == 201
        for way, status in STATUS_OF.items():
            for number in range(OF_EACH):
                reply = await served.request("POST", f"/errors/{way}/{way}-{number}")
                assert reply.status == status, (way, reply)
        await assert_nothing_left(judged)
    left = {row["key"] for row in await judged.fetch("SELECT key FROM entries")} - {"taken"}
    assert "control" in left
    counts = Counter(key.partition("-")[0] for key in left - {"control"})
    print(f"{wiring} on {driver}: {counts.total()} of {len(STATUS_OF) * OF_EACH} left a row: {dict(counts)}")
    return counts


async def test_an_error_reply_leaves_no_row(driver: str, judged: FreshDatabase, tmp_path: Path) -> None:
    assert await _rows_left("stanch", driver, judged, tmp_path) == Counter()


async def test_error_replies_of_the_commit_after_yield_dependency_leave_rows(
    judged: FreshDatabase, tmp_path: Path
) -> None:
    """The run above has teeth: to a dependency, an error that is returned looks like success."""
    left = await _rows_left("commit after yield", "asyncpg", judged, tmp_path)
    assert left["status"] == left["returned"] == OF_EACH
