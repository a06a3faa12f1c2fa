"""Answers the probes of whoever runs the app: is the process alive, can it serve, has it started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import Receive, Scope, Send

    from stanch.database import Database


class HealthApp:
    """The ASGI app behind ``install(health=)``."""

    def __init__(self, databases: Sequence[Database[Any]]) -> None:
        self._databases = databases

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one probe."""
        raise NotImplementedError
