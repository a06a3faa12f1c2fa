"""The page shows itself only to those who are let in, and to nobody by oversight."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException
from starlette.requests import Request

from stanch import Database
from stanch.dashboard import Access
from stanch.errors import ConfigError
from stanch.fastapi import install
from tests.dashboard.fed import PATH, Fed, app_of, page_of, visitor

pytestmark = pytest.mark.anyio

PARTS = ["", "/", "/main.js", "/uplot.js", "/snapshot", "/feed", "/nothing", "/..%2f..%2faccess.py"]


async def statuses(app: Any, *, headers: dict[str, str] | None = None, **who: str) -> set[int]:
    async with visitor(app, **who) as client:
        return {(await client.get(PATH + part, headers=headers)).status_code for part in PARTS}


async def test_nobody_is_let_in_unless_somebody_says_so() -> None:
    app = app_of(page_of(Fed(), access=None))
    assert await statuses(app) == {403}
    async with visitor(app) as client:
        assert "given no dashboard_access" in (await client.get(PATH)).text


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "LOCALHOST", "127.0.0.1:80", "[::1]:8000", "127.8.9.1"]
)
@pytest.mark.parametrize("client", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
async def test_loopback_lets_in_who_is_here_and_asks_by_a_name_of_here(host: str, client: str) -> None:
    async with visitor(app_of(page_of(Fed())), client=client) as visiting:
        assert (await visiting.get(f"{PATH}/snapshot", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "client", ["10.0.0.7", "192.168.1.2", "::ffff:10.0.0.7", "2001:db8::1", "", "localhost.evil"]
)
async def test_loopback_refuses_who_comes_from_elsewhere(client: str) -> None:
    assert await statuses(app_of(page_of(Fed())), client=client) == {403}


@pytest.mark.parametrize(
    "host",
    [
        "shop.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "0.0.0.0",
        "[::1].evil",
        "",
        "localhost@evil",
    ],
)
async def test_loopback_refuses_a_name_that_only_leads_here(host: str) -> None:
    """DNS rebinding: a page of that name would be of the same origin."""
    assert await statuses(app_of(page_of(Fed())), headers={"host": host}) == {403}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Forwarded-For", "127.0.0.1"),
        ("x-forwarded-host", "localhost"),
        ("x-forwarded-proto", "https"),
        ("Forwarded", "for=127.0.0.1"),
        ("X-Real-IP", "127.0.0.1"),
        ("Via", "1.1 proxy"),
        ("CF-Connecting-IP", "127.0.0.1"),
    ],
)
async def test_loopback_refuses_what_came_through_a_proxy(name: str, value: str) -> None:
    """The proxy stands on this machine, its client may be anywhere."""
    assert await statuses(app_of(page_of(Fed())), headers={name: value}) == {403}


async def test_loopback_refuses_http_1_0_which_only_proxies_speak_and_a_caller_without_address() -> None:
    async def reply(scope: dict[str, Any]) -> int:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "http.request"}

        whole = {
            "type": "http", "method": "GET", "path": f"{PATH}/snapshot", "query_string": b"", "root_path": "",
            "scheme": "http", "server": ("localhost", 80), "path_params": {"rest": "snapshot"},
            "headers": [(b"host", b"localhost")],
        }  # fmt: skip
        await page(whole | scope, receive, send)
        return int(sent[0]["status"])

    page = page_of(Fed())
    here = ("127.0.0.1", 5)
    assert await reply({"client": here, "http_version": "1.1"}) == 200
    assert await reply({"client": here, "http_version": "1.0"}) == 403
    assert await reply({"client": None, "http_version": "1.1"}) == 403
    two = [(b"host", b"localhost"), (b"host", b"evil.example")]
    assert await reply({"client": here, "http_version": "1.1", "headers": two}) == 403


def is_known(request: Request) -> bool:
    return request.headers.get("authorization") == "let me in"


async def is_known_async(request: Request) -> bool:
    return is_known(request)


class Known:
    async def __call__(self, request: Request) -> bool:
        return is_known(request)


@pytest.mark.parametrize(
    "access", [is_known, is_known_async, Known()], ids=["function", "coroutine", "object"]
)
async def test_a_function_lets_in_whom_it_says_true_of(
    access: Callable[[Request], bool | Awaitable[bool]],
) -> None:
    app = app_of(page_of(Fed(), access=access))
    assert await statuses(app, client="10.0.0.7", host="shop.example") == {403}
    async with visitor(app, client="10.0.0.7", host="shop.example") as client:
        knows = {"authorization": "let me in"}
        assert (await client.get(f"{PATH}/", headers=knows)).status_code == 200


@pytest.mark.parametrize("answer", [None, 0, "", 1, "alice", {"user": "alice"}], ids=repr)
async def test_whatever_is_not_true_refuses_also_what_python_takes_for_true(
    answer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A check that returns the user, whoever that is, must not let everybody in."""
    with caplog.at_level(logging.WARNING, "stanch"):
        assert await statuses(app_of(page_of(Fed(), access=lambda _request: answer))) == {403}
    assert f"dashboard_access returned {type(answer).__name__}, which is not True" in caplog.text
    assert "alice" not in caplog.text


