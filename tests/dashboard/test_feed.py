"""What the page is told: all of it, once, in order, and nothing that is nobody's business."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from stanch import Database, dashboard
from stanch.accounts import Account
from stanch.callers import Place
from stanch.dashboard import feed, history
from stanch.dashboard.feed import Position
from stanch.dashboard.history import History
from stanch.events import AttemptFailed, ConnectionSevered, HookFailed
from stanch.fastapi import install
from stanch.ledger import Checkout, Stats
from tests.dashboard.fed import PATH, Fed, Told, app_of, first_of, page_of, told, visitor
from tests.support.uvicorn_server import serve

pytestmark = pytest.mark.anyio

SECRET = "hunter2"


def severed(reason: str) -> ConnectionSevered:
    return ConnectionSevered(database="main", reason=reason)


def texts(messages: list[Told]) -> list[str]:
    return [message.data["facts"]["reason"] for message in messages if message.event == "happening"]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # nobody tells of it
            await asyncio.sleep(0.01)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten samples a second and turns of one second: the test of a feed need not last as long as a feed."""
    monkeypatch.setattr(history, "PERIOD", 0.1)
    monkeypatch.setattr(dashboard, "_LOOK", 0.02)
    monkeypatch.setattr(dashboard, "_TURN", 1.0)


# What is told ---------------------------------------------------------------------------------------------


async def test_a_fresh_viewer_is_told_what_happened_before_it_came(fast: None) -> None:
    fed = Fed()
    fed.in_use, fed.idle, fed.waiting = 3, 2, 1
    async with serve(app_of(page_of(fed))) as url, httpx.AsyncClient(base_url=url) as client:
        fed.measuring.note(severed("early"))
        await asyncio.sleep(0.35)  # the samples of a past
        messages = await first_of(client)
    assert [message.event for message in messages] == ["happening", "snapshot"]
    assert messages[0].data["text"] == "a connection of database 'main' was severed: early"
    whole = messages[-1].data
    assert [each["database"] for each in whole["databases"]] == ["main"]
    samples = whole["samples"]["main"]
    assert len(samples["at"]) >= 3
    assert samples["in_use"][-1], samples["idle"][-1] == (3, 2)
    assert {len(column) for column in samples.values()} == {len(samples["at"])}
    assert samples["bound"][-1] == 7


async def test_who_comes_back_is_told_what_it_missed_and_nothing_twice(fast: None) -> None:
    fed = Fed()
    async with serve(app_of(page_of(fed))) as url, httpx.AsyncClient(base_url=url) as client:
        for reason in ("a", "b"):
            fed.measuring.note(severed(reason))
        before = await first_of(client)
        fed.measuring.note(severed("missed"))
        after = await first_of(client, last=before[-1].id)
        # A connection that broke in the middle of the news: the id of a happening says how far it came.
        middle = await first_of(client, last=before[0].id)
    assert texts(before) == ["a", "b"]
    assert texts(after) == ["missed"]
    assert texts(middle) == ["b", "missed"]
    seen, new = (messages[-1].data["samples"]["main"]["number"] for messages in (before, after))
    assert not set(seen) & set(new)
    assert not new or new[0] == seen[-1] + 1


async def test_a_feed_goes_on_by_turns_without_a_gap(fast: None) -> None:
    """Each turn ends, so that no server waits long for it; the samples of all turns are every sample, once."""
    fed = Fed()
    numbers: list[int] = []
    turns, last = 0, None
    async with serve(app_of(page_of(fed))) as url, httpx.AsyncClient(base_url=url) as client:
        async with asyncio.timeout(20):
            while turns < 3:
                turns += 1
                async for message in told(client, last=last):
                    last = message.id
                    numbers += message.data["samples"]["main"]["number"]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) > 20


async def test_another_run_tells_all_it_has_and_says_which_it_is(fast: None) -> None:
    """After a restart, or where another worker answers: the old id means nothing there."""
    ids: list[str] = []
    runs: set[str] = set()
    for reason in ("first", "second"):
        fed = Fed()
        async with serve(app_of(page_of(fed))) as url, httpx.AsyncClient(base_url=url) as client:
            fed.measuring.note(severed(reason))
            messages = await first_of(client, last=ids[-1] if ids else None)
            assert texts(messages) == [reason]
            ids.append(messages[-1].id)
            runs.add(messages[-1].data["worker"]["run"])
    assert len(runs) == 2


@pytest.mark.parametrize(
    "said", ["", "7", "x.1.2", "{run}.9", "{run}.-1.3", "{run}.1.2-", "{run}.99999999999999999.0", "{run}.²."]
)
def test_an_id_that_is_not_ours_is_the_beginning(said: str) -> None:
    assert Position.read(said.replace("{run}", "2a-9"), run="2a-9") == Position("2a-9")


@pytest.mark.parametrize("position", [Position("2a-9"), Position("2a-9", 3), Position("2a-9", 3, (1, 0, 12))])
def test_an_id_comes_back_as_what_it_was(position: Position) -> None:
    assert Position.read(str(position), run="2a-9") == position


