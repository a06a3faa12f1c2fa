"""The page in a real browser: what a person sees, can do, and is never made to run."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text
from starlette.requests import Request

from stanch import Database, dashboard
from stanch.accounts import Account
from stanch.callers import Place
from stanch.events import AttemptFailed, ConnectionLeaked, ConnectionSevered, HookFailed, LeakReturned
from stanch.fastapi import install
from stanch.ledger import Checkout
from stanch.measuring import Holding
from stanch.starlette import reader_of
from tests.dashboard.fed import PATH, Fed, app_of, page_of
from tests.dashboard.shop import LEAKING_LINE, customers, open_shop
from tests.support.browser import Visit, browsing, visiting
from tests.support.judge import FreshDatabase, assert_nothing_left
from tests.support.optional import needs
from tests.support.uvicorn_server import serve

if TYPE_CHECKING:
    from playwright.async_api import Browser

pytestmark = [pytest.mark.anyio, pytest.mark.slow, needs("chromium"), pytest.mark.timeout(120)]

PICTURE = Path(__file__).parents[2] / "docs" / "assets" / "dashboard.png"
TAKES_PICTURE = os.environ.get("STANCH_SCREENSHOTS") == "1"
"""Whether the picture in the README is to be taken anew; a test run else changes no file."""


@pytest.fixture(scope="module")
async def browser(anyio_backend: str) -> AsyncIterator[Browser]:
    async with browsing() as opened:
        yield opened


@asynccontextmanager
async def looking_at(browser: Browser, app: Any, **options: Any) -> AsyncGenerator[Visit]:
    """A visitor of the page of *app*, who has seen its first numbers; the visit ends before the server does."""
    async with (
        serve(app) as url,
        visiting(browser, url.replace("127.0.0.1", "localhost") + PATH, **options) as visit,
    ):
        await visit.page.locator("#link[data-state=live]").wait_for()
        yield visit


async def seen(visit: Visit, selector: str, pattern: str, *, within: float = 10.0) -> str:
    """What stands at *selector*, as soon as it matches."""
    found = visit.page.locator(selector).filter(has_text=re.compile(pattern)).first
    await found.wait_for(timeout=within * 1000)
    return await found.inner_text()


# A real app under load ------------------------------------------------------------------------------------


async def test_the_page_draws_live_data_during_load_and_a_leak_by_file_and_line(
    fresh_database: FreshDatabase, driver: str, browser: Browser
) -> None:
    leak_after = 1.0
    async with (
        open_shop(fresh_database, driver, leak_after=leak_after) as shop,
        looking_at(browser, shop.app) as visit,
        customers(5, home := visit.page.url.removesuffix(f"{PATH}/")),
    ):
        await seen(visit, ".tile.in_use strong", r"[1-6] of 6")
        drawn = await visit.page.evaluate(DRAWN)
        await seen(visit, "#routes tr", r"POST /orders")
        await seen(visit, "#routes tr", r"GET /basket.*▲", within=15)
        await seen(visit, "#holders tr", r"GET /report[\s\S]*shop\.py:\d+ in build_report\(\)", within=20)
        shape = await seen(visit, "#statements tr", r"SELECT id FROM orders WHERE id = \?")
        assert "= 1" not in shape
        await visit.page.wait_for_function(f"before => {DRAWN} !== before", arg=drawn)
        assert await visit.page.evaluate(INKED) > 500, "the chart is empty"

        async with httpx.AsyncClient(base_url=home) as client:
            assert (await client.get("/export")).status_code == 200
        begun = time.monotonic()
        told = await seen(visit, "#leaks tbody tr", "export_orders", within=leak_after + 2)
        appeared = time.monotonic() - begun
        print(f"a leak was on the page after {appeared:.2f} s, leak_after={leak_after:g}")
        assert leak_after * 0.9 <= appeared <= leak_after + 2
        assert f"shop.py:{LEAKING_LINE} in export_orders()" in told
        await seen(visit, "#events li", "ConnectionLeaked")

        await shop.forgotten.aclose()
        await seen(visit, "#leaks tbody tr", "✓ came back")
        visit.assert_calm()


@pytest.mark.timeout(240)
async def test_sessions_that_leak_one_by_one_are_a_picture(
    fresh_database: FreshDatabase, browser: Browser
) -> None:
    """With STANCH_SCREENSHOTS=1 it takes long enough to be the one in the README; else it leaks two and looks."""
    leaks, pause, rest = (5, 16.0, 8.0) if TAKES_PICTURE else (2, 0.3, 0.0)
    async with (
        open_shop(fresh_database, "asyncpg", leak_after=4.0 if TAKES_PICTURE else 0.5, pool_size=6) as shop,
        looking_at(browser, shop.app, viewport={"width": 1120, "height": 1030}) as visit,
        customers(7, home := visit.page.url.removesuffix(f"{PATH}/")),
        httpx.AsyncClient(base_url=home, timeout=30) as client,
    ):
        for _ in range(leaks):
            await asyncio.sleep(pause)
            await client.get("/export")
        await visit.page.wait_for_function(
            "leaks => document.querySelector('.tile.leaks strong').textContent === String(leaks)", arg=leaks
        )
        await asyncio.sleep(rest)
        if TAKES_PICTURE:
            await seen(visit, ".tile.waiting strong", r"[2-9]", within=30)
        picture = await visit.page.screenshot(path=PICTURE if TAKES_PICTURE else None)
        assert len(picture) < 250_000
        await shop.forgotten.aclose()
        visit.assert_calm()


DRAWN = "document.querySelector('#chart canvas').toDataURL()"
INKED = """() => {
    const canvas = document.querySelector("#chart canvas");
    const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return data.filter((value, place) => place % 4 === 3 && value > 200).length;
}"""
"""How many points of the chart are drawn at all."""


# Who may see it -------------------------------------------------------------------------------------------


async def test_who_is_not_let_in_sees_nothing_and_who_was_is_told_when_it_is_over(
    browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Access is asked for at each turn of the feed: a visitor whose session has ended does not go on watching."""
    monkeypatch.setattr(dashboard, "_TURN", 1.0)
    known = {"alice"}
    page = page_of(Fed("ledger"), access=lambda request: request.headers.get("x-user") in known)
    async with serve(app_of(page)) as url:
        async with visiting(browser, url + PATH) as stranger:
            assert "403" in " ".join(stranger.complaints)
            assert "ledger" not in await stranger.page.content()
            assert {urlpath(asked) for asked in stranger.asked} <= {PATH, "/favicon.ico"}
        async with visiting(browser, url + PATH, extra_http_headers={"x-user": "alice"}) as visit:
            await visit.page.locator("#link[data-state=live]").wait_for()
            known.clear()
            await visit.page.locator("#link[data-state=refused]").wait_for(timeout=10_000)
            assert "no longer let in (403)" in await visit.text("#link")
            visit.assert_calm(but=("403",))


