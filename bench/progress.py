"""What is done now, and how long it still takes: one line, rewritten in a terminal; a line now and then elsewhere.

Nothing is drawn while something is measured, only between two steps: drawing costs what is measured.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType
    from typing import Self

    from rich.console import Console

OVER: Final = 0.1
"""How much longer a case takes, of what it has taken, that takes longer than it was said to."""
LINE: Final = 10.0
"""Seconds between two lines where nothing can be rewritten, at least."""


class Progress:
    """Of the cases in *expected*, each with the seconds it is said to take.

    >>> moment = 100.0
    >>> progress = Progress({"counts": 10.0, "rates": 40.0}, None, clock=lambda: moment)
    >>> progress.begin("counts")
    >>> moment += 20.0  # twice as long as it was said to take: the others may, too
    >>> progress.end()
    >>> progress.begin("rates")
    >>> moment += 10.0
    >>> progress.left
    70.0
    """

    def __init__(
        self,
        expected: Mapping[str, float],
        console: Console | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._expected = dict(expected)
        self._console = console
        self._clock = clock
        self._took: dict[str, float] = {}
        self._case = ""
        self._began = self._told = clock()
        rewrites = console is not None and console.is_terminal
        self._live = Live(console=console, auto_refresh=False, transient=True) if rewrites else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, case: str) -> None:
        """*case* is next."""
        self._case, self._began = case, self._clock()
        self._told = self._began - LINE

    def step(self, what: str) -> None:
        """*what* is done next."""
        if self._live is not None:
            self._live.update(self._line(what), refresh=True)
        elif self._console is not None and self._clock() - self._told >= LINE:
            self._told = self._clock()
            self._console.out(f"{in_words(self.left)} left   {self._case}: {what}", highlight=False)

    def end(self) -> None:
        """The case has ended, well or not."""
        self._took[self._case] = self._clock() - self._began
        self._case = ""
        if self._live is not None:
            self._live.update("", refresh=True)

    @property
    def left(self) -> float:
        """Seconds: what was said, as much longer or shorter as it was wrong until now."""
        said = sum(self._expected[case] for case in self._took)
        slower = sum(self._took.values()) / said if said else 1.0
        spent = self._clock() - self._began if self._case else 0.0
        now = max(OVER * spent, slower * self._expected.get(self._case, 0.0) - spent)
        rest = self._expected.keys() - self._took.keys() - {self._case}
        return now + slower * sum(self._expected[case] for case in rest)

    def _line(self, what: str) -> Table:
        spent = sum(self._took.values()) + self._clock() - self._began
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column(width=20)
        line.add_column(no_wrap=True)
        line.add_column(no_wrap=True, ratio=1, overflow="ellipsis")
        line.add_row(
            ProgressBar(total=spent + self.left, completed=spent, width=20),
            f"{in_words(self.left)} left",
            Text(f"{self._case}: {what}", style="dim"),
        )
        return line


def in_words(seconds: float) -> str:
    """A length of time, short.

    >>> in_words(8.4), in_words(75), in_words(7300)
    ('8 s', '1 min 15 s', '2 h 2 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
