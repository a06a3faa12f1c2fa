"""``stanch top URL``: the page of an app in a terminal, or once as text or JSON."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console

from stanch.cli.top.feed import Address, FeedError, Sent, Status, headers_from
from stanch.cli.top.listen import listen
from stanch.cli.top.screen import as_text, glyphs_for
from stanch.cli.top.state import State

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PIPE_WIDTH: Final = 160
"""Columns of the text where it goes to no terminal and ``COLUMNS`` says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What was asked for at the command line."""

    url: str
    header: Sequence[str] = ()
    once: bool = False
    json: bool = False


def main(wishes: Wishes) -> int:
    """Show the app at ``wishes.url``; returns the exit status, ``Status`` or 128 and the number of a signal."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")  # a sign that the terminal does not know ends nothing
    try:
        address = Address.of(wishes.url)
        headers = headers_from(wishes.header, os.environ)
        if wishes.once or wishes.json:
            return asyncio.run(_once(address, headers, as_json=wishes.json))
        console = Console()
        if not sys.stdout.isatty() or console.is_dumb_terminal or find_spec("termios") is None:
            raise FeedError(
                Status.MISUSED,
                "there is no terminal to draw on",
                "Ask for one snapshot: --once as text, --json for programs.",
            )
        from stanch.cli.top.live import Top  # noqa: PLC0415  # it needs a terminal as POSIX knows them

        return asyncio.run(Top(address, headers, console).run())
    except FeedError as error:
        print(f"stanch top: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # whoever reads has seen enough; Python would complain once more when it flushes at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Status.DONE


async def _once(address: Address, headers: Mapping[str, str], *, as_json: bool) -> int:
    state, told = State(), list[Sent]()

    def first(sent: Sent) -> bool:
        told.append(sent)
        return True

    await listen(address, headers, state, mark="", enough=first)
    if as_json:
        print(json.dumps(json.loads(told[0].data)))
    else:
        console = Console(color_system=None, highlight=False)
        if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
            console.width = PIPE_WIDTH
        text = as_text(state, title=address.page, width=console.width, glyphs=glyphs_for(console))
        console.print(text, end="")
    sys.stdout.flush()
    return Status.DONE