async def test_what_a_function_raises_is_answered_by_the_app() -> None:
    def ask_for_a_password(_request: Request) -> bool:
        raise HTTPException(401, headers={"www-authenticate": "Basic"})

    app = FastAPI()
    install(app, Database("sqlite+aiosqlite://"), dashboard=PATH, dashboard_access=ask_for_a_password)
    async with visitor(app) as client:
        reply = await client.get(PATH)
    assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Basic")


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_what_the_page_of_another_site_asks_for_is_refused_but_a_link_leads_here(site: str) -> None:
    app = app_of(page_of(Fed(), access=lambda _request: True))
    assert await statuses(app, headers={"sec-fetch-site": site, "sec-fetch-mode": "cors"}) == {403}
    assert await statuses(app, headers={"sec-fetch-site": site, "sec-fetch-mode": "no-cors"}) == {403}
    async with visitor(app) as client:
        followed = {"sec-fetch-site": site, "sec-fetch-mode": "navigate"}
        assert (await client.get(f"{PATH}/", headers=followed)).status_code == 200
        assert (await client.get(f"{PATH}/", headers={"sec-fetch-site": "same-origin"})).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
async def test_the_page_is_only_for_looking(method: str) -> None:
    async with visitor(app_of(page_of(Fed()))) as client:
        reply = await client.request(method, f"{PATH}/snapshot")
    assert (reply.status_code, reply.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dashboard": PATH, "dashboard_access": "everyone"}, "dashboard_access is str"),
        ({"dashboard": PATH, "dashboard_access": True}, "dashboard_access is bool"),
        ({"dashboard": "_stanch"}, "begins with a slash"),
        ({"dashboard": "/_stanch/"}, "does not end with one"),
        ({"dashboard_access": "loopback"}, "there is no dashboard"),
    ],
)
def test_a_wrong_word_is_refused_where_it_is_written(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        install(FastAPI(), Database("sqlite+aiosqlite://"), **options)
    assert refused.value.remedies


async def test_there_is_no_page_where_none_was_asked_for() -> None:
    app = FastAPI()
    install(app, Database("sqlite+aiosqlite://"))
    assert await statuses(app) == {404}


async def test_the_page_is_no_part_of_the_apps_documentation() -> None:
    app = FastAPI()
    install(app, Database("sqlite+aiosqlite://"), dashboard=PATH, dashboard_access="loopback")
    assert PATH not in str(app.openapi())


def test_access_is_typed() -> None:
    allowed: list[Access] = ["loopback", is_known, is_known_async, Known()]
    assert len(allowed) == 4
