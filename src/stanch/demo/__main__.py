"""``python -m stanch.demo``: a shop on stanch and one on the hand-written pattern, under the same fire."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from typing import TYPE_CHECKING, Final

try:
    from rich.console import Console

    from stanch.demo.conclusion import Status
    from stanch.demo.show import Options, Show
except ModuleNotFoundError as missing:
    sys.exit(f"the demo needs {missing.name}: pip install 'stanch[demo]'")
except KeyboardInterrupt:
    sys.exit(130)  # loading takes long enough to change one's mind

from stanch.demo.trouble import DemoFailed
from stanch.errors import StanchError

if TYPE_CHECKING:
    from collections.abc import Sequence

INTERRUPTED: Final = 130
"""What shells report after Ctrl-C."""

SHORTEST: Final = 4.0
LONGEST: Final = 600.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns 0 if stanch kept every promise, 1 if it broke one, 2 if the run proves nothing."""
    parser = argparse.ArgumentParser(prog="python -m stanch.demo", description=main.__doc__)
    parser.add_argument("--seconds", type=_seconds, default=25.0, help="length of the traffic (default: 25)")
    parser.add_argument("--seed", type=int, default=1, help="decides traffic and faults (default: 1)")
    parser.add_argument("--serve", action="store_true", help="keep the shop on stanch running until Ctrl-C")
    parser.add_argument("--plain", action="store_true", help="plain lines instead of the live picture")
    options = Options(**vars(parser.parse_args(arguments)))
    console = Console(no_color=options.plain or None)
    status = Status.VOID
    try:
        return asyncio.run(_interruptible(Show(options, console)))
    except* (DemoFailed, StanchError) as failures:
        console.print(str(failures.exceptions[0]), style="bold red", markup=False, highlight=False)
    return status


async def _interruptible(show: Show) -> int:
    """Run *show*; a signal ends it in order, the first one only: what it tears down is not torn down twice."""
    run = asyncio.create_task(show.run())
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        for number in signals:
            loop.add_signal_handler(number, int)
        run.cancel()

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in signals:
        loop.add_signal_handler(number, interrupt)
    try:
        return await run
    except asyncio.CancelledError:
        return INTERRUPTED


def _seconds(text: str) -> float:
    number = float(text)
    if not SHORTEST <= number <= LONGEST:
        raise argparse.ArgumentTypeError(f"from {SHORTEST:g} to {LONGEST:g}, not {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
