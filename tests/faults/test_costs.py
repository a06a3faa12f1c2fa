"""Law 12: what is not used costs nothing. Round trips are counted on the wire, work in instructions, not in seconds."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from typing import TYPE_CHECKING, Final

import pytest

from tests.faults.drive_endpoint import ASGI, FEW, KINDS, MANY, PROTOCOLS, SERVERS
from tests.faults.served import ROOT, serving
from tests.faults.subject import Subject
from tests.support.judge import until
from tests.support.optional import needs, path_of
from tests.support.proxy import FaultProxy

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.judge import FreshDatabase

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

VALGRIND_TIMEOUT: Final = 900
"""For one program; it takes a quarter of a minute on a machine that does nothing else."""


CALLS = 5
WARMING = 7
"""Calls before it counts: psycopg prepares a statement at the sixth time."""

ROUND_TRIPS: Final = {
    ("a session that is not used", "GET", "/idle"): 0,
    ("a read by SessionDep", "POST", "/mixed/read/x{}"): 3,
    ("a read by ReaderDep", "GET", "/nonces/x{}"): 1,
    ("a write", "POST", "/entries/x{}"): 3,
}
"""BEGIN, the statement, COMMIT or ROLLBACK; the statement alone by a reader; and nothing at all for nothing."""


NOBODY = """
    SELECT 1 WHERE NOT EXISTS (
        SELECT FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend' AND pid <> pg_backend_pid()
    )
"""


async def test_round_trips_are_those_of_the_transaction(
    driver: str, judged: FreshDatabase, tmp_path: Path
) -> None:
    found: dict[tuple[str, str, str], float] = {}
    async with (
        FaultProxy(judged.server.port) as proxy,
        serving(Subject(url=proxy.through(judged.url(driver))), tmp_path) as served,
    ):
        for what in ROUND_TRIPS:
            _, method, path = what
            for number in range(WARMING + CALLS):
                if number == WARMING:
                    proxy.forget()
                assert (await served.request(method, path.format(number))).is_success
            found[what] = proxy.round_trips / CALLS
            assert proxy.connections == 0
    print(f"{driver}: {found}")
    assert found == ROUND_TRIPS


async def test_a_session_that_is_not_used_opens_no_connection(
    driver: str, judged: FreshDatabase, tmp_path: Path
) -> None:
    async with serving(Subject(url=judged.url(driver)), tmp_path) as served:
        for row in await judged.activity():  # the one from the start of the app
            await judged.execute(f"SELECT pg_terminate_backend({row['pid']})")
        await until(judged, NOBODY, judged.name)
        for _ in range(CALLS):
            assert (await served.request("GET", "/idle")).status == 200
        assert await judged.activity() == []


ENVIRONMENT: Final = {
    **{name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ},
    "PYTHONHASHSEED": "0",
}
"""Nothing else: where Python's objects lie in memory, and so how its caches collide, depends on every variable."""


async def _valgrind(*arguments: str, **more: str) -> str:
    """What valgrind says when it runs Python with the last of *arguments*; the same hashes every time."""
    return await _run(path_of("valgrind"), *arguments, **more)


