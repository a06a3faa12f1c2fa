"""One run, from the first process to the last: two shops, their clients, what goes wrong, and the judgement."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import sys
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import httpx

from stanch.demo.conclusion import Status, conclude
from stanch.demo.faults import Faults
from stanch.demo.finds import Visitor, told
from stanch.demo.journal import Journal
from stanch.demo.judge import Judge, judge
from stanch.demo.probes import POOL
from stanch.demo.scene import Scene
from stanch.demo.script import write_script
from stanch.demo.server import POOL_SIZE, Layer, ShopServer
from stanch.demo.shop import ITEMS, WORKSHOP_ANSWERS_AFTER
from stanch.demo.table import make_table
from stanch.demo.traffic import Clients
from stanch.demo.view import FRAME, view_for
from stanch.embedded import EmbeddedPostgres

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine, Sequence
    from typing import Any

    from rich.console import Console

    from stanch.demo.judge import Verdict
    from stanch.demo.script import Act


EARLY: Final = 0.15
"""At which part of a run the culprits are visited for the first time."""

STROLL: Final = 10.0
STROLLERS: Final = 8.0
"""With ``--serve``: seconds of one round of traffic, and acts in each of them."""

_STYLES = {Status.KEPT: "bold green", Status.BROKEN: "bold red", Status.VOID: "bold yellow"}


_SETTINGS = {"recovery_init_sync_method": "syncfs"} if sys.platform == "linux" else {}
"""As durable as the default, which asks for each of a thousand files by itself: seconds on a busy disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the person at the terminal asked for. *seconds* is the length of the traffic."""

    seconds: float = 25.0
    seed: int = 1
    serve: bool = False
    plain: bool = False


class Show:
    """A run as *options* say, told on *console*."""

    def __init__(self, options: Options, console: Console) -> None:
        self._options = options
        self._console = console

    async def run(self) -> Status:
        """Set up, play, judge, tear down. Raises ``DemoFailed`` or ``StanchError`` if that cannot be done.

        When it is cancelled it tears down as well; nothing is left behind.
        """
        self._say("starting PostgreSQL, and one shop twice: on stanch, and on the hand-written pattern")
        logs = Path(tempfile.mkdtemp(prefix="stanch-demo-"))
        status = Status.KEPT
        try:
            status = await self._run(logs)
        except Exception:
            status = Status.VOID
            raise
        finally:
            if status is Status.KEPT:
                shutil.rmtree(logs, ignore_errors=True)
            else:
                self._say(f"the logs of both shops: {logs}")
        return status

    async def _run(self, logs: Path) -> Status:
        async with AsyncExitStack() as stack:
            postgres = EmbeddedPostgres(durable=True, settings=_SETTINGS)
            # before the shops, so that they are gone before their database goes; it starts while they load
            stack.push_async_exit(postgres)
            shops = [await stack.enter_async_context(_shop(layer, logs)) for layer in Layer]
            await asyncio.to_thread(_start, postgres)
            for shop in shops:
                await shop.open(postgres.url("asyncpg", shop.layer))
                self._say(f"{shop.layer.label:12}  {shop.url}/docs")
            self._say(f"the page      {shops[0].page}  (in a terminal: stanch top {shops[0].page})")
            status = await self._play_and_judge(postgres, shops)
            if self._options.serve:
                await self._keep_serving(postgres, shops[0])
        return status

    async def _play_and_judge(self, postgres: EmbeddedPostgres, shops: Sequence[ShopServer]) -> Status:
        options = self._options
        script = write_script(
            options.seed, options.seconds, items=len(ITEMS), patience=WORKSHOP_ANSWERS_AFTER
        )
        faults = Faults(postgres, seed=options.seed, seconds=options.seconds)
        self._say(
            f"{options.seconds:g} s of traffic: the same {len(script)} acts on each shop (seed {options.seed})"
        )
        visitors = {shop.layer: Visitor(shop) for shop in shops}
        scene = Scene(url=shops[0].url, seconds=options.seconds, faults=faults)
        view = view_for(self._console, plain=options.plain)
        async with _beside(_watch_pool(scene)), _beside(view.show(scene)), asyncio.TaskGroup() as group:
            group.create_task(faults.run())
            for shop in shops:
                group.create_task(_visit(shop, scene.journals[shop.layer], script))
            for visitor in visitors.values():
                group.create_task(_visit_early(visitor, options.seconds))
        self._say("the traffic is over; the judge asks the database, and the page who the culprits are")
        finds = {layer: await visitor.finds() for layer, visitor in visitors.items()}
        verdicts: dict[Layer, Verdict] = {}
        for shop in shops:
            shop.check()
            findings = await Judge(postgres, shop.layer, pool_size=POOL_SIZE).look(shop.url)
            verdicts[shop.layer] = judge(scene.journals[shop.layer], findings)
        self._console.print(make_table(verdicts, faults))
        self._console.print(told(finds), soft_wrap=True)
        conclusion = conclude(verdicts, finds, kills=faults.kills, restarts=faults.restarts)
        self._say(conclusion.sentence, style=_STYLES[conclusion.status])
        return conclusion.status

    async def _keep_serving(self, postgres: EmbeddedPostgres, shop: ShopServer) -> None:
        self._say(f"PostgreSQL {postgres.version} and {shop.url}/docs stay up until Ctrl-C", style="bold")
        self._say(f"some customers stay, too: see {shop.page}, or run: stanch top {shop.page}", style="bold")
        # Ctrl-C arrives as a cancellation of the run; here it is the way to end it well
        with contextlib.suppress(asyncio.CancelledError):
            for turn in itertools.count():
                await _stroll(shop, self._options.seed + turn)
                shop.check()

    def _say(self, line: str, style: str = "") -> None:
        self._console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def _shop(layer: Layer, logs: Path) -> ShopServer:
    return ShopServer(layer, logs / f"{layer}.log")


def _start(postgres: EmbeddedPostgres) -> None:
    postgres.start()
    for layer in Layer:
        postgres.create_database(layer)


async def _visit(shop: ShopServer, journal: Journal, script: Sequence[Act]) -> None:
    async with Clients(shop.url, journal) as clients:
        await clients.play(script)


async def _visit_early(visitor: Visitor, seconds: float) -> None:
    """Before anything goes wrong, so that there is something to see on the page while the traffic runs."""
    await asyncio.sleep(EARLY * seconds)
    await visitor.visit()


async def _stroll(shop: ShopServer, seed: int) -> None:
    """A few customers for a while, and one visit to each culprit; bounded in time, in number and at once."""
    script = write_script(seed, STROLL, items=len(ITEMS), patience=WORKSHOP_ANSWERS_AFTER, rate=STROLLERS)
    async with asyncio.TaskGroup() as group:
        group.create_task(_visit(shop, Journal(), script))
        group.create_task(Visitor(shop).visit())


async def _watch_pool(scene: Scene) -> None:
    """Ask the shop on stanch for its pool's counts; for the view only, nobody judges by them."""
    async with httpx.AsyncClient(base_url=scene.url, timeout=1.0, trust_env=False) as client:
        while True:
            try:
                scene.pool = (await client.get(POOL)).raise_for_status().json()
            except httpx.HTTPError:
                scene.pool = None
            await asyncio.sleep(FRAME)


@asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncGenerator[None]:
    """Run *work*, which has no end of its own, while the block runs."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.result()
