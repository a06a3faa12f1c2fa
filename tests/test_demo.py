"""The demo tells the truth: it sees a loss that was planted, it sees none on stanch, and it leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import fastapi
import httpx
import pytest
from fastapi import FastAPI
from rich.console import Console
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from stanch.demo import culprits, handwritten, probes, shop
from stanch.demo.conclusion import Status, conclude
from stanch.demo.faults import Faults
from stanch.demo.finds import FILE, Culprit, Finds
from stanch.demo.journal import ERRORS, Entry, Journal, Kind, Outcome
from stanch.demo.judge import Findings, Judge, Verdict, judge
from stanch.demo.scene import Scene
from stanch.demo.script import DECK, write_script
from stanch.demo.server import POOL_SIZE, Layer
from stanch.demo.table import make_table
from stanch.demo.traffic import Clients
from stanch.demo.view import draw
from tests.support.uvicorn_server import serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from stanch.embedded import EmbeddedPostgres
    from tests.support.judge import FreshDatabase

SECONDS = 8

EXIT_AFTER_REPLY = tuple(map(int, fastapi.__version__.split(".")[:2])) >= (0, 118)
"""Whether the code after a dependency's ``yield`` runs when the reply has left."""


# The judgement: planted losses ----------------------------------------------------------------------------


def entry(kind: Kind, outcome: Outcome, wrote: UUID | None = None, *, found: bool | None = None) -> Entry:
    return Entry(kind=kind, outcome=outcome, seconds=0.01, wrote=wrote, found=found)


def entries_of_a_good_run() -> list[Entry]:
    """One of everything that a run must have seen, with every promise kept."""
    return [
        entry(Kind.ORDER, Outcome.SUCCESS, UUID(int=1)),
        entry(Kind.PAIR, Outcome.SUCCESS, UUID(int=2), found=True),
        entry(Kind.FAILING_COMMIT, Outcome.ERROR, UUID(int=3)),
        entry(Kind.SWALLOWED, Outcome.ERROR, UUID(int=4)),
        *(entry(kind, Outcome.ERROR, uuid4()) for kind in ERRORS),
        entry(Kind.STREAM, Outcome.SUCCESS),
        entry(Kind.HANGS_UP, Outcome.HUNG_UP),
    ]


def findings_of_a_good_run() -> Findings:
    stored = frozenset({UUID(int=1), UUID(int=2)})
    return Findings(stored=stored, half_written=0, idle_in_transaction=0, leaked=0)


def verdict_on(*entries: Entry, findings: Findings | None = None) -> Verdict:
    journal = Journal()
    for each in (*entries_of_a_good_run(), *entries):
        journal.add(each)
    return judge(journal, findings or findings_of_a_good_run())


def stored(*orders: UUID) -> Findings:
    return replace(findings_of_a_good_run(), stored=findings_of_a_good_run().stored | set(orders))


LOST = UUID(int=99)
NAMED: dict[Layer, Finds] = {
    Layer.STANCH: dict.fromkeys(Culprit, "culprits.py:1 in somewhere()"),
    Layer.HANDWRITTEN: {},
}


def test_a_run_that_kept_everything_is_found_to_have_kept_everything() -> None:
    verdict = verdict_on()
    assert verdict.broken == []
    assert verdict.untested == []
    assert (verdict.acknowledged, verdict.missing) == (2, 0)
    assert (verdict.error_replies, verdict.left_rows) == (6, 0)