def urlpath(url: str) -> str:
    return "/" + url.split("/", 3)[3].rstrip("/")


async def test_one_viewer_too_many_still_sees_numbers(
    browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "VIEWERS", 0)
    fed = Fed()
    fed.in_use = 4
    async with serve(app_of(page_of(fed))) as url, visiting(browser, url + PATH) as visit:
        await visit.page.locator("#link[data-state=polling]").wait_for()
        await seen(visit, ".tile.in_use strong", "4 of 7")
        visit.assert_calm(but=("503",))


# What is never run ----------------------------------------------------------------------------------------

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    '"><script>window.pwned = 1</script>',
    "<svg/onload=alert(2)>",
    "javascript:alert(3)",
    "{{7*7}}${7*7}",
    "</td></tr></table><style>*{display:none}</style>",
    "\u202egnirts\u2028two\u2029lines\x00\x1b[31m",
)


def hostile(name: str = "main") -> Fed:
    """A database of which every text is an attempt."""
    fed = Fed(name)
    fed.in_use, fed.waiting = 7, 2
    for attempt in HOSTILE:
        account = Account(attempt, Place(attempt, 1, attempt))
        account.held, account.statements = 1.0, 3
        fed.measuring.closed(account)
        fed.measuring.executed(f"SELECT {attempt}", 0.1, None, lambda at=attempt: Place(at, 7, at), None)  # type: ignore[misc]
        fed.holding.append(Holding(attempt, attempt, attempt, 5.0, 0.1, 2, attempt))
        fed.measuring.note(ConnectionLeaked(name, attempt, attempt, attempt, attempt, 2.0, 0.1))
        fed.measuring.note(ConnectionSevered(name, attempt))
        fed.measuring.note(HookFailed(name, attempt, attempt, attempt, ValueError(attempt)))
        fed.measuring.note(AttemptFailed(attempt, attempt, 1, attempt, 0.1))
    return fed


