"""``stanch top`` shows what the feed says, comes back when the feed does, and gives the terminal back as it was.

It runs as its users run it: a process of its own, on a real pseudo-terminal, against a real server.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import httpx
import pytest
from fastapi import FastAPI
from rich.console import Console
from sqlalchemy import text
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from stanch import Database, cli
from stanch.cli.top.feed import HEADERS_VARIABLE, Decoder, Sent, Status
from stanch.cli.top.readings import Unreadable, read_happening, read_message
from stanch.cli.top.screen import Choice, Glyphs, View, full_screen
from stanch.cli.top.state import State
from stanch.fastapi import SessionDep, install
from stanch.ledger import Stats
from tests.support.fake_feed import HOLDING, LEAK, ROUTE, STATEMENT, FakeFeed, happening, message, snapshot
from tests.support.terminal import BACK_AGAIN, CURSOR, OTHER_SCREEN, Terminal
from tests.support.uvicorn_server import serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.judge import FreshDatabase

pytestmark = pytest.mark.anyio

COMMAND = (sys.executable, "-m", "stanch.cli", "top")


@dataclass
class Fed:
    """A feed that is served, and the address of its page."""

    feed: FakeFeed
    page: str


@pytest.fixture
async def fed() -> AsyncIterator[Fed]:
    feed = FakeFeed()
    async with serve(feed.app) as url:
        yield Fed(feed, f"{url}/_stanch")
        feed.end()


@dataclass
class Done:
    status: int
    out: str
    err: str


async def top(*arguments: str, **environment: str) -> Done:
    """Run it where there is no terminal; in a thread, so that the feed can be served meanwhile."""
    inherited = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "FORCE_COLOR"}}
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with (
        mock.patch.dict(os.environ, inherited | environment, clear=True),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = await asyncio.to_thread(cli.main, ["top", *arguments])
    for stream in (out, err):
        stream.seek(0)
    return Done(status, out.read(), err.read())


def terminal(page: str, **options: Any) -> Terminal:
    return Terminal([*COMMAND, page], **options)


# What it shows --------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_the_screen_shows_counts_times_holders_leaks_routes_statements_and_events(fed: Fed) -> None:
    fed.feed.tell(happening(1, "a unit ended with uncommitted writes"), "happening")
    fed.feed.tell(message(snapshot()))
    async with terminal(fed.page, lines=40, columns=130) as screen:
        await screen.until(r"in use  18 of 20 █+ +▇{20}")
        await screen.until(r"idle +1 ░")
        await screen.until(r"waiting +7 ▚+ +█{20}")
        await screen.until(r"waited +≤ 0\.5 ms +≤ 0\.5 ms +≤ 0\.5 ms +2 +≤ 0\.5 ms +≤ 5 ms +≤ 5 ms +8")
        await screen.until(r"exports\.py:7 in begin\(\) +POST /exports +5\.00 s its task is gone +out")
        await screen.until(r"GET /report +reports\.py:50 in build\(\) +61 s <1 % in use, no SQL running")
        await screen.until(r"GET /orders +40 9\.00 s 6 % 100 ms +120 +2 +7")
        await screen.until(
            r"SELECT \* FROM orders WHERE id = \? +90 3\.00 s +200 ms +1 orders\.py:9 in read\(\)"
        )
        await screen.until(r"\d\d:\d\d:01 a unit ended with uncommitted writes")
        screen.type("q")
        assert await screen.status() == 0


def test_the_picture_in_the_manual_is_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[1] / "docs" / "how-to" / "stanch-top.md"
    _, _, rest = page.read_text(encoding="utf-8").partition("$ stanch top http://localhost:8000/_stanch\n")
    shown = rest.partition("```")[0].rstrip().splitlines()
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    try:
        state = State()
        state.note(
            read_happening(happening(-2, "POST /orders/{item} ended with uncommitted writes (Order); …"))
        )
        state.take(read_message(json.loads(json.dumps(message(snapshot())))))
        console = Console(file=io.StringIO(), width=100, height=len(shown), color_system=None)
        picture = full_screen(
            state,
            Choice(),
            title="stanch top http://localhost:8000/_stanch",
            width=100,
            height=len(shown),
            glyphs=Glyphs(),
        )
        drawn = ["".join(segment.text for segment in line).rstrip() for line in console.render_lines(picture)]
    finally:
        monkeypatch.undo()
        time.tzset()
    assert drawn == shown, "\n".join(drawn)


@pytest.mark.slow
async def test_the_screen_follows_the_feed(fed: Fed) -> None:
    fed.feed.tell(message(snapshot()))
    async with terminal(fed.page) as screen:
        await screen.until("18 of 20")
        quiet = Stats(pool_size=15, max_overflow=5, in_use=3, idle=12, waiting=0)
        fed.feed.tell(happening(2, "something new"), "happening")
        fed.feed.tell(message(snapshot(stats=quiet, holders=())))
        await screen.until("3 of 20")
        await screen.until("something new")
        assert "reports.py" not in screen.text


@pytest.mark.slow
async def test_keys_choose_database_order_and_table(fed: Fed) -> None:
    slow, many = (
        ROUTE.replaced(route=route, held=held, units=units)
        for route, held, units in (("GET /slow", 9.0, 1), ("GET /many", 1.0, 500))
    )
    other = snapshot("billing", stats=Stats(pool_size=2, max_overflow=0, in_use=1, idle=0, waiting=0))
    fed.feed.tell(message(snapshot(routes=(slow, many)), other))
    async with terminal(fed.page, lines=30, columns=100) as screen:
        await screen.until(r"main \(1 of 2\)")
        await screen.until(r"by pool time(.|\n)*GET /slow(.|\n)*GET /many")
        screen.type("ss")
        await screen.until(r"by count(.|\n)*GET /many(.|\n)*GET /slow")
        screen.type("vvv")
        await screen.until("view: routes")
        await screen.until_gone("reports.py")
        screen.type("d")
        await screen.until(r"billing \(2 of 2\)(.|\n)*1 of 2 ")
        screen.type("d")
        await screen.until(r"main \(1 of 2\)")


@pytest.mark.slow
async def test_a_pause_holds_the_picture_and_the_next_key_lets_it_go(fed: Fed) -> None:
    fed.feed.tell(message(snapshot()))
    async with terminal(fed.page) as screen:
        await screen.until("18 of 20")
        screen.type("p")
        await screen.until("PAUSED")
        fed.feed.tell(
            message(snapshot(stats=Stats(pool_size=15, max_overflow=5, in_use=3, idle=0, waiting=0)))
        )
        written = len(screen.raw)
        screen.type("\x1b[B\x1bOq")  # an arrow, and a key of the keypad whose sequence ends in q
        await asyncio.sleep(0.5)  # nothing is to happen: there is no event to wait for
        assert len(screen.raw) == written
        assert "18 of 20" in screen.text
        screen.type("p")
        await screen.until("3 of 20")


@pytest.mark.slow
async def test_the_picture_fits_a_window_that_is_pulled(fed: Fed) -> None:
    fed.feed.tell(message(snapshot()))
    async with terminal(fed.page, lines=40, columns=130) as screen:
        await screen.until("q quit")
        for lines, columns in ((12, 40), (5, 28), (24, 80)):
            screen.resize(lines, columns)
            await screen.until(r"in use +18 of 20")
            await screen.until(r"\nq quit")
            assert screen.lines[-1].startswith("q quit")


@pytest.mark.parametrize("width", [1, 10, 28, 40, 51, 79, 120])
@pytest.mark.parametrize("view", View)
def test_the_picture_has_exactly_the_lines_of_the_terminal(view: View, width: int) -> None:
    """None wraps, whatever is in them: wide signs, long words, many rows."""
    state = State()
    wide = HOLDING.replaced(holder="GET /" + "漢字" * 60, place="x" * 200)
    long = STATEMENT.replaced(shape="SELECT " + ", ".join(f"column_{n}" for n in range(99)))
    ends = {"served": 0, "timeout": 7, "refused": 7, "cancelled": 0}
    told = message(snapshot(holders=(wide,) * 30, statements=(long,) * 7, wait_ends=ends))
    state.take(read_message(json.loads(json.dumps(told))))
    for height in range(1, 40):
        console = Console(
            file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None
        )
        picture = full_screen(
            state, Choice(view=view), title="x", width=width, height=height, glyphs=Glyphs()
        )
        lines = console.render_lines(picture)
        assert len(lines) == max(2, height)
        assert {sum(segment.cell_length for segment in line) for line in lines} == {width}


@pytest.mark.slow
async def test_no_color_leaves_the_forms_and_no_colour(fed: Fed) -> None:
    fed.feed.tell(message(snapshot()))
    async with terminal(fed.page) as screen:
        await screen.until("18 of 20")
        assert screen.colours
    async with terminal(fed.page, environment={"NO_COLOR": "1"}) as screen:
        await screen.until("18 of 20 █")
        assert screen.colours == set()


@pytest.mark.slow
async def test_a_terminal_that_knows_only_ascii_gets_ascii(fed: Fed) -> None:
    fed.feed.tell(message(snapshot()))
    async with terminal(
        fed.page, lines=30, columns=60, environment={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ) as screen:
        await screen.until("18 of 20 #+")
        screen.type("q")
        assert await screen.status() == 0
        assert screen.raw.isascii()


@pytest.mark.slow
async def test_what_the_feed_says_cannot_drive_the_terminal(fed: Fed) -> None:
    """A route, a statement or an event may have come from anywhere."""
    evil = HOLDING.replaced(holder="GET /\x1b]0;owned\x07\x1b[2Jx\u202e", place="[red]\x9b31m")
    fed.feed.tell(happening(1, "text \x1b[1;1Hwith \r orders"), "happening")
    fed.feed.tell(message(snapshot(holders=(evil,))))
    async with terminal(fed.page, lines=40, columns=120) as screen:
        await screen.until(r"GET /·\]0;owned··\[2Jx·")
        await screen.until(r"\[red\]·31m")
        await screen.until(r"text ·\[1;1Hwith · orders")
        assert b"]0;owned\x07" not in screen.raw
    once = await top(fed.page, "--once")
    assert "GET /·]0;owned··[2Jx·" in once.out
    assert "\x1b" not in once.out


@pytest.mark.slow
async def test_a_real_app_is_seen_as_it_is(fresh_database: FreshDatabase) -> None:
    """Who holds a connection is named by route and line, and a visitor without a right to look is not shown it."""
    db = Database(fresh_database.url(), pool_size=3, max_overflow=1)
    app, is_held, may_end = FastAPI(), asyncio.Event(), asyncio.Event()

    @app.get("/report/{number}")
    async def report(number: int, session: SessionDep) -> None:
        await session.execute(text("SELECT 1"))
        is_held.set()
        await may_end.wait()

    def knows_the_word(request: Request) -> bool:
        return request.headers.get("authorization") == "Bearer open-sesame"

    install(app, db, dashboard="/_stanch", dashboard_access=knows_the_word)
    line = report.__code__.co_firstlineno + 2
    async with serve(app) as url, httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
        asking = asyncio.create_task(client.get("/report/7"))
        await is_held.wait()
        refused = await top(f"{url}/_stanch", "--once")
        assert (refused.status, refused.out) == (3, "")
        assert "answered 403: You are not let in." in refused.err
        word = {"STANCH_TOP_HEADERS": "Authorization: Bearer open-sesame"}
        told = json.loads((await top(f"{url}/_stanch", "--json", **word)).out)
        assert told["databases"][0]["stats"]["in_use"] == 1
        async with terminal(f"{url}/_stanch", lines=30, columns=120, environment=word) as screen:
            await screen.until(r"in use  1 of 4 ")
            await screen.until(rf"GET /report/\{{number\}} +test_top\.py:{line} in .*no SQL running")
            may_end.set()
            await asking
            await screen.until(r"in use  0 of 4\b")
            await screen.until(r"idle +1 ░")
            await screen.until(r"GET /report/\{number\} +1 ")
            await screen.until(r"SELECT \? +\d")
            screen.type("q")
            assert await screen.status() == 0


# Once -----------------------------------------------------------------------------------------------------


async def test_once_prints_all_databases_as_plain_text_and_ends(fed: Fed) -> None:
    fed.feed.tell(happening(1, "a unit ended with uncommitted writes"), "happening")
    fed.feed.tell(message(snapshot(), snapshot("billing")))
    done = await top(fed.page, "--once", FORCE_COLOR="1")
    assert (done.status, done.err) == (0, "")
    for word in (
        "main (1 of 2)",
        "billing (2 of 2)",
        "18 of 20",
        "reports.py:50 in build()",
        "SELECT * FROM orders",
    ):
        assert word in done.out
    assert done.out.count("uncommitted writes") == 1, "an event of one database is none of the other"
    assert "\x1b" not in done.out


async def test_what_became_of_a_leak_is_told(fed: Fed) -> None:
    leaks = [LEAK, LEAK.replaced(returned=True), LEAK.replaced(returned=True, kind="dropped unclosed")]
    fed.feed.tell(message(snapshot(leaks=tuple(leaks), holders=())))
    lines = (await top(fed.page, "--once")).out.splitlines()
    assert [line.split()[-1] for line in lines if "exports.py" in line] == ["out", "returned", "reclaimed"]


async def test_who_was_not_served_is_told(fed: Fed) -> None:
    ends = {"served": 8, "timeout": 1, "refused": 3, "unavailable": 5, "cancelled": 2}
    fed.feed.tell(message(snapshot(wait_ends=ends), snapshot("billing")))
    done = await top(fed.page, "--once")
    assert done.out.count("not served") == 1, "where everybody was served there is nothing to tell"
    assert "not served  1 timed out, 3 refused, 5 server away, since the start\n" in done.out


async def test_json_prints_what_the_feed_said(fed: Fed) -> None:
    fed.feed.tell(message(snapshot()))
    done = await top(f"{fed.page}/feed", "--json")
    assert (done.status, done.err) == (0, "")
    assert json.loads(done.out) == message(snapshot())


@pytest.mark.slow
async def test_a_reader_that_has_seen_enough_is_no_error(fed: Fed) -> None:
    fed.feed.tell(message(snapshot(statements=(STATEMENT,) * 2000)))
    script = f"set -o pipefail; {' '.join(COMMAND)} {fed.page} --once | head -1"
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", script, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 50)
    assert (process.returncode, err) == (0, b"")
    assert out.startswith(b"main")


# Who is let in --------------------------------------------------------------------------------------------


async def test_headers_come_from_the_command_line_or_from_the_environment(fed: Fed) -> None:
    fed.feed.tell(message(snapshot()))
    given = await top(fed.page, "--json", "--header", "Authorization: Bearer one", "--header", "X-Team: ops")
    kept = await top(fed.page, "--json", STANCH_TOP_HEADERS="Authorization: Bearer two\nX-Team: dev\n")
    assert (given.status, kept.status) == (0, 0)
    heads = [(request.headers["authorization"], request.headers["x-team"]) for request in fed.feed.asked]
    assert heads == [("Bearer one", "ops"), ("Bearer two", "dev")]


@pytest.mark.parametrize("header", ["hunter2", "Bad Name: hunter2", "X-Line: hunter2\x0bX: y"])
async def test_a_header_that_is_none_is_refused_and_not_repeated(header: str) -> None:
    done = await top("http://127.0.0.1:1/_stanch", "--json", "--header", header)
    assert (done.status, done.out) == (2, "")
    assert "Authorization: Bearer" in done.err
    assert "hunter2" not in done.err


# Where there is no feed -----------------------------------------------------------------------------------

REFUSALS = {
    "401": (Response(status_code=401), 3, "answered 401: you are not let in"),
    "403 with a reason": (PlainTextResponse("Only \x1b[2Jus.\nx", 403), 3, "answered 403: Only ·[2Jus.\n"),
    "404": (PlainTextResponse("no", 404), 4, "answered 404: no"),
    "500": (Response("<html>", 500, media_type="text/html"), 1, "answered 500\n"),
    "login page": (
        RedirectResponse("https://login.example/?next=secret"),
        4,
        "sends to https://login.example/",
    ),
    "html": (PlainTextResponse("<html>"), 4, "is not the feed of a stanch page: it is text/plain"),
    "another stream": (
        Response("event: snapshot\ndata: {}\n\n", media_type="text/event-stream"),
        4,
        "does not understand: worker is no object",
    ),
    "no JSON": (
        Response("event: snapshot\ndata: hello\n\n", media_type="text/event-stream"),
        4,
        "does not understand",
    ),
    "an empty stream": (
        Response("", media_type="text/event-stream"),
        4,
        "ended before it had sent any numbers",
    ),
}


@pytest.mark.parametrize(("reply", "status", "told"), REFUSALS.values(), ids=REFUSALS.keys())
async def test_where_there_is_no_feed_it_says_why_and_ends(
    fed: Fed, reply: Response, status: int, told: str
) -> None:
    fed.feed.reply = reply
    done = await top(fed.page.replace("http://", "http://ops:hunter2@") + "?key=hunter2", "--once")
    assert (done.status, done.out) == (status, "")
    assert done.err.startswith(f"stanch top: {fed.page}/feed ")
    assert told in done.err
    assert "hunter2" not in done.err
    assert "secret" not in done.err


@pytest.mark.slow
async def test_where_there_is_no_feed_the_terminal_has_its_own_screen_back_before_the_message(
    fed: Fed,
) -> None:
    fed.feed.reply = PlainTextResponse("no", 403)
    async with terminal(fed.page, columns=150) as screen:
        assert await screen.status() == 3
        assert "answered 403: no" in screen.text
        assert screen.raw.rfind(BACK_AGAIN) < screen.raw.rfind(b"stanch top: ")


async def test_an_address_nobody_listens_at_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as line:
        address = f"127.0.0.1:{line.getsockname()[1]}"
    done = await top(f"{address}/_stanch", "--once")
    assert (done.status, done.out) == (1, "")
    assert f"http://{address}/_stanch/feed cannot be reached" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("url", ["", "http://", "ftp://host/_stanch", "http://[::1/_stanch"])
async def test_what_is_no_url_is_refused(url: str) -> None:
    done = await top(url, "--once")
    assert (done.status, done.out) == (2, "")
    assert "that is no URL of a page" in done.err


@pytest.mark.slow
async def test_without_a_terminal_it_says_what_to_ask_for(fed: Fed) -> None:
    done = await top(fed.page)
    assert (done.status, done.out) == (2, "")
    assert "--once" in done.err
    async with terminal(fed.page, environment={"TERM": "dumb"}) as screen:
        assert await screen.status() == 2
        assert "--once" in screen.text


@pytest.mark.slow
async def test_without_its_libraries_it_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['httpx'] = None; from stanch.cli import main; sys.exit(main(['top', 'x']))"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stderr=asyncio.subprocess.PIPE
    )
    _, err = await asyncio.wait_for(process.communicate(), 50)
    assert process.returncode == 2
    assert b"stanch top needs httpx: pip install 'stanch[top]'" in err


# Coming back ----------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_feed_that_ends_by_itself_is_asked_again_where_it_ended_and_nothing_is_said(fed: Fed) -> None:
    fed.feed.tell(message(snapshot()), mark="4711-1.30.0")
    async with terminal(fed.page) as screen:
        await screen.until("18 of 20")
        fed.feed.forget()
        fed.feed.end()
        await fed.feed.until_asked(2)
        assert fed.feed.asked[1].headers["last-event-id"] == "4711-1.30.0"
        fed.feed.tell(
            message(snapshot(stats=Stats(pool_size=15, max_overflow=5, in_use=4, idle=0, waiting=0)))
        )
        await screen.until("4 of 20")
        assert b"no feed" not in screen.raw


@pytest.mark.slow
async def test_a_feed_that_is_lost_is_said_to_be_and_found_again(fed: Fed) -> None:
    """Whatever is there meanwhile: a refusal, a proxy's page."""
    fed.feed.tell(message(snapshot()))
    async with terminal(fed.page, columns=120) as screen:
        await screen.until("18 of 20")
        fed.feed.reply = PlainTextResponse("starting", 503)
        fed.feed.end()
        await screen.until(r"no feed, again in \d+ s: http://.*/_stanch/feed answered 503")
        assert "18 of 20" in screen.text
        fed.feed.reply = PlainTextResponse("who?", 403)
        await screen.until("answered 403")
        fed.feed.reply = None
        await screen.until_gone("no feed")