@pytest.mark.parametrize(
    ("verdict", "figure"),
    [
        pytest.param(
            verdict_on(entry(Kind.ORDER, Outcome.SUCCESS, LOST)),
            "missing",
            id="an acknowledged order is gone",
        ),
        pytest.param(
            verdict_on(entry(Kind.RETURNED, Outcome.ERROR, LOST), findings=stored(LOST)),
            "left_rows",
            id="an error reply left a row",
        ),
        pytest.param(
            verdict_on(entry(Kind.FAILING_COMMIT, Outcome.SUCCESS, LOST)),
            "failing_commits_acknowledged",
            id="a commit failed behind a 2xx",
        ),
        pytest.param(
            verdict_on(entry(Kind.SWALLOWED, Outcome.SUCCESS, LOST)),
            "swallowed_acknowledged",
            id="a rollback in the place of COMMIT went unnoticed",
        ),
        pytest.param(
            verdict_on(entry(Kind.PAIR, Outcome.SUCCESS, LOST, found=False), findings=stored(LOST)),
            "misses",
            id="a write could not be read at once",
        ),
        pytest.param(
            verdict_on(findings=replace(findings_of_a_good_run(), half_written=1)),
            "half_written",
            id="an order is half-written",
        ),
        pytest.param(
            verdict_on(findings=replace(findings_of_a_good_run(), leaked=1)),
            "leaked",
            id="a connection leaked",
        ),
        pytest.param(
            verdict_on(findings=replace(findings_of_a_good_run(), idle_in_transaction=1)),
            "idle_in_transaction",
            id="a connection is idle in transaction",
        ),
    ],
)
def test_a_single_planted_loss_is_seen_and_ends_the_run_with_status_1(verdict: Verdict, figure: str) -> None:
    assert getattr(verdict, figure) == 1
    assert len(verdict.broken) >= 1
    both = {Layer.STANCH: verdict, Layer.HANDWRITTEN: verdict}
    assert conclude(both, NAMED, kills=1, restarts=1).status is Status.BROKEN


@pytest.mark.parametrize("culprit", Culprit)
def test_a_culprit_that_is_not_named_ends_the_run_with_status_1(culprit: Culprit) -> None:
    finds = NAMED | {
        Layer.STANCH: {each: said for each, said in NAMED[Layer.STANCH].items() if each is not culprit}
    }
    both = {Layer.STANCH: verdict_on(), Layer.HANDWRITTEN: verdict_on()}
    conclusion = conclude(both, finds, kills=1, restarts=1)
    assert conclusion.status is Status.BROKEN
    assert conclusion.sentence == f"stanch broke a promise: {culprit.label} was not named"


def test_no_reply_and_an_unknown_outcome_promise_nothing() -> None:
    """The row may be there or not; either way nobody was lied to."""
    undecided = [entry(Kind.ORDER, outcome, LOST) for outcome in (Outcome.NO_REPLY, Outcome.UNKNOWN)]
    assert verdict_on(*undecided).broken == []
    assert verdict_on(*undecided, findings=stored(LOST)).broken == []
    assert verdict_on(*undecided).unknown == 1


def test_a_run_in_which_something_did_not_happen_is_void() -> None:
    """No kill, no restart, a kind of request that nobody answered, or a hand-written pattern that lost nothing."""
    good = verdict_on()
    bad = verdict_on(entry(Kind.FAILING_COMMIT, Outcome.SUCCESS, LOST))
    kept = conclude({Layer.STANCH: good, Layer.HANDWRITTEN: bad}, NAMED, kills=1, restarts=1)
    assert kept.status is Status.KEPT
    voids = [
        conclude({Layer.STANCH: good, Layer.HANDWRITTEN: bad}, NAMED, kills=0, restarts=1),
        conclude({Layer.STANCH: good, Layer.HANDWRITTEN: bad}, NAMED, kills=1, restarts=0),
        conclude({Layer.STANCH: good, Layer.HANDWRITTEN: good}, NAMED, kills=1, restarts=1),
    ]
    for missing in entries_of_a_good_run():
        journal = Journal()
        for each in entries_of_a_good_run():
            if each.kind is not missing.kind:
                journal.add(each)
        if missing.kind is Kind.ORDER:
            continue  # the pair is an acknowledged write as well
        verdict = judge(journal, findings_of_a_good_run())
        voids.append(conclude({Layer.STANCH: verdict, Layer.HANDWRITTEN: bad}, NAMED, kills=1, restarts=1))
    assert [void.status for void in voids] == [Status.VOID] * len(voids)
    assert len(voids) == 3 + 5 + len(ERRORS)


# The judge, on a real database and real shops -------------------------------------------------------------


@pytest.fixture
async def shop_database(fresh_database: FreshDatabase) -> FreshDatabase:
    engine = create_async_engine(fresh_database.url())
    async with engine.begin() as connection:
        await connection.run_sync(shop.Base.metadata.create_all)
        async with AsyncSession(connection) as session:
            await shop.furnish(session)
            await session.flush()
    await engine.dispose()
    return fresh_database