async def test_whatever_is_written_into_a_name_stays_text(browser: Browser) -> None:
    databases = [hostile(HOSTILE[0]), hostile(HOSTILE[1])]
    async with looking_at(browser, app_of(page_of(*databases))) as visit:
        for place in ("#holders", "#leaks", "#routes", "#events", "#databases"):
            shown = await visit.page.locator(place).inner_text()
            assert HOSTILE[0] in shown, place
            assert place == "#databases" or HOSTILE[2] in shown, place
        assert HOSTILE[2].removesuffix(">") in await visit.page.locator("#statements").inner_text()
        await visit.page.locator("#databases button").nth(1).click()
        await seen(visit, "#databases [aria-current]", "script")
        made = visit.page.locator("main :is(script, style, img, iframe, [onload], [onerror])")
        assert await made.count() == 0
        assert await visit.page.evaluate("window.pwned") is None
        assert await visit.page.locator("main").is_visible()
        visit.assert_calm()


TRY_EVERYTHING = """async () => {
    await new Promise((done) => setTimeout(done));  // what the debugger calls may eval; what it is called back by, not
    const held = [];
    const attempt = async (name, act) => { try { await act(); } catch { held.push(name); } };
    await attempt("markup", () => { document.body.innerHTML += "<b>x</b>"; });
    await attempt("eval", () => eval("window.ran = 1"));
    await attempt("script", () => {
        const script = document.createElement("script");
        script.textContent = "window.ran = 1";
        document.body.append(script);
    });
    await attempt("fetch", () => fetch("http://127.0.0.1:9/"));
    const frame = document.createElement("iframe");
    frame.src = location.href;
    document.body.append(frame);
    await new Promise((done) => setTimeout(done, 200));
    await attempt("frame", () => { if (!frame.contentDocument.querySelector("main")) throw new Error(); });
    return window.ran ? ["ran"] : held;
}"""


async def test_the_browser_itself_would_not_run_it(browser: Browser) -> None:
    """The second wall, should the first have a hole: no inline code, no string becomes markup, nothing is fetched."""
    async with looking_at(browser, app_of(page_of(Fed()))) as visit:
        blocked = await visit.page.evaluate(TRY_EVERYTHING)
        assert set(blocked) >= {"markup", "eval", "fetch", "frame"}
        assert all(re.search("Content Security Policy|Trusted|frame", said) for said in visit.complaints)


# Who looks, and with what ---------------------------------------------------------------------------------


def lively(name: str = "main") -> Fed:
    fed = Fed(name)
    fed.in_use, fed.idle, fed.waiting = 7, 0, 3
    for index, route in enumerate(("GET /a", "POST /b", "GET /c/{id}")):
        for _ in range(index + 1):
            account = Account(route)
            account.held, account.statements, account.sql_time = 3.0 - index, 12, 0.4
            fed.measuring.closed(account)
            fed.measuring.returned(Checkout(None, 0.0, account), 0.02)
            fed.measuring.waited(0.004, "served", account)
        fed.measuring.executed(
            f"SELECT {route.lower()[-1]}x FROM t", 0.2, None, lambda: Place("a.py", 1, "f"), None
        )
        fed.holding.append(
            Holding(
                route,
                "shop.py:10 in f()",
                "shop.py:11 in f()",
                40.0 - index,
                0.01,
                2,
                "in use, no SQL running",
            )
        )
    fed.measuring.waited(5.0, "timeout", Account("GET /a"))
    fed.measuring.note(
        ConnectionLeaked(
            name, "GET /a", "shop.py:10 in f()", "shop.py:11 in f()", "idle in transaction", 30.0, 0.1
        )
    )
    fed.measuring.note(LeakReturned(name, "GET /a", "shop.py:10 in f()", 31.0, 0.1))
    fed.measuring.note(
        ConnectionLeaked(name, "GET /b", "shop.py:20 in g()", "?", "its task is gone", 30.0, 0.1)
    )
    fed.measuring.note(HookFailed(name, "POST /b", "send()", "shop.py:3 in h()", ValueError()))
    return fed