@pytest.mark.slow
async def test_another_process_behind_the_address_leaves_nothing_of_the_first(fed: Fed) -> None:
    fed.feed.tell(happening(1, "of the old one"), "happening")
    fed.feed.tell(message(snapshot(), snapshot("billing")))
    async with terminal(fed.page) as screen:
        await screen.until("of the old one")
        fed.feed.forget()
        fed.feed.tell(happening(1, "of the new one"), "happening", mark="4712-2.0.1")
        fed.feed.tell(message(snapshot(pid=4712), run="4712-2"), mark="4712-2.0.1")
        await screen.until("of the new one")
        assert "of the old one" not in screen.text
        assert "of 2)" not in screen.text


# The terminal, given back ---------------------------------------------------------------------------------

ENDINGS: dict[str, tuple[str | signal.Signals, int]] = {
    "q": ("q", 0),
    "Ctrl-C": (chr(3), 130),
    "Ctrl-backslash": (chr(28), 131),
    "SIGTERM": (signal.SIGTERM, 143),
    "SIGHUP": (signal.SIGHUP, 129),
}


@pytest.mark.slow
@pytest.mark.parametrize(("end", "status"), ENDINGS.values(), ids=ENDINGS.keys())
async def test_however_it_ends_the_terminal_is_as_it_was(
    fed: Fed, end: str | signal.Signals, status: int
) -> None:
    fed.feed.tell(message(snapshot()))
    async with terminal(fed.page) as screen:
        await screen.until("18 of 20")
        assert screen.modes != screen.modes_before
        assert OTHER_SCREEN in screen.raw
        if isinstance(end, str):
            screen.type(end)
        else:
            screen.process.send_signal(end)
        assert await screen.status() == status
        assert screen.modes == screen.modes_before
        assert screen.raw.rstrip().endswith(BACK_AGAIN)
        assert CURSOR in screen.raw
        assert b"Traceback" not in screen.raw


