"""What a person sees while the traffic runs: a live picture in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Protocol

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stanch.demo.journal import Kind, Outcome
from stanch.demo.server import POOL_SIZE, Layer
from stanch.demo.shop import PAGE

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from stanch.demo.scene import Scene

FRAME: Final = 0.25
LINE: Final = 3.0
"""Seconds between two pictures, and between two lines."""


class View(Protocol):
    """Shows a scene until it is cancelled."""

    async def show(self, scene: Scene) -> None:
        """Show *scene*; returns never."""


def view_for(console: Console, *, plain: bool) -> View:
    """The live picture where *console* is a terminal and nobody asked for plain text."""
    return Lines(console) if plain or not console.is_terminal else Picture(console)


class Lines:
    """Plain text: one line every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console

    async def show(self, scene: Scene) -> None:
        """Print one line after another; returns never."""
        while True:
            await asyncio.sleep(LINE)
            requests = ", ".join(f"{layer.label} {len(journal)}" for layer, journal in scene.journals.items())
            self._console.out(
                f"{scene.left:5.0f} s left   requests: {requests}   pool: {scene.pool_in_words}"
                f"   kills {scene.faults.kills}, restarts {scene.faults.restarts}",
                highlight=False,
            )


class Picture:
    """Progress, requests by kind, the pool, the faults; redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._console = console

    async def show(self, scene: Scene) -> None:
        """Draw one picture after another; returns never."""
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            while True:
                live.update(draw(scene), refresh=True)
                await asyncio.sleep(FRAME)


def draw(scene: Scene) -> RenderableType:
    """One picture of *scene*."""
    return Group(_progress(scene), _requests(scene), _pool(scene), _faults(scene))


def _progress(scene: Scene) -> RenderableType:
    line = Table.grid(padding=(0, 2))
    done = min(scene.elapsed, scene.seconds)
    line.add_row(
        Text(scene.url + PAGE, style="bold"),
        ProgressBar(total=scene.seconds, completed=done, width=30),
        f"{scene.left:.0f} s left",
    )
    return line


def _requests(scene: Scene) -> RenderableType:
    columns = {Outcome.SUCCESS: "green", Outcome.ERROR: "yellow", Outcome.NO_REPLY: "red"}
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("requests")
    for layer in scene.journals:
        for outcome, style in columns.items():
            name = f"{layer.label}  {outcome.value}" if outcome is Outcome.SUCCESS else outcome.value
            table.add_column(name, justify="right", style=style)
    for kind in Kind:
        counts: list[str] = []
        for journal in scene.journals.values():
            counts += [str(journal.counts[kind, outcome] or "·") for outcome in (Outcome.SUCCESS,)]
            refused = journal.counts[kind, Outcome.ERROR] + journal.counts[kind, Outcome.UNKNOWN]
            gone = journal.counts[kind, Outcome.NO_REPLY] + journal.counts[kind, Outcome.HUNG_UP]
            counts += [str(refused or "·"), str(gone or "·")]
        table.add_row(kind.value, *counts)
    return table


def _pool(scene: Scene) -> RenderableType:
    line = Text("pool  ", style="bold")
    if scene.pool is not None:
        used, idle = scene.pool["in_use"], scene.pool["idle"]
        line.append("█" * used, style="yellow").append("█" * idle, style="green")
        line.append("░" * max(0, POOL_SIZE - used - idle), style="dim")
        line.append("▒" * min(40, scene.pool["waiting"]), style="red")
    return line.append(f"  {scene.pool_in_words}  ({Layer.STANCH.label})", style="default")


def _faults(scene: Scene) -> RenderableType:
    faults = scene.faults
    line = Text("faults  ", style="bold")
    counts = f"kill -9 of a backend: {faults.kills}, restarts: {faults.restarts}, last: {faults.last}"
    return line.append(counts, style="default")