async def test_everything_can_be_done_from_the_keyboard(browser: Browser) -> None:
    async with looking_at(browser, app_of(page_of(lively(), lively("other")))) as visit:
        keyboard = visit.page.keyboard
        focused = "document.activeElement.textContent.trim()"
        order: list[str] = []
        for _ in range(5):
            await keyboard.press("Tab")
            order.append(await visit.page.evaluate(focused))
        assert order == ["Skip to the numbers", "main", "other", "Pause", "Theme: auto"]

        await visit.page.locator(".skip").focus()
        await keyboard.press("Enter")
        await keyboard.press("Tab")
        assert await visit.page.evaluate("document.activeElement.closest('main') !== null")

        units = visit.page.locator("#routes th button", has_text="units")
        await units.focus()
        await keyboard.press("Enter")
        assert await visit.page.locator("#routes th[aria-sort]").get_attribute("aria-sort") == "descending"
        names = visit.page.locator("#routes tbody tr td:first-child")
        assert await names.all_inner_texts() == ["GET /c/{id}", "POST /b", "GET /a"]
        await keyboard.press("Enter")
        assert await names.all_inner_texts() == ["GET /a", "POST /b", "GET /c/{id}"]
        at = await visit.text("#worker")
        await visit.page.wait_for_function(
            "at => document.querySelector('#worker').textContent !== at", arg=at
        )
        assert await visit.page.evaluate(focused) == "units", "the next sample took the focus away"
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert await visit.page.evaluate(outline) == "solid"
        visit.assert_calm()


async def test_a_paused_page_stands_still_until_it_may_go_on(browser: Browser) -> None:
    fed = lively()
    async with looking_at(browser, app_of(page_of(fed))) as visit:
        await visit.page.locator("#pause").click()
        assert await visit.page.locator("#pause").get_attribute("aria-pressed") == "true"
        fed.in_use = 1
        samples = visit.page.locator("#link[data-state=paused]")
        await samples.wait_for()
        await asyncio.sleep(2.2)  # two more snapshots
        assert "7 of 7" in await visit.text(".tile.in_use strong")
        await visit.page.locator("#pause").click()
        await seen(visit, ".tile.in_use strong", "1 of 7")
        visit.assert_calm()


