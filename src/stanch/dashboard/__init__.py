"""One page that shows what the databases of an app are doing now, for those who are let in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal

from starlette.requests import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import Receive, Scope, Send

    from stanch.database import Database

Access = Literal["loopback"] | Callable[[Request], bool | Awaitable[bool]]
"""Who may see the page: visitors from this machine, or those of whom the function says True."""


class DashboardApp:
    """The ASGI app behind ``install(dashboard=)``."""

    def __init__(self, databases: Sequence[Database[Any]], *, path: str, access: Access | None) -> None:
        self._databases = databases
        self._path = path
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the page and what belongs to it."""
        raise NotImplementedError