@pytest.mark.slow
async def test_an_error_in_the_middle_gives_the_terminal_back_too(fed: Fed) -> None:
    """A planted bug: the drawing fails. Its traceback comes when the screen is the shell's again."""
    fed.feed.tell(message(snapshot()))
    planted = (
        "import sys; from stanch.cli import main; from stanch.cli.top import live\n"
        "def broken(*_, **__): raise ZeroDivisionError('planted')\n"
        "live.full_screen = broken\n"
        f"sys.exit(main(['top', {fed.page!r}]))"
    )
    async with Terminal([sys.executable, "-c", planted]) as screen:
        assert await screen.status() == 1
        assert screen.modes == screen.modes_before
        assert 0 < screen.raw.rfind(BACK_AGAIN) < screen.raw.rfind(b"planted")


@pytest.mark.slow
async def test_ctrl_z_hands_the_terminal_to_the_shell_and_fg_takes_it_back(fed: Fed) -> None:
    fed.feed.tell(message(snapshot()))
    async with terminal(fed.page) as screen:
        await screen.until("18 of 20")
        screen.type("\x1a")
        _, status = await asyncio.to_thread(os.waitpid, screen.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert screen.modes == screen.modes_before
        await screen.until_written(BACK_AGAIN)
        written = len(screen.raw)
        screen.process.send_signal(signal.SIGCONT)
        await screen.until_written(OTHER_SCREEN, after=written)
        screen.type("q")
        assert await screen.status() == 0
        assert screen.modes == screen.modes_before


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="with SIGHUP"),
        pytest.param({"owned": False}, id="nothing to read any more"),
        pytest.param({"owned": False, "typed": False}, id="nothing to write to any more"),
    ],
)
async def test_it_ends_when_its_terminal_is_gone(fed: Fed, options: dict[str, bool]) -> None:
    """And does not turn round and round."""
    fed.feed.tell(message(snapshot()))
    async with terminal(fed.page, **options) as screen:
        await screen.until("18 of 20")
        screen.hang_up()
        if not options.get("typed", True):
            fed.feed.tell(message(snapshot()))
        assert await screen.status() == 129


