"""Takes the JSON of a feed back into the values it was made of. The other side may be older, newer or not stanch.

What a value lacks makes the whole unreadable; what it has besides is left aside. Every text loses its control
characters on the way, because it ends in a terminal, and may have come from anywhere.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from stanch.ledger import Stats
from stanch.measuring import Distribution, Holding, Leak, RouteTotals, Snapshot, StatementTotals
from stanch.values import Value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

V = TypeVar("V", bound=Value)

_LEAVES: Final[Mapping[str, tuple[type, ...]]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
}


class Unreadable(ValueError):
    """This is not what a feed of this release says; the text names the place."""


class Happening(Value):
    """An event of the app, as the feed tells it."""

    database: str
    number: int
    """Runs, by database."""
    at: float
    """Wall clock, seconds since the epoch."""
    kind: str
    level: str
    text: str


class Sample(Value):
    """The counts of one database at one second."""

    number: int
    in_use: int
    idle: int
    waiting: int


class Told(Value):
    """One database in one ``snapshot`` message."""

    snapshot: Snapshot
    waits: Distribution
    """Of the last minute."""
    uses: Distribution
    """Of the last minute."""
    samples: tuple[Sample, ...]
    """Those that were not told before, oldest first."""


class Message(Value):
    """One ``snapshot`` message: all databases of one process."""

    run: str
    """Names the process among all others."""
    databases: tuple[Told, ...]


NOTHING: Final = Distribution(0, 0.0, ())


def clean(text: str) -> str:
    r"""*text* without what a terminal would obey: control, format and private characters.

    >>> clean("GET /\x1b[2Jorders\u202e")
    'GET /·[2Jorders·'
    """
    return "".join("·" if unicodedata.category(sign).startswith("C") else sign for sign in text)


def read_snapshot(plain: object) -> Snapshot:
    """What ``Snapshot.as_dict`` has made *plain* of. Raises ``Unreadable``.

    >>> read_snapshot({"database": "main"})
    Traceback (most recent call last):
    stanch.cli.top.readings.Unreadable: Snapshot lacks pid
    """
    return _value(
        Snapshot,
        plain,
        {
            "stats": _stats,
            "holders": _each(Holding),
            "waits": _distribution,
            "uses": _distribution,
            "creates": _distribution,
            "wait_ends": _counts("wait_ends"),
            "routes": _each(RouteTotals),
            "statements": _each(StatementTotals),
            "leaks": _each(Leak),
            "unit_ends": _counts("unit_ends"),
            "event_counts": _counts("event_counts"),
        },
    )


def read_happening(plain: object) -> Happening:
    """One ``happening`` message. Raises ``Unreadable``."""
    return _value(Happening, plain, {})


def read_message(plain: object) -> Message:
    """One ``snapshot`` message. Raises ``Unreadable``."""
    told = _mapping("the message", plain)
    run = _mapping("worker", told.get("worker")).get("run")
    if not isinstance(run, str):
        raise Unreadable("worker lacks run")
    databases = _list("databases", told.get("databases"))
    samples = _mapping("samples", told.get("samples"))
    return Message(run, tuple(_told(each, samples) for each in databases))


# Private --------------------------------------------------------------------------------------------------


def _value(kind: type[V], plain: object, readers: Mapping[str, Callable[[Any], Any]]) -> V:
    told = _mapping(kind.__name__, plain)
    fields: dict[str, Any] = {}
    for name in kind.fields():
        if name not in told:
            raise Unreadable(f"{kind.__name__} lacks {name}")
        reader = readers.get(name)
        fields[name] = _leaf(kind, name, told[name]) if reader is None else reader(told[name])
    return kind(**fields)


def _leaf(kind: type, name: str, value: object) -> object:
    if not isinstance(value, _LEAVES[kind.__annotations__[name]]):
        raise Unreadable(f"{name} of {kind.__name__} is a {type(value).__name__}")
    return clean(value) if isinstance(value, str) else value


def _each(kind: type[V]) -> Callable[[Any], tuple[V, ...]]:
    def read(plain: object) -> tuple[V, ...]:
        return tuple(_value(kind, each, {}) for each in _list(kind.__name__, plain))

    return read


def _told(plain: object, samples: Mapping[str, object]) -> Told:
    recent = _mapping("recent", _mapping("a database", plain).get("recent", {}))
    waits, uses = (_distribution(recent[name]) if name in recent else NOTHING for name in ("waits", "uses"))
    columns = _mapping("samples", samples.get(str(_mapping("a database", plain).get("database")), {}))
    return Told(read_snapshot(plain), waits, uses, _samples(columns))


def _samples(columns: Mapping[str, object]) -> tuple[Sample, ...]:
    read = [_integers("samples", _list(name, columns.get(name, []))) for name in Sample.fields()]
    return tuple(Sample(*row) for row in zip(*read, strict=False))


def _stats(plain: object) -> Stats:
    told = _mapping("Stats", plain)
    names = ("pool_size", "max_overflow", "in_use", "idle", "waiting")
    counts = dict(zip(names, _integers("Stats", [told.get(name) for name in names]), strict=True))
    readers = told.get("readers")
    return Stats(
        **counts,
        adopted=bool(told.get("adopted", True)),
        readers=None if readers is None else _stats(readers),
    )


def _distribution(plain: object) -> Distribution:
    told = _mapping("Distribution", plain)
    (count,) = _integers("Distribution", [told.get("count")])
    total = told.get("total")
    if not isinstance(total, int | float):
        raise Unreadable("Distribution lacks total")
    return Distribution(count, float(total), _integers("Distribution", _list("buckets", told.get("buckets"))))


def _counts(where: str) -> Callable[[Any], Mapping[str, int]]:
    def read(plain: object) -> Mapping[str, int]:
        told = _mapping(where, plain)
        return {
            clean(name): number for name, number in zip(told, _integers(where, told.values()), strict=True)
        }

    return read


def _integers(where: str, numbers: Iterable[object]) -> tuple[int, ...]:
    given = list(numbers)
    found = [number for number in given if isinstance(number, int)]
    if len(found) != len(given):
        raise Unreadable(f"{where} has something else where a whole number should be")
    return tuple(found)


def _mapping(where: str, plain: object) -> Mapping[str, object]:
    if not isinstance(plain, dict):
        raise Unreadable(f"{where} is no object")
    return cast("Mapping[str, object]", plain)


def _list(where: str, plain: object) -> list[object]:
    if not isinstance(plain, list):
        raise Unreadable(f"{where} is no list")
    return cast("list[object]", plain)
