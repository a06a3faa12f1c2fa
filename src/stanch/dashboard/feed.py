"""What the page and ``stanch top`` are told, once a second, as server-sent events.

``GET {dashboard}/feed`` answers with ``text/event-stream``. It begins with a ``retry:`` of one second; then come

- ``event: happening``, one for each event of ``stanch.events``, oldest first: ``database``, ``number`` (running, by
  database), ``at``, ``kind`` (the class), ``level`` (``INFO``, ``WARNING`` or ``ERROR``), ``text`` (one sentence) and
  ``facts`` (the event's own fields; of an error only the name of its class);
- ``event: snapshot``, once a second: ``worker`` (``pid``, ``since``, ``at``, and ``run``, which no other process has),
  ``databases`` (each a ``stanch.measuring.Snapshot``, cut to its most telling rows, with ``recent``: the ``waits`` and
  ``uses`` of the last minute) and ``samples`` (by database, columns of one length: ``number``, ``at``, ``in_use``,
  ``idle``, ``waiting``, ``bound``, and ``taken`` and ``failed``, which count from the start).

The first snapshot brings the samples and happenings of the last minutes, each later one what is new. Each message has
an ``id``; who comes back with it in ``Last-Event-ID``, to the same process, is told what it has missed and the server
still has, and nothing twice. Another process tells all that it has, under another ``run``: of an app with several
workers a viewer is told by the one that took its connection, and of that one alone.

A feed ends after 15 seconds, so that no server has to wait for an open page when it is told to stop, and access is
asked for again; ``EventSource`` comes back by itself. One viewer too many is answered with a 503. ``GET
{dashboard}/snapshot`` gives the same as one JSON document: a snapshot with all samples, and ``happenings``.

Times are in seconds, moments are seconds since the epoch. Nowhere is a value of a parameter, a literal of a statement,
a URL or a row.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from stanch.dashboard.history import History
    from stanch.database import Database
    from stanch.events import Event

RETRY: Final = b"retry: 1000\n\n"

_ROUTES: Final = 100
_STATEMENTS: Final = 50
"""By each of three orders: those that ran longest in all, at once, and most often."""
_HOLDERS: Final = 200
_TEXT: Final = 2000
"""Characters of a statement's shape, or of whatever else is written out."""

_STALE: Final = 0.5
"""Seconds for which all viewers are shown the same snapshot."""


class Position(NamedTuple):
    """How far a viewer has been told: in which run, up to which sample, and which event of each database.

    >>> Position.read("2a-9.17.3-0", run="2a-9")
    Position(run='2a-9', sample=17, events=(3, 0))
    >>> Position.read("another.17.3-0", run="2a-9"), str(Position("2a-9", 17, (3, 0)))
    (Position(run='2a-9', sample=0, events=()), '2a-9.17.3-0')
    """

    run: str
    sample: int = 0
    events: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.run}.{self.sample}.{'-'.join(map(str, self.events))}"

    @classmethod
    def read(cls, text: str | None, *, run: str) -> Position:
        """What *text*, an id of ours that came back, says; the very beginning if it is of another run, or none."""
        found = re.fullmatch(
            re.escape(run) + r"\.(\d{1,15})\.((?:\d{1,15}-)*\d{1,15})?", text or "", re.ASCII
        )
        if found is None:
            return cls(run)
        return cls(run, int(found[1]), tuple(int(number) for number in (found[2] or "").split("-") if number))


