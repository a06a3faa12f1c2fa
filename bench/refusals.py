"""Lets an app tell in a header how long it took from the pool's decision to refuse until the reply left."""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from bench.load import TOLD_AFTER
from stanch.pool import Pool

if TYPE_CHECKING:
    from fastapi import FastAPI

    from stanch.asgi import ASGIApp, Message, Receive, Scope, Send

_decided: Final[ContextVar[list[float]]] = ContextVar("when a refusal was decided")


def tell_refusals(app: FastAPI) -> None:
    """Let *app*, of a process that serves nothing else, tell it."""
    refuse = Pool._overloaded  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # looked at, not changed

    def noted(self: Pool, ledger: Any, refusal: Any) -> Any:
        if (decided := _decided.get(None)) is not None:
            decided.append(refusal.at)
        return refuse(self, ledger, refusal)

    Pool._overloaded = noted  # type: ignore[method-assign]  # noqa: SLF001
    app.add_middleware(Stopwatch)


class Stopwatch:
    """The middleware that does."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        decided: list[float] = []
        _decided.set(decided)

        async def timed(message: Message) -> None:
            if decided and message["type"] == "http.response.start":
                told_after = time.monotonic() - decided[0]
                message["headers"] = [*message["headers"], (TOLD_AFTER, f"{told_after:.6f}".encode())]
            await send(message)

        await self.app(scope, receive, timed)
