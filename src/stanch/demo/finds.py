"""Who names the culprits: what the page of the shop on stanch says of them, and what the other shop's log does.

Asked is over HTTP, as any visitor would. What counts is the line of code; a figure without it helps nobody at night.
"""

from __future__ import annotations

import asyncio
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
from rich.console import Group
from rich.text import Text

from stanch.demo import culprits
from stanch.demo.server import Layer
from stanch.demo.shop import PAGE
from stanch.demo.trouble import DemoFailed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import RenderableType

    from stanch.demo.server import ShopServer

REPLY_TIMEOUT: Final = 15.0
IS_NAMED_WITHIN: Final = 20.0
"""Seconds; a leak is told when the garbage collector was asked, and it is not asked all the time."""

LOOK_AGAIN: Final = 0.2
FILE: Final = Path(culprits.__file__).name


class Culprit(Enum):
    """A fault: its name for people, the route that has it, and the events that name it."""

    LEAK = ("a session that nobody closes", culprits.EXPORT, ("SessionDropped", "ConnectionLeaked"))
    IDLE = ("a connection held while waiting", culprits.QUOTE, ("HeldIdle",))
    REPEATED = ("N+1 statements", culprits.OVERVIEW, ("RepeatedStatement",))

    def __init__(self, label: str, path: str, events: tuple[str, ...]) -> None:
        self.label = label
        self.path = path
        self.events = events


Finds = dict[Culprit, str]
"""Of one shop: what it says of each culprit that it names."""


class Visitor:
    """Goes to the culprits of one shop, and reads what it says of them."""

    def __init__(self, shop: ShopServer) -> None:
        self._shop = shop
        self._visited: set[Culprit] = set()

    async def visit(self, which: Iterable[Culprit] = Culprit) -> None:
        """Visit *which*, all at once. A reply may get lost; then that one counts as not visited."""
        async with self._client() as client:
            asking = {culprit: asyncio.create_task(client.get(culprit.path)) for culprit in which}
            if asking:
                await asyncio.wait(asking.values())
        for culprit, reply in asking.items():
            if reply.exception() is None and reply.result().is_success:
                self._visited.add(culprit)

    async def finds(self) -> Finds:
        """What the shop says, after another visit where the first one proves nothing. Raises ``DemoFailed``."""
        named = await self._named()
        proven = named if self._is_on_stanch else self._visited
        await self.visit([culprit for culprit in Culprit if culprit not in proven])
        if missing := [each.path for each in Culprit if each not in self._visited and each not in named]:
            label = self._shop.layer.label
            raise DemoFailed(
                f"the {label} shop did not answer well at {', '.join(missing)}; nothing is shown"
            )
        give_up_at = time.monotonic() + IS_NAMED_WITHIN
        while len(named) < len(Culprit) and self._is_on_stanch and time.monotonic() < give_up_at:
            await asyncio.sleep(LOOK_AGAIN)
            named = await self._named()
        return named

    @property
    def _is_on_stanch(self) -> bool:
        return self._shop.layer is Layer.STANCH

    async def _named(self) -> Finds:
        if not self._is_on_stanch:
            return _in_the_log(self._shop.log)
        async with self._client() as client:
            told = (await client.get(f"{PAGE}/snapshot")).raise_for_status().json()
        return {culprit: said for culprit in Culprit if (said := _said_of(culprit, told["happenings"]))}

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self._shop.url, timeout=REPLY_TIMEOUT, trust_env=False)


def _said_of(culprit: Culprit, happenings: Sequence[Mapping[str, Any]]) -> str:
    """The line and the figures of the first event that names *culprit*; nothing if none does."""
    for happening in happenings:
        facts = happening["facts"]
        if happening["kind"] in culprit.events and facts["place"].startswith(f"{FILE}:"):
            return f"{facts['place']}, {_figures(facts)}"
    return ""


def _figures(facts: Mapping[str, Any]) -> str:
    if "times" in facts:
        return f"one statement {facts['times']} times"
    return f"held {facts['held']:.2f} s, of which SQL {facts['sql_time']:.3f} s"


def _in_the_log(log: Path) -> Finds:
    """Nobody knows in which words, so any line that names the file counts, for all of them."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if FILE in line]
    return dict.fromkeys(Culprit, f"{len(lines)} lines of its log") if lines else {}


def told(finds: Mapping[Layer, Finds]) -> RenderableType:
    """The finds of all shops, for people."""
    lines = [Text("three faults of the handlers themselves, and who names them", style="bold")]
    for culprit in Culprit:
        lines.append(Text(f"  {culprit.label} (GET {culprit.path})"))
        for layer, named in finds.items():
            said = Text(f"    {layer.label:12}  ")
            lines.append(
                said.append(named.get(culprit, "nothing"), style="green" if culprit in named else "red")
            )
    return Group(*lines, Text())