# The stream -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_a_stream_is_read_the_same_however_it_is_cut(ending: str, size: int) -> None:
    lines = [
        "\ufeff: hello",
        "retry: 7",
        "",
        "event: one",
        "data: ä\u2028漢",
        "data:b",
        "id: 9",
        "",
        "data",
        "",
        "event: x",
        "",
        "data: 2",
        "",
    ]
    raw = ending.join([*lines, ""]).encode()
    decoder = Decoder()
    chunks = [raw[start : start + size] for start in range(0, len(raw), size)]
    assert [sent for chunk in [*chunks, b"\n"] for sent in decoder.feed(chunk)] == [
        Sent("one", "ä\u2028漢\nb", "9"),
        Sent("message", "", "9"),
        Sent("message", "2", "9"),
    ]


def test_what_lacks_something_or_has_it_of_another_kind_is_unreadable() -> None:
    """And what has more than is known is read all the same: the app may be newer."""
    good: dict[str, Any] = json.loads(json.dumps(message(snapshot())))
    database = good["databases"][0]
    database |= {"new": 1, "stats": database["stats"] | {"refused": 3}}
    assert read_message(good).databases[0].snapshot == snapshot()

    def without(*path: str | int, value: Any = None) -> dict[str, Any]:
        copied: dict[str, Any] = json.loads(json.dumps(good))
        inner: Any = copied
        for step in path[:-1]:
            inner = inner[step]
        if value is None:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        return copied

    for broken in (
        {},
        without("worker"),
        without("databases"),
        without("databases", value=[1]),
        without("databases", 0, "pid"),
        without("databases", 0, "holders", value="none"),
        without("databases", 0, "holders", 0, "held", value="long"),
        without("databases", 0, "stats", "idle"),
        without("databases", 0, "waits", "buckets", value=["a"]),
        without("databases", 0, "unit_ends", value=[1]),
        without("databases", 0, "event_counts", "WorkDropped", value="often"),
        without("samples", "main", "idle", value=[1.5]),
    ):
        with pytest.raises(Unreadable):
            read_message(broken)


# The reference --------------------------------------------------------------------------------------------


def test_the_reference_of_the_command_names_every_option_and_status(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "reference" / "command.md").read_text(encoding="utf-8")
    for command in ("top", "explain"):
        assert f"## stanch {command}" in page
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        for option in set(re.findall(r"--[a-z]+", capsys.readouterr().out)) - {"--help"}:
            assert f"`{option}" in page, option
    for status in Status:
        assert f"| {status.value} |" in page
    for key in ("q", *Choice.keys):
        assert f"| `{key}` |" in page
    assert HEADERS_VARIABLE in page