@pytest.fixture
async def engine(shop_database: FreshDatabase) -> AsyncIterator[AsyncEngine]:
    """The pool of a shop on the hand-written pattern, from which a test can take connections away."""
    engine = create_async_engine(shop_database.url(), pool_size=POOL_SIZE, max_overflow=0, pool_timeout=0.5)
    yield engine
    await engine.dispose()


def shop_on(engine: AsyncEngine) -> FastAPI:
    app = handwritten.make_app(engine)
    app.include_router(probes.make_router(dict))
    return app


async def look(judged: FreshDatabase, engine: AsyncEngine) -> Findings:
    async with serve(shop_on(engine)) as url:
        return await Judge(judged.server, judged.name, pool_size=POOL_SIZE, patience=1.0).look(url)


@pytest.mark.slow
@pytest.mark.anyio
async def test_the_judge_finds_nothing_on_a_shop_where_nothing_is_wrong(
    shop_database: FreshDatabase, engine: AsyncEngine
) -> None:
    order = uuid4()
    async with serve(shop_on(engine)) as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.post("/orders", json={"id": str(order)})).status_code == 201
    findings = await look(shop_database, engine)
    assert findings == Findings(stored=frozenset({order}), half_written=0, idle_in_transaction=0, leaked=0)


@pytest.mark.slow
@pytest.mark.anyio
async def test_the_judge_sees_a_connection_that_was_never_given_back(
    shop_database: FreshDatabase, engine: AsyncEngine
) -> None:
    """It is idle, as far as the server knows: only the shop's other four can be used at once."""
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        await connection.rollback()
        findings = await look(shop_database, engine)
    assert (findings.leaked, findings.idle_in_transaction) == (1, 0)


@pytest.mark.slow
@pytest.mark.anyio
async def test_the_judge_sees_a_connection_left_in_a_transaction(
    shop_database: FreshDatabase, engine: AsyncEngine
) -> None:
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        findings = await look(shop_database, engine)
    assert (findings.leaked, findings.idle_in_transaction) == (1, 1)


@pytest.mark.slow
@pytest.mark.anyio
async def test_the_judge_sees_more_connections_than_the_pool_may_have(
    shop_database: FreshDatabase, engine: AsyncEngine
) -> None:
    strays = create_async_engine(shop_database.url(), pool_size=POOL_SIZE + 1)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(POOL_SIZE + 1):  # and one that the fixture has
            connection = await stack.enter_async_context(strays.connect())
            await connection.execute(text("SELECT 1"))
            await connection.rollback()
        findings = await look(shop_database, engine)
    await strays.dispose()
    assert findings.leaked == 2


@pytest.mark.slow
@pytest.mark.anyio
async def test_the_judge_sees_half_an_order(shop_database: FreshDatabase, engine: AsyncEngine) -> None:
    await shop_database.execute(f"INSERT INTO orders VALUES ('{LOST}', 1, 1, 1)")
    findings = await look(shop_database, engine)
    assert (findings.half_written, findings.stored) == (1, frozenset({LOST}))


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_row_that_vanishes_behind_an_acknowledgement_is_missed(
    shop_database: FreshDatabase, engine: AsyncEngine
) -> None:
    """From the client's request to the verdict, on a real shop, with one row taken away in between."""
    journal = Journal()
    script = [act for act in write_script(1, 1.0, items=5, patience=0.1) if act.kind is Kind.ORDER]
    async with serve(shop_on(engine)) as url:
        async with Clients(url, journal) as clients:
            await clients.play(script)
        lucky = await shop_database.fetchval("SELECT id FROM orders LIMIT 1")
        await shop_database.execute(f"DELETE FROM movements WHERE order_id = '{lucky}'")
        await shop_database.execute(f"DELETE FROM orders WHERE id = '{lucky}'")
        findings = await Judge(shop_database.server, shop_database.name, pool_size=POOL_SIZE).look(url)
    verdict = judge(journal, findings)
    assert verdict.acknowledged == len(script) > 1
    assert (verdict.missing, verdict.broken) == (1, ["acknowledged writes are missing"])


# The script, the pictures ---------------------------------------------------------------------------------


def test_the_shortest_run_has_everything_in_it_and_the_same_for_the_same_seed() -> None:
    script = write_script(3, 4.0, items=5, patience=0.1)
    assert {act.kind for act in script} == set(Kind)
    assert script == write_script(3, 4.0, items=5, patience=0.1)
    assert script != write_script(4, 4.0, items=5, patience=0.1)
    assert sum(DECK.values()) == 100
    placed = [act.order_id for act in script if act.kind is not Kind.READ]
    assert len(set(placed)) == len(placed)