async def test_several_databases_are_told_apart(fast: None) -> None:
    first, second = Fed("first"), Fed("second")
    first.in_use, second.in_use = 1, 4
    async with serve(app_of(page_of(first, second))) as url, httpx.AsyncClient(base_url=url) as client:
        second.measuring.note(ConnectionSevered("second", "one"))
        first.measuring.note(ConnectionSevered("first", "two"))
        messages = await first_of(client)
        again = await first_of(client, last=messages[0].id)
    assert [(told.data["database"], told.data["facts"]["reason"]) for told in messages[:-1]] == [
        ("second", "one"),
        ("first", "two"),
    ]
    assert texts(again) == ["two"]
    samples = messages[-1].data["samples"]
    assert (samples["first"]["in_use"][-1], samples["second"]["in_use"][-1]) == (1, 4)


async def test_a_database_that_a_second_install_adds_is_shown_too() -> None:
    app = FastAPI()
    install(app, Database("sqlite+aiosqlite://"), dashboard=PATH, dashboard_access="loopback")
    install(app, Database("sqlite+aiosqlite://", name="second"))
    async with visitor(app) as client:
        whole = (await client.get(f"{PATH}/snapshot")).json()
    assert list(whole["samples"]) == ["main", "second"]


async def test_the_snapshot_is_all_of_it_as_one_document() -> None:
    fed = Fed()
    fed.measuring.note(severed("early"))
    async with visitor(app_of(page_of(fed))) as client:
        reply = await client.get(f"{PATH}/snapshot")
        head = await client.head(f"{PATH}/snapshot")
        head_of_feed = await client.head(f"{PATH}/feed")
    assert reply.headers["content-type"] == "application/json"
    whole = reply.json()
    assert whole.keys() == {"worker", "databases", "samples", "happenings"}
    assert [happening["facts"] for happening in whole["happenings"]] == [{"reason": "early"}]
    assert (head.status_code, head.content) == (200, b"")
    assert (head_of_feed.status_code, head_of_feed.content) == (200, b"")
    assert head_of_feed.headers["content-type"].startswith("text/event-stream")


async def test_the_last_minute_is_told_apart_from_what_was_before() -> None:
    fed = Fed()
    kept = History([fed])  # type: ignore[list-item]  # as far as it looks at a database
    checkout = Checkout(None, 0.0)
    kept.begin()
    try:
        fed.measuring.returned(checkout, 40.0)
        for _ in range(history.RECENT + 1):
            kept._look()  # pyright: ignore[reportPrivateUsage]  # a minute, without waiting for it
        fed.measuring.returned(checkout, 0.002)
        kept._look()  # pyright: ignore[reportPrivateUsage]
        recent = dict(kept.recently("main"))
    finally:
        kept.stop()
    assert fed.measuring.totals()[1].count == 2
    assert (recent["uses"].count, recent["uses"].quantile(0.99)) == (1, 0.0025)


async def test_no_more_is_kept_and_told_than_a_page_can_show() -> None:
    fed = Fed()
    for number in range(400):
        account = Account(f"GET /{number}")
        account.held = float(number)
        fed.measuring.closed(account)
        fed.measuring.executed(
            f"SELECT a{number} FROM t", number / 1000, None, lambda: Place("a.py", 1, "f"), None
        )
    fed.measuring.executed("SELECT " + "b, " * 5000 + "c", 9.0, None, lambda: Place("a.py", 1, "f"), None)
    async with visitor(app_of(page_of(fed))) as client:
        whole = (await client.get(f"{PATH}/snapshot")).json()["databases"][0]
    assert (len(whole["routes"]), whole["routes_in_all"]) == (100, 400)
    assert whole["routes"][0]["route"] == "GET /399"
    assert whole["statements_in_all"] == 401
    assert 50 <= len(whole["statements"]) <= 150
    assert max(len(row["shape"]) for row in whole["statements"]) < 2100


async def test_no_secret_leaves_with_an_event() -> None:
    """An error may quote rows and values: what it is called is all that is told of it."""
    fed = Fed()
    fed.measuring.note(
        HookFailed("main", "POST /orders", "send()", "a.py:1 in f()", ValueError(f"Key (id)=({SECRET})"))
    )
    fed.measuring.note(AttemptFailed("main", "work", 1, "why", float("inf")))
    fed.measuring.executed(
        f"SELECT * FROM users WHERE password = '{SECRET}'",
        1.0,
        None,
        lambda: Place("a.py", 1, "f"),
        ValueError(SECRET),
    )
    async with visitor(app_of(page_of(fed))) as client:
        reply = await client.get(f"{PATH}/snapshot")
    assert SECRET not in reply.text
    assert reply.json()["happenings"][0]["facts"]["error"] == "ValueError"
    assert reply.json()["happenings"][1]["facts"]["pause"] == "inf"


# How it ends ----------------------------------------------------------------------------------------------


