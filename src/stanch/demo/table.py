"""The table at the end: what each shop promised, and what the database says became of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stanch.demo.faults import Faults
    from stanch.demo.judge import Verdict
    from stanch.demo.server import Layer

EVENTS = {
    "requests answered": "answered",
    "writes acknowledged (2xx)": "acknowledged",
    "error replies to writes": "error_replies",
    "commits made to fail": "failing_commits",
    "errors swallowed by the handler": "swallowed",
    "write, then read": "pairs",
    "clients that hung up": "hang_ups",
    "streams told to the end": "streams",
    "replies that said: outcome unknown": "unknown",
}
"""What happened, by the name of the figure in a ``Verdict``."""

LOSSES = {
    "acknowledged": ("  missing from the database", "missing"),
    "error_replies": ("  left rows behind", "left_rows"),
    "failing_commits": ("  answered 2xx all the same", "failing_commits_acknowledged"),
    "swallowed": ("  answered 2xx, row missing", "swallowed_acknowledged"),
    "pairs": ("  not there", "misses"),
    "hang_ups": ("  orders half-written", "half_written"),
}
"""What must be zero, under the figure that it is a part of."""

AT_THE_END = {"connections leaked": "leaked", "connections idle in transaction": "idle_in_transaction"}


def make_table(verdicts: Mapping[Layer, Verdict], faults: Faults) -> Table:
    """The verdicts side by side."""
    title = "counted from the database and pg_stat_activity"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for layer in verdicts:
        table.add_column(layer.label, justify="right")

    def count(label: str, figure: str) -> None:
        table.add_row(label, *(f"{getattr(verdict, figure)}" for verdict in verdicts.values()))

    def must_be_zero(label: str, figure: str) -> None:
        table.add_row(label, *(_loss(getattr(verdict, figure)) for verdict in verdicts.values()))

    for label, number in {
        "backends killed with -9": faults.kills,
        "restarts of PostgreSQL": faults.restarts,
    }.items():
        table.add_row(label, *(str(number) for _ in verdicts))
    for label, figure in EVENTS.items():
        count(label, figure)
        if figure in LOSSES:
            must_be_zero(*LOSSES[figure])
    for label, figure in AT_THE_END.items():
        must_be_zero(label, figure)
    times = (f"{1000 * verdict.median:.0f} / {1000 * verdict.slowest:.0f}" for verdict in verdicts.values())
    table.add_row("orders and reads, p50 / p99 in ms", *times, style="dim")
    return table


def _loss(number: int) -> Text:
    return Text(str(number), style="bold red" if number else "green")