def test_the_table_and_the_picture_can_be_drawn_and_show_every_figure(postgres: EmbeddedPostgres) -> None:
    console = Console(file=StringIO(), width=120)
    faults = Faults(postgres, seed=1, seconds=10)
    verdict = verdict_on()
    numbered = replace(verdict, **{field.name: 1000 + number for number, field in enumerate(fields(verdict))})
    console.print(make_table({Layer.STANCH: numbered, Layer.HANDWRITTEN: verdict}, faults))
    scene = Scene(url="http://127.0.0.1:1", seconds=10, faults=faults)
    console.print(draw(scene))
    scene.pool = {"in_use": 2, "idle": 1, "waiting": 4}
    console.print(draw(scene))
    file: Any = console.file
    drawn = file.getvalue()
    for number, field in enumerate(fields(verdict)):
        if field.name not in {"ways_to_fail", "median", "slowest"}:
            assert str(1000 + number) in drawn, field.name
    assert "2 in use, 1 idle, 4 waiting" in drawn


# The whole of it, as a newcomer runs it -------------------------------------------------------------------


class Demo:
    """``python -m stanch.demo`` in a process of its own, read line by line."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        # to a file: nobody reads a pipe while the test waits for something else
        self._output = folder / "output"
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stanch.demo", "--plain", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"TMPDIR": str(folder), "COLUMNS": "100"},
                start_new_session=True,
            )
        self._family: set[int] = set()

    @property
    def output(self) -> str:
        return self._output.read_text(encoding="utf-8")

    def until(self, words: str, timeout: float) -> re.Match[str]:
        """Wait until it has said something that matches *words*."""
        deadline = time.monotonic() + timeout
        while (said := re.search(words, self.output)) is None:
            assert self._process.poll() is None, f"it ended: {self.output}"
            assert time.monotonic() < deadline, f"not said within {timeout} s: {words}\n{self.output}"
            time.sleep(0.05)
        self._family |= children_of(self._process.pid)
        return said

    def end(self, number: int, timeout: float = 40.0) -> int:
        self._family |= children_of(self._process.pid)
        self._process.send_signal(number)
        return self._process.wait(timeout)

    def survivors(self, timeout: float = 15.0) -> set[int]:
        """Its children, as far as they were seen, that still live after *timeout* seconds."""
        assert len(self._family) >= 2, "the test has not seen the children"
        deadline = time.monotonic() + timeout
        while (left := {pid for pid in self._family if is_alive(pid)}) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def kill(self) -> None:
        for pid in (self._process.pid, *self._family):
            with contextlib.suppress(ProcessLookupError):
                if pid == self._process.pid or is_alive(pid):
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()


def stat_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ["X", "0"]


def taken_at(page: str) -> int:
    """How many connections the shop has taken out of its pool so far."""
    told = httpx.get(f"{page}/snapshot", trust_env=False).raise_for_status().json()
    count: int = told["databases"][0]["uses"]["count"]
    return count


def is_alive(pid: int) -> bool:
    return stat_of(pid)[0] not in "ZX"


def children_of(parent: int) -> set[int]:
    numbers = {int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()}
    return {pid for pid in numbers if stat_of(pid)[1] == str(parent)}


@pytest.fixture
def demos() -> Iterator[list[Demo]]:
    """What is put in here is gone after the test."""
    demos: list[Demo] = []
    yield demos
    for demo in demos:
        demo.kill()


def figures(output: str) -> dict[str, tuple[int, int]]:
    """The rows of the table: stanch's figure and the hand-written pattern's."""
    rows = re.findall(r"^ +(\S.*?) {2,}(\d+) +(\d+) *$", output, re.MULTILINE)
    return {label: (int(ours), int(theirs)) for label, ours, theirs in rows}


GUILTY = {
    Culprit.LEAK: "return await session.scalar(",
    Culprit.IDLE: "dearest = await session.scalar(",
    Culprit.REPEATED: "names += await session.scalars(",
}
"""The line of each fault."""


def line_of(culprit: Culprit) -> int:
    lines = Path(culprits.__file__).read_text(encoding="utf-8").splitlines()
    (found,) = [number for number, line in enumerate(lines, 1) if GUILTY[culprit] in line]
    return found


def finds(output: str) -> dict[Culprit, tuple[str, str]]:
    """What stanch said of each culprit, and what the hand-written pattern did."""
    rows = re.findall(r"^  .*\(GET (/\w+)\)\n +stanch +(.*)\n +hand-written +(.*)\n", output, re.MULTILINE)
    paths = {culprit.path: culprit for culprit in Culprit}
    return {paths[path]: (ours.strip(), theirs.strip()) for path, ours, theirs in rows}


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_short_run_loses_nothing_on_stanch_and_loses_on_the_hand_written_pattern(
    demos: list[Demo], tmp_path: Path
) -> None:
    demos.append(demo := Demo(tmp_path, "--seconds", str(SECONDS), "--seed", "5", "--serve"))
    demo.until(r"hand-written +http", 60)
    url = demo.until(r"(http://\S+)/docs stay up until Ctrl-C", 100).group(1)
    seen = figures(demo.output)
    for label in (
        "missing from the database",
        "left rows behind",
        "answered 2xx all the same",
        "answered 2xx, row missing",
        "not there",
        "orders half-written",
        "connections leaked",
        "connections idle in transaction",
    ):
        assert seen[label][0] == 0, demo.output
    for label in (
        "backends killed with -9",
        "restarts of PostgreSQL",
        "commits made to fail",
        "errors swallowed by the handler",
        "error replies to writes",
        "clients that hung up",
    ):
        assert min(seen[label]) > 0, demo.output
    for label in ("missing from the database", "left rows behind", "answered 2xx, row missing"):
        assert seen[label][1] > 0, demo.output
    assert (seen["answered 2xx all the same"][1] > 0) is EXIT_AFTER_REPLY, demo.output
    said = finds(demo.output)
    for culprit in Culprit:
        assert said[culprit][0].startswith(f"{FILE}:{line_of(culprit)} in "), demo.output
        assert said[culprit][1] == "nothing", demo.output
    # what --serve promises
    page = demo.until(r"run: stanch top (http://\S+)", 5).group(1)
    assert page == f"{url}/_stanch"
    taken = taken_at(page)
    deadline = time.monotonic() + 40
    while taken_at(page) < taken + 10:
        assert time.monotonic() < deadline, "nobody has come"
        time.sleep(0.2)
    once = subprocess.run(
        [sys.executable, "-m", "stanch.cli", "top", page, "--once"],
        capture_output=True, text=True, timeout=50, check=False, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    assert f"{FILE}:{line_of(Culprit.LEAK)} in begin_export()" in once.stdout, once.stderr
    api = httpx.get(f"{url}/openapi.json", trust_env=False).json()
    assert "/checkout" in api["paths"]
    assert "swagger" in httpx.get(f"{url}/docs", trust_env=False).text
    assert demo.end(signal.SIGINT) == Status.KEPT, demo.output
    assert demo.survivors() == set()
    assert "Traceback" not in demo.output
    assert not list(tmp_path.glob("stanch-*/**/*.log")), "a good run keeps no logs"


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_run_that_is_cut_short_leaves_no_process_behind(
    demos: list[Demo], tmp_path: Path, number: int, status: int
) -> None:
    demos.append(demo := Demo(tmp_path, "--seconds", "30"))
    demo.until(r"s of traffic", 60)
    assert demo.end(number) == status
    assert demo.survivors() == set()
    assert "Traceback" not in demo.output


def test_a_length_that_proves_nothing_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stanch.demo", "--seconds", "1"],
        capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "from 4 to 600" in done.stderr


@pytest.mark.anyio
async def test_clients_write_down_a_hang_up_only_where_they_left_before_the_reply(
    shop_database: FreshDatabase, engine: AsyncEngine
) -> None:
    journal = Journal()
    acts = [act for act in write_script(1, 4.0, items=5, patience=0.05) if act.kind is Kind.HANGS_UP]
    patient = replace(acts[0], due=0.0, patience=5.0)
    fickle = replace(acts[1], due=0.0, patience=0.02)
    async with serve(shop_on(engine)) as url, Clients(url, journal) as clients:
        await clients.play([patient, fickle])
    assert {(each.outcome, each.wrote) for each in journal} == {
        (Outcome.SUCCESS, None),
        (Outcome.HUNG_UP, None),
    }