CONTRAST = """() => {
    const parse = (colour) => (colour.match(/[\\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
    const linear = (part) => (part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const ground = (node) => {
        for (; node; node = node.parentElement) {
            const [r, g, b, a = 1] = parse(getComputedStyle(node).backgroundColor);
            if (a > 0) return [r, g, b];
        }
        return [255, 255, 255];
    };
    const ratio = (node) => {
        const both = [light(parse(getComputedStyle(node).color)), light(ground(node))];
        return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
    };
    const poor = {};
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    let seen = 0;
    while (walker.nextNode()) {
        const node = walker.currentNode.parentElement;
        const text = walker.currentNode.textContent.trim();
        if (!text || !node.checkVisibility() || node.closest(".unseen, .skip, noscript")) continue;
        seen += 1;
        if (ratio(node) < 4.5) poor[`${node.className} ${text.slice(0, 30)}`] = ratio(node).toFixed(2);
    }
    for (const series of document.querySelectorAll(".series svg")) {
        if (ratio(series) < 3) poor[series.parentElement.className] = ratio(series).toFixed(2);
    }
    return {seen, poor};
}"""
"""WCAG 2.2: text at least 4.5 to 1, what is drawn at least 3 to 1."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_everything_can_be_read_in_light_and_dark(browser: Browser, scheme: Any) -> None:
    async with looking_at(browser, app_of(page_of(lively())), color_scheme=scheme) as visit:
        await seen(visit, "#leaks tr", "not back")
        read = await visit.page.evaluate(CONTRAST)
        assert read["seen"] > 100
        assert read["poor"] == {}
        ground = await visit.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        is_dark = sum(int(part) for part in re.findall(r"\d+", ground)[:3]) < 200
        assert is_dark == (scheme == "dark")

        theme = visit.page.locator("#theme")
        for word in ("light", "dark"):
            await theme.click()
            assert await theme.inner_text() == f"Theme: {word}"
        await visit.page.reload()
        assert await theme.inner_text() == "Theme: dark"
        assert await visit.page.evaluate("Object.keys(localStorage).join()") == "stanch-theme"
        assert await visit.page.context.cookies() == []
        visit.assert_calm()


async def test_a_series_is_told_apart_without_its_colour(browser: Browser) -> None:
    async with looking_at(browser, app_of(page_of(lively()))) as visit:
        lines = visit.page.locator("#legend line")
        looks = [
            (await line.get_attribute("stroke-dasharray"), await line.get_attribute("stroke-width"))
            for line in await lines.all()
        ]
        assert len(set(looks)) == len(looks) == 4
        assert len({dash for dash, _ in looks}) == 4
        assert "7" in (await visit.page.locator("#chart").get_attribute("aria-label") or "")
        visit.assert_calm()


CUT = """() => [...document.querySelectorAll("td, .tile > *, h2, button, li")]
    .filter((node) => node.checkVisibility() && node.getBoundingClientRect().right > innerWidth + 1)
    .map((node) => node.outerHTML)"""


@pytest.mark.parametrize("width", [360, 768, 1920])
async def test_nothing_is_wider_than_the_screen(browser: Browser, width: int) -> None:
    fed = lively()
    long = "x" * 300
    fed.holding.append(Holding(f"GET /{long}", f"{long}.py:1 in {long}()", long, 99.0, 0.1, 1, "running SQL"))
    fed.measuring.executed(
        f"SELECT {long} FROM {long}", 9.0, None, lambda: Place(f"{long}.py", 1, long), None
    )
    account = Account(f"GET /{long}")
    account.held = 1e6
    fed.measuring.closed(account)
    fed.measuring.note(ConnectionLeaked("main", long, long, long, long, 2.0, 0.1))
    async with looking_at(browser, app_of(page_of(fed)), viewport={"width": width, "height": 800}) as visit:
        await seen(visit, "#holders tr", "xxx")
        assert await visit.page.evaluate("document.documentElement.scrollWidth") == width
        cut = await visit.page.evaluate(CUT)
        assert cut == []
        visit.assert_calm()


OUTSIDE = """() => [...document.querySelectorAll(".panel td")]
    .filter((node) => {
      const panel = node.closest(".panel"), padding = parseFloat(getComputedStyle(panel).paddingRight);
      return node.getBoundingClientRect().right > panel.getBoundingClientRect().right - padding + 1;
    })
    .map((node) => node.outerHTML)"""


@pytest.mark.parametrize("width", [360, 768, 840, 1024])
async def test_the_figures_of_a_busy_pool_stay_in_their_panel(browser: Browser, width: int) -> None:
    fed = lively()
    for _ in range(20_000):
        fed.measuring.waited(0.3, "served", None)
    async with looking_at(browser, app_of(page_of(fed)), viewport={"width": width, "height": 800}) as visit:
        await seen(visit, ".times td", "20,007")
        assert await visit.page.evaluate(OUTSIDE) == []


async def test_who_wants_no_motion_sees_none(browser: Browser) -> None:
    async with looking_at(browser, app_of(page_of(Fed())), reduced_motion="reduce") as visit:
        assert await visit.page.evaluate("document.getAnimations().length") == 0
        visit.assert_calm()


async def test_what_is_not_there_yet_is_said(browser: Browser) -> None:
    async with looking_at(browser, app_of(page_of(Fed()))) as visit:
        for place, said in (
            ("#holders", "Nobody holds a connection now"),
            ("#leaks", "No leak was found"),
            ("#routes", "No unit of work has ended yet"),
            ("#statements", "No statement has ended yet"),
            ("#events-empty", "Nothing has happened"),
        ):
            assert said in await visit.text(place)
        assert await visit.page.locator("table:visible thead button").count() == 0
        visit.assert_calm()


async def test_several_databases_are_shown_one_at_a_time(browser: Browser) -> None:
    first, second = lively("first"), lively("second")
    first.in_use, second.in_use = 2, 5
    async with looking_at(browser, app_of(page_of(first, second))) as visit:
        await seen(visit, ".tile.in_use strong", "2 of 7")
        await visit.page.locator("#databases button", has_text="second").click()
        assert "5 of 7" in await visit.text(".tile.in_use strong")
        second.in_use = 6
        await seen(visit, ".tile.in_use strong", "6 of 7")
        visit.assert_calm()


# What it is connected to ----------------------------------------------------------------------------------

APP = """
from fastapi import FastAPI
from stanch import Database
from stanch.events import ConnectionSevered
from stanch.fastapi import install
app = FastAPI()
db = Database("sqlite+aiosqlite://")
install(app, db, dashboard="/_stanch", dashboard_access="loopback")

