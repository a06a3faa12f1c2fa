"""The clients of one shop: they play the script over real HTTP and write down what they were told."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final, Self

import httpx

from stanch.demo.journal import HANG_UPS, Entry, Journal, Kind, Outcome
from stanch.demo.shop import USED_COUPON, Card

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stanch.demo.script import Act

AT_ONCE: Final = 24
"""Clients that are inside one shop at the same time, at most."""

REPLY_TIMEOUT: Final = 12.0
STRAGGLERS: Final = 15.0
"""Seconds that are waited for replies after the last act was due."""

TICKER_LINES: Final = 6
NO_SUCH_ITEM: Final = 999
UNKNOWN_OUTCOME: Final = "commit-outcome-unknown"
"""How the type of a problem+json reply ends that does not say *failed*."""

_CARDS: Final = {
    Kind.RAISED: Card.DECLINED,
    Kind.RETURNED: Card.OVER_LIMIT,
    Kind.STATUS_SET: Card.IN_REVIEW,
    Kind.INVALID: Card.FOREIGN,
}


class Clients:
    """The clients of the shop at *url*; ``async with`` opens and closes their connections."""

    def __init__(self, url: str, journal: Journal) -> None:
        self._journal = journal
        self._http = _client(url)
        self._second = _client(url)
        """A second client, so that what is read back never queues behind the reply to the write."""
        self._fickle = _client(url, max_keepalive_connections=0)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for client in (self._http, self._second, self._fickle):
            await self._stack.enter_async_context(client)
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self._stack.aclose()

    async def play(self, script: Sequence[Act]) -> None:
        """Play *script*, each act when it is due or as soon as there is a free client; bounded in time."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        free = asyncio.Semaphore(AT_ONCE)
        acting: set[asyncio.Task[None]] = set()

        def leave(task: asyncio.Task[None]) -> None:
            acting.discard(task)
            free.release()

        try:
            async with asyncio.timeout(script[-1].due + STRAGGLERS if script else None):
                for act in script:
                    await asyncio.sleep(start + act.due - loop.time())
                    await free.acquire()
                    task = asyncio.create_task(self._act(act))
                    acting.add(task)
                    task.add_done_callback(leave)
                await asyncio.gather(*acting)
        except TimeoutError:
            pass  # what has no reply by now has no entry
        finally:
            for task in acting:
                task.cancel()
            await asyncio.gather(*acting, return_exceptions=True)

    async def _act(self, act: Act) -> None:
        if act.kind in HANG_UPS:
            await self._hang_up(act)
        elif act.kind is Kind.STREAM:
            await self._follow(act)
        elif act.kind is Kind.READ:
            await self._read(act)
        else:
            await self._write(act)

    async def _write(self, act: Act) -> None:
        path, order = _order(act)
        since = time.perf_counter()
        outcome = await _ask(self._http, "POST", path, json=order)
        seconds = time.perf_counter() - since
        found = None
        if act.kind is Kind.PAIR and outcome is Outcome.SUCCESS:
            found = await self._look(act)
        self._journal.add(
            Entry(kind=act.kind, outcome=outcome, seconds=seconds, wrote=act.order_id, found=found)
        )

    async def _look(self, act: Act) -> bool | None:
        try:
            status = (await self._second.get(f"/orders/{act.order_id}")).status_code
        except httpx.HTTPError:
            return None
        return {200: True, 404: False}.get(status)

    async def _read(self, act: Act) -> None:
        path = f"/orders/{act.order_id}" if act.quantity > 1 else "/items"
        since = time.perf_counter()
        outcome = await _ask(self._http, "GET", path)
        self._journal.add(Entry(kind=act.kind, outcome=outcome, seconds=time.perf_counter() - since))

    async def _follow(self, act: Act) -> None:
        since = time.perf_counter()
        outcome = Outcome.NO_REPLY
        try:
            reply = await self._http.get("/orders/ticker", params={"lines": TICKER_LINES})
        except httpx.HTTPError:
            pass  # a stream that breaks off is no reply
        else:
            whole = reply.text.count("\n") == TICKER_LINES
            outcome = Outcome.SUCCESS if reply.is_success and whole else Outcome.ERROR
        self._journal.add(Entry(kind=act.kind, outcome=outcome, seconds=time.perf_counter() - since))

    async def _hang_up(self, act: Act) -> None:
        since = time.perf_counter()
        try:
            async with asyncio.timeout(act.patience if act.kind is Kind.HANGS_UP else REPLY_TIMEOUT):
                outcome = await self._lose_patience(act)
        except TimeoutError:
            outcome = Outcome.HUNG_UP
        except httpx.HTTPError:
            outcome = Outcome.NO_REPLY
        self._journal.add(Entry(kind=act.kind, outcome=outcome, seconds=time.perf_counter() - since))

    async def _lose_patience(self, act: Act) -> Outcome:
        """End by the timeout, or by walking away from a stream after its first line; else too late."""
        if act.kind is Kind.HANGS_UP:
            path, order = _order(act)
            return _judge(await self._fickle.post(path, json=order))
        async with self._fickle.stream("GET", "/orders/ticker", params={"lines": TICKER_LINES}) as reply:
            if not reply.is_success:
                return Outcome.ERROR
            async for _ in reply.aiter_lines():
                return Outcome.HUNG_UP
        return Outcome.NO_REPLY


def _client(url: str, **limits: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=url,
        timeout=REPLY_TIMEOUT,
        limits=httpx.Limits(max_connections=None, **limits),
        trust_env=False,  # a proxy of the environment has no business on loopback
    )


async def _ask(client: httpx.AsyncClient, method: str, path: str, **options: Any) -> Outcome:
    try:
        return _judge(await client.request(method, path, **options))
    except httpx.HTTPError:
        return Outcome.NO_REPLY


def _judge(reply: httpx.Response) -> Outcome:
    if reply.is_success:
        return Outcome.SUCCESS
    is_problem = reply.headers.get("content-type", "").startswith("application/problem+json")
    if is_problem and str(reply.json().get("type", "")).endswith(UNKNOWN_OUTCOME):
        return Outcome.UNKNOWN
    return Outcome.ERROR


def _order(act: Act) -> tuple[str, Mapping[str, Any]]:
    order: dict[str, Any] = {"id": str(act.order_id), "item_id": act.item_id, "quantity": act.quantity}
    match act.kind:
        case Kind.FAILING_COMMIT:
            return "/orders", order | {"item_id": NO_SUCH_ITEM}
        case Kind.SWALLOWED:
            return "/orders/coupon", order | {"coupon": USED_COUPON}
        case Kind.SLEEPS | Kind.HANGS_UP:
            return "/orders/custom", order
        case _ if act.kind in _CARDS:
            return "/checkout", order | {"card": _CARDS[act.kind].value}
        case _:
            return "/orders", order
