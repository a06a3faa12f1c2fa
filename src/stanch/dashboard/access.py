"""Who may see the page: nobody, visitors from this machine, or those of whom the app's own function says so."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, Final, Literal

from starlette.requests import Request

from stanch.errors import ConfigError
from stanch.events import logger

if TYPE_CHECKING:
    from starlette.datastructures import Headers

Access = Literal["loopback"] | Callable[[Request], bool | Awaitable[bool]]
"""Who may see the page: visitors from this machine, or those of whom the function says True."""

_FORWARDED: Final = ("forwarded", "via", "x-forwarded-", "x-real-ip", "x-client-ip", "true-client-ip", "cf-")
"""How the headers begin by which a proxy says that the visitor is somebody else than its caller."""


def judged(access: object) -> None:
    """Raises ``ConfigError`` for what is no ``Access``."""
    if access is None or access == "loopback" or callable(access):
        return
    raise ConfigError(
        f"install: dashboard_access is {type(access).__name__}, which lets nobody in and keeps nobody out",
        remedies=['Write dashboard_access="loopback", or give a function: request -> bool.'],
    )


async def refusal(access: Access | None, request: Request) -> str | None:
    """Why this visitor is not let in, in words for that visitor; None lets in.

    What a function raises goes through the app's handlers: ``HTTPException(401)`` is a reply like any other. Whatever
    it returns but True refuses: an object that merely is not false may be the user whom it has refused.
    """
    if _asked_by_another_site(request.headers):
        return "Another site's page asks for this."
    if access is None:
        return "Nobody is let in: install() was given no dashboard_access."
    if access == "loopback":
        return _not_from_here(request)
    answer: object = access(request)
    if inspect.isawaitable(answer):
        answer = await answer
    if answer is True:
        return None
    if answer is not False:
        logger.warning("dashboard_access returned %s, which is not True: refused", type(answer).__name__)
    return "You are not let in."


def _asked_by_another_site(headers: Headers) -> bool:
    """Whether a browser says that a page of another site wants this, other than by a link that was followed."""
    site = headers.get("sec-fetch-site", "none")
    return site not in {"none", "same-origin"} and headers.get("sec-fetch-mode") != "navigate"


def _not_from_here(request: Request) -> str | None:
    forwarded = next((name for name in request.headers if name.startswith(_FORWARDED)), None)
    if forwarded is not None:
        return f"Only visitors from this machine are let in, and this request came through a proxy ({forwarded})."
    if request.scope.get("http_version") == "1.0":
        # No browser speaks it any more. Some proxies do by default, and then add no header at all.
        return "Only visitors from this machine are let in, and HTTP/1.0 is what proxies speak."
    if request.client is None or not _is_loopback(request.client.host):
        return "Only visitors from this machine are let in."
    hosts = request.headers.getlist("host")
    if len(hosts) != 1 or not _is_loopback(_without_port(hosts[0])):
        # A name that leads here may belong to anyone: its owner's page would be of the same origin as ours.
        return "Only visitors from this machine are let in, by the name localhost or an address of loopback."
    return None


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback


def _without_port(host: str) -> str:
    """The name in a Host header; nothing where it is none.

    >>> [_without_port(host) for host in ("localhost:8000", "[::1]:8000", "127.0.0.1", "[::1].evil.example")]
    ['localhost', '::1', '127.0.0.1', '']
    """
    found = re.fullmatch(r"(?:\[([^\[\]]*)\]|([^:\[\]]*))(?::\d*)?", host)
    return "" if found is None else found[1] or found[2] or ""