async def test_viewers_are_bounded_and_a_place_comes_free_when_one_leaves(
    fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "VIEWERS", 2)
    monkeypatch.setattr(dashboard, "_TURN", 30.0)
    page = page_of(Fed())
    async with serve(app_of(page)) as url, httpx.AsyncClient(base_url=url) as client:
        async with client.stream("GET", f"{PATH}/feed"), client.stream("GET", f"{PATH}/feed"):
            full = await client.get(f"{PATH}/feed")
            assert (full.status_code, full.headers["retry-after"]) == (503, "5")
            assert (await client.get(f"{PATH}/snapshot")).status_code == 200
        await until(lambda: page.viewers == 0)
        assert (await first_of(client))[-1].event == "snapshot"


async def test_no_task_outlives_its_viewer(fast: None) -> None:
    async with serve(app_of(page_of(Fed()))) as url, httpx.AsyncClient(base_url=url) as client:
        for _ in range(3):
            await first_of(client)
        await until(lambda: not any("dashboard" in task.get_name() for task in asyncio.all_tasks()))


async def test_a_viewer_who_takes_nothing_loses_its_place(
    fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "_PATIENCE", 0.1)
    page = page_of(Fed())
    never = asyncio.Event()  # held here, so that the collector does not end what waits for it

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await never.wait()

    async def receive() -> Any:
        return await never.wait()

    scope = {
        "type": "http", "method": "GET", "path": f"{PATH}/feed", "query_string": b"", "root_path": "",
        "http_version": "1.1", "client": ("127.0.0.1", 5), "server": ("localhost", 80), "scheme": "http",
        "path_params": {"rest": "feed"}, "headers": [(b"host", b"localhost")],
    }  # fmt: skip
    async with asyncio.timeout(5):
        await page(scope, receive, send)
    assert page.viewers == 0
    await until(lambda: not any("dashboard" in task.get_name() for task in asyncio.all_tasks()))
    async with page.lifespan():
        pass


async def test_the_sampler_ends_with_the_app_and_begins_again_with_it(fast: None) -> None:
    """It is one timer of the loop: afterwards there is none of ours, and nobody looks any more."""
    looks = 0

    class Watched(Fed):
        def stats(self) -> Stats:
            nonlocal looks
            looks += 1
            return super().stats()

    page = page_of(Watched())
    for _ in range(2):
        async with page.lifespan():
            before = looks
            await until(lambda: looks > before + 2)  # noqa: B023  # waited for in this very round
        after = looks
        await asyncio.sleep(0.3)  # three times as long as the next look would take
        assert looks == after


async def test_a_visitor_of_an_app_without_lifespan_begins_it(fast: None) -> None:
    page = page_of(Fed())
    async with visitor(app_of(page)) as client:
        await client.get(f"{PATH}/snapshot")
        await asyncio.sleep(0.25)
        whole = (await client.get(f"{PATH}/snapshot")).json()
    assert len(whole["samples"]["main"]["number"]) >= 2
    async with page.lifespan():
        pass


def test_a_loop_that_ends_takes_the_sampler_along_and_the_next_begins_it_again() -> None:
    page = page_of(Fed())

    async def visit() -> int:
        async with visitor(app_of(page)) as client:
            whole = (await client.get(f"{PATH}/snapshot")).json()
        return len(whole["samples"]["main"]["number"])

    assert [asyncio.run(visit()) for _ in range(3)] == [1, 2, 3]


APP = """
from fastapi import FastAPI
from stanch import Database
from stanch.fastapi import install
app = FastAPI()
install(app, Database("sqlite+aiosqlite://"), dashboard="/_stanch", dashboard_access="loopback")
"""


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
async def test_uvicorn_stops_while_a_page_is_open(sign: signal.Signals, tmp_path: Path) -> None:
    """It waits for open replies, without end unless told otherwise; a feed hears of the signal, and ends."""
    (tmp_path / "served.py").write_text(APP)
    command = [sys.executable, "-m", "uvicorn", "served:app", "--port", "0", "--app-dir", str(tmp_path)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: ASYNC220  # the start of a child is quick
    try:
        assert server.stderr is not None
        line = await asyncio.to_thread(
            lambda: next(each for each in server.stderr or () if "running on" in each)
        )
        found = re.search(r"http://\S+", line)
        assert found is not None
        async with httpx.AsyncClient(base_url=found[0], timeout=10) as client:
            reader = told(client)
            await anext(reader)
            begun = time.monotonic()
            server.send_signal(sign)
            async for _ in reader:
                pass
        await asyncio.to_thread(server.wait, 20)
        assert time.monotonic() - begun < 20, "without a word it waits for ever"
        assert "Traceback" not in server.stderr.read()
    finally:
        server.kill()
        server.wait()
        assert server.stderr is not None
        server.stderr.close()


# The format ----------------------------------------------------------------------------------------------


def test_the_format_is_written_down_as_it_is() -> None:
    """Others read it: the terminal's view, and whoever writes one more."""
    fed = Fed()
    page = page_of(fed)

    async def read() -> Any:
        async with visitor(app_of(page)) as client:
            fed.measuring.note(severed("why"))
            return (await client.get(f"{PATH}/snapshot")).json()

    whole = asyncio.run(read())
    text = feed.__doc__ or ""
    for key in [*whole, *whole["worker"], *whole["samples"]["main"], *whole["happenings"][0]]:
        assert f"``{key}``" in text, key
    assert json.dumps(whole)