class Feed:
    """Writes the messages. What it costs is shared by all who look in the same half second."""

    def __init__(self, databases: Sequence[Database[Any]], history: History) -> None:
        self._databases = databases
        self._history = history
        self._written = ""
        self._written_at = -_STALE

    def position(self, told: str | None) -> Position:
        """Where a viewer stands who says it was *told* up to here."""
        return Position.read(told, run=self._history.run)

    def messages(self, position: Position) -> tuple[bytes, Position]:
        """What there is to tell beyond *position*, ending in a snapshot; and how far that goes."""
        parts: list[bytes] = []
        for index, happening in self._happenings(position):
            numbers = list(position.events) + [0] * (index + 1 - len(position.events))
            numbers[index] = happening["number"]
            position = position._replace(events=tuple(numbers))
            parts.append(_message("happening", position, _json(happening)))
        samples = self._history.columns(position.sample)
        position = position._replace(sample=self._history.latest)
        return b"".join([*parts, _message("snapshot", position, self._document(samples))]), position

    def document(self) -> bytes:
        """Everything at once: a snapshot with all samples, and ``happenings``."""
        start = Position(self._history.run)
        happenings = [happening for _, happening in self._happenings(start)]
        whole = self._document(self._history.columns(0), happenings=happenings)
        return whole.encode()

    def _document(self, samples: Any, **more: Any) -> str:
        now = time.monotonic()
        if now - self._written_at >= _STALE:
            self._written = _json([self._database(database) for database in self._databases])
            self._written_at = now
        worker = {
            "run": self._history.run,
            "pid": self._history.pid,
            "since": self._history.since,
            "at": time.time(),
        }
        rest = _json({"worker": worker, "samples": samples, **more})
        return f'{{"databases":{self._written},{rest[1:]}'

    def _database(self, database: Database[Any]) -> dict[str, Any]:
        whole: dict[str, Any] = database.measure().snapshot().as_dict()
        routes, statements, holders = whole["routes"], whole["statements"], whole["holders"]
        orders = ("total", "longest", "count")
        ranked = [sorted(statements, key=lambda row: -row[order])[:_STATEMENTS] for order in orders]
        telling = {row["shape"]: row for order in ranked for row in order}
        recent = {name: read.as_dict() for name, read in self._history.recently(database.name)}
        return whole | {
            "routes": routes[:_ROUTES],
            "routes_in_all": len(routes),
            "statements": [_cut(row) for row in telling.values()],
            "statements_in_all": len(statements),
            "holders": holders[:_HOLDERS],
            "recent": recent,
        }

    def _happenings(self, position: Position) -> Iterator[tuple[int, dict[str, Any]]]:
        """What happened beyond *position*, oldest first, each with the place of its database."""
        found: list[tuple[float, int, dict[str, Any]]] = []
        for index, database in enumerate(self._databases):
            told = position.events[index] if index < len(position.events) else 0
            events: tuple[tuple[int, float, Event], ...] = tuple(database.measure().events)
            found += [
                (at, index, _happening(number, at, event)) for number, at, event in events if number > told
            ]
        found.sort(key=lambda entry: entry[:2])
        return iter([(index, happening) for _, index, happening in found])


def _happening(number: int, at: float, event: Event) -> dict[str, Any]:
    facts = {name: _told(getattr(event, name)) for name in event.fields() if name != "database"}
    return {
        "database": event.database,
        "number": number,
        "at": at,
        "kind": type(event).__name__,
        "level": logging.getLevelName(event.level),
        "text": str(event)[:_TEXT],
        "facts": facts,
    }


def _told(fact: Any) -> Any:
    """A fact as JSON knows it. An error may quote rows and values: only what it is called is told."""
    if isinstance(fact, float) and not math.isfinite(fact):
        return str(fact)  # JSON has no word for it
    if fact is None or isinstance(fact, bool | int | float):
        return fact
    if isinstance(fact, str):
        return fact[:_TEXT]
    if isinstance(fact, tuple | list):
        return [_told(part) for part in fact]  # pyright: ignore[reportUnknownVariableType]
    return type(fact).__name__


def _cut(row: dict[str, Any]) -> dict[str, Any]:
    return row if len(row["shape"]) <= _TEXT else row | {"shape": row["shape"][:_TEXT] + " …"}


def _message(kind: str, position: Position, data: str) -> bytes:
    # JSON written by json.dumps() is one line, so that one `data:` holds it.
    return f"id: {position}\nevent: {kind}\ndata: {data}\n\n".encode()


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