async def _run(*arguments: str, **more: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *arguments,
        cwd=ROOT,
        env={**ENVIRONMENT, **more},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        said, _ = await asyncio.wait_for(process.communicate(), VALGRIND_TIMEOUT)
    except BaseException:
        process.kill()
        raise
    assert process.returncode == 0, said.decode()[-2000:]
    return said.decode()


async def _instructions_per_call(kind: str, way: str, folder: Path) -> float:
    folder = folder / f"{kind}-{way}"
    folder.mkdir()
    file = f"--callgrind-out-file={folder}/calls"
    drive = (sys.executable, "-m", "tests.faults.drive_endpoint", kind, way)
    await _valgrind("--tool=callgrind", "--instr-atstart=no", file, *drive)
    totals: dict[int, int] = {}
    for dump in folder.glob("calls.*"):
        text = dump.read_text()
        if named := re.search(rf"Trigger: dump {kind}-{way}-(\d+)", text):
            counted = re.search(r"^totals: (\d+)", text, re.MULTILINE)
            assert counted
            totals[int(named[1])] = int(counted[1])
    return (totals[MANY] - totals[FEW]) / (MANY - FEW)


async def _more_with_stanch(way: str, folder: Path) -> float:
    async with asyncio.TaskGroup() as both:
        runs = [both.create_task(_instructions_per_call(kind, way, folder)) for kind in KINDS]
    bare, installed = (run.result() for run in runs)
    more = installed / bare - 1
    print(f"instructions per call by {way}: {bare:.0f} bare, {installed:.0f} installed, {more:+.2%}")
    return more


@needs("valgrind")
@pytest.mark.long
@pytest.mark.timeout((1 + len(SERVERS)) * VALGRIND_TIMEOUT + 60)
async def test_an_endpoint_without_a_session_costs_at_most_two_percent_more(tmp_path: Path) -> None:
    """By each HTTP protocol of uvicorn that is installed; and raw, by ASGI calls without a server.

    The promise is about an endpoint that is served. A server does more than dilute: it holds the scope, so
    that whatever makes a circle with it is left to the garbage collector, which raw calls do not show. These
    in turn are the strictest view of our own part, and guard it: a coroutine that does nothing but await the
    next app is already 1.2 % of such a call, hence 3 % there. The log of requests is off, sockets are left
    out: both would flatter us.
    """
    more = {way: await _more_with_stanch(way, tmp_path) for way in (ASGI, *SERVERS)}
    left_out = sorted(PROTOCOLS.keys() - set(SERVERS))
    print(f"not installed, hence not counted: {', '.join(left_out) or 'none'}")
    told = {way: f"{share:+.2%}" for way, share in more.items()}
    assert all(more[server] <= 0.02 for server in SERVERS), told
    assert more[ASGI] <= 0.03, told


def _bytecode_in(folder: Path) -> dict[Path, int]:
    """Each compiled module, and when it was written."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*.pyc")}


@needs("valgrind")
@pytest.mark.long
@pytest.mark.timeout(2 * VALGRIND_TIMEOUT)
async def test_importing_stanch_adds_at_most_five_percent(tmp_path: Path) -> None:
    """As every start after the first does it: from bytecode, which is in a folder of this test's own.

    Compiling costs three times as much as running, and where none of it is kept (PYTHONDONTWRITEBYTECODE, a fresh
    clone) the first of the runs would pay it for the others. The collector is off: whether one of its rounds through
    all that FastAPI and SQLAlchemy have made falls to them or to us is luck.
    """
    others = "import fastapi, sqlalchemy.ext.asyncio, asyncpg"
    compiled = {"PYTHONPYCACHEPREFIX": str(tmp_path)}

    async def instructions(code: str) -> int:
        counting = ("--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null")
        python = (sys.executable, "-c", f"import gc; gc.disable(); {code}")
        said = await _valgrind(*counting, *python, **compiled)
        found = re.search(r"I +refs: +([\d,]+)", said)
        assert found, said[-2000:]
        return int(found[1].replace(",", ""))

    await _run(sys.executable, "-c", f"{others}, stanch", **compiled)
    bytecode = _bytecode_in(tmp_path)
    assert any("stanch" in file.parts for file in bytecode)
    without, with_stanch, nothing = await asyncio.gather(
        instructions(others), instructions(f"{others}, stanch"), instructions("pass")
    )
    assert _bytecode_in(tmp_path) == bytecode, "some was compiled again"
    more = (with_stanch - without) / (without - nothing)
    print(
        f"instructions: {without - nothing:,} for the others, {with_stanch - without:,} for stanch, {more:+.2%}"
    )
    assert more <= 0.05