@app.get("/happen/{what}")
async def happen(what: str) -> None:
    db.tell(ConnectionSevered(database="main", reason=what))
"""


@asynccontextmanager
async def uvicorn(folder: Path, port: int) -> AsyncGenerator[httpx.AsyncClient]:
    (folder / "served.py").write_text(APP)
    command = [sys.executable, "-m", "uvicorn", "served:app", "--port", str(port), "--app-dir", str(folder)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # noqa: ASYNC220  # the start of a child is quick
    try:
        async with httpx.AsyncClient(base_url=f"http://localhost:{port}") as client, asyncio.timeout(20):
            while True:
                with suppress(httpx.TransportError):
                    await client.get("/")
                    break
                await asyncio.sleep(0.05)
        async with httpx.AsyncClient(base_url=f"http://localhost:{port}") as client:
            yield client
    finally:
        server.send_signal(signal.SIGTERM)
        await asyncio.to_thread(server.wait, 20)


@pytest.mark.long
async def test_the_page_comes_back_after_a_restart_and_keeps_both_workers_apart(
    browser: Browser, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    async with AsyncExitStack() as stack:
        async with uvicorn(tmp_path, port) as client:
            visit = await stack.enter_async_context(visiting(browser, f"http://localhost:{port}{PATH}"))
            await client.get("/happen/before")
            await seen(visit, "#events li", "before")
            first = await visit.text("#of-worker")
            await asyncio.sleep(1.1)  # one more sample
        # The server has ended within its time, though the page is open. The page says so.
        await visit.page.locator("#link[data-state=lost]").wait_for(timeout=15_000)
        assert "reconnecting" in await visit.text("#link")
        async with uvicorn(tmp_path, port) as client:
            await visit.page.locator("#link[data-state=live]").wait_for(timeout=20_000)
            second = await visit.text("#of-worker")
            assert first != second
            assert (
                f"Now connected to {second}; before it was {first.removeprefix('worker ')}"
                in await visit.text("#notice")
            )
            assert await visit.page.locator("#events li").count() == 0, (
                "the old worker's event is drawn as the new one's"
            )
            await client.get("/happen/after")
            await seen(visit, "#events li", "after")
            await visit.page.locator("#workers button", has_text=first).click()
            assert "before" in await visit.text("#events")
            assert "after" not in await visit.text("#events")
            assert "It is not connected any more" in await visit.text("#worker")
            visit.assert_calm(
                but=("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_CONNECTION_RESET")
            )


WATCH_STATES = """() => {
    const link = document.querySelector("#link");
    window.states = [];
    new MutationObserver(() => window.states.push(link.dataset.state)).observe(link, {attributes: true});
}"""
TURNS = (
    "() => performance.getEntriesByType('resource').filter(({name}) => name.endsWith('/feed')).length >= 3"
)


@pytest.mark.long
async def test_turns_of_the_feed_are_not_seen(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    """The feed ends often, and the browser comes back: no gap in the chart, no word of it on the page."""
    monkeypatch.setattr(dashboard, "_TURN", 1.5)
    fed = lively()
    async with looking_at(browser, app_of(page_of(fed))) as visit:
        await visit.page.evaluate(WATCH_STATES)
        await visit.page.wait_for_function(TURNS, timeout=20_000)
        fed.measuring.note(ConnectionSevered("main", "meanwhile"))
        await seen(visit, "#events li", "meanwhile")
        assert await visit.page.locator("#events li", has_text="meanwhile").count() == 1
        assert set(await visit.page.evaluate("window.states")) <= {"live"}
        visit.assert_calm()


async def test_a_visitor_with_a_session_of_the_app_is_judged_with_it(
    fresh_database: FreshDatabase, browser: Browser
) -> None:
    """An access check may ask the database; the feed that it lets in holds no connection."""

    async def is_admin(request: Request) -> bool:
        session = await reader_of(request)
        return bool((await session.execute(text("SELECT true"))).scalar_one())

    app = FastAPI()
    db = Database(fresh_database.url("asyncpg"), pool_size=1, max_overflow=0)
    install(app, db, dashboard=PATH, dashboard_access=is_admin)
    async with serve(app) as url, visiting(browser, url + PATH) as visit:
        await visit.page.locator("#link[data-state=live]").wait_for()
        assert db.stats().in_use == 0
        visit.assert_calm()
    await assert_nothing_left(fresh_database, db)
