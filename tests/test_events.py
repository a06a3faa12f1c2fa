"""Each event reaches the log as a sentence and as facts, under the same keys everywhere, with no secret in it."""

from __future__ import annotations

import inspect
import json
import logging
from typing import TYPE_CHECKING, Any

import pytest

from stanch import events
from stanch.events import Event, HeldIdle, Observers, TeardownFailed, facts_of

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS = [
    kind
    for _, kind in inspect.getmembers(events, inspect.isclass)
    if issubclass(kind, Event) and kind is not Event
]
OF_RECORDS = {*vars(logging.makeLogRecord({})), "message", "asctime"}
"""What ``Logger.makeRecord`` does not let anybody overwrite (Python manual, *logging*, *LogRecord attributes*)."""

SAMPLES: dict[str, Any] = {
    "held": 1.5,
    "sql_time": 0.25,
    "waited": 0.5,
    "seconds": 2.0,
    "pause": 0.1,
    "attempt": 1,
    "times": 10,
    "writes": ("Order",),
    "error": ValueError("5ecre7"),
}


def sample(kind: type[Event]) -> Event:
    return kind(**{name: SAMPLES.get(name, f"the {name}") for name in kind.fields()})


@pytest.fixture
def providers() -> Iterator[list[Any]]:
    before = events.context_providers[:]
    yield events.context_providers
    events.context_providers[:] = before


class JsonLines(logging.Formatter):
    """A line of JSON for each record, with whatever was handed over as ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        facts = {name: value for name, value in vars(record).items() if name not in OF_RECORDS}
        return json.dumps({"level": record.levelname, "message": record.getMessage(), **facts})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_event_is_a_sentence_and_its_facts(kind: type[Event], caplog: pytest.LogCaptureFixture) -> None:
    event = sample(kind)
    Observers().tell(event)
    (record,) = caplog.records if event.level >= logging.WARNING else [_logged(event, caplog)]
    line = json.loads(JsonLines().format(record))
    assert line["stanch_event"] == kind.__name__
    assert line["message"] == str(event)
    assert set(line) == {"level", "message", "stanch_event", *kind.fields()}
    assert not {"stanch_event", *kind.fields()} & OF_RECORDS
    assert "5ecre7" not in json.dumps(line)


def _logged(event: Event, caplog: pytest.LogCaptureFixture) -> logging.LogRecord:
    with caplog.at_level(logging.DEBUG, logger="stanch"):
        events.log(event)
    return caplog.records[-1]


def test_the_words_are_those_of_the_design() -> None:
    held = {"holder", "place", "held", "sql_time"}
    for kind in (events.ConnectionLeaked, events.LeakReturned, events.SessionDropped, HeldIdle):
        assert held <= set(kind.fields())


def test_an_error_is_told_by_its_class() -> None:
    assert facts_of(TeardownFailed(database="shop", holder="GET /", error=ValueError("5ecre7"))) == {
        "stanch_event": "TeardownFailed",
        "database": "shop",
        "holder": "GET /",
        "error": "ValueError",
    }


def test_what_is_known_of_the_moment_is_added_and_hides_no_fact(providers: list[Any]) -> None:
    providers.append(lambda: {"trace_id": "4bf9", "holder": "somebody else"})
    facts = facts_of(sample(HeldIdle))
    assert facts["trace_id"] == "4bf9"
    assert facts["holder"] == "the holder"


def test_a_provider_that_fails_takes_no_event_from_the_log(
    providers: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> dict[str, object]:
        raise RuntimeError("no tracer")

    providers.append(fail)
    Observers().tell(sample(HeldIdle))
    complaint, told = caplog.records
    assert (complaint.getMessage(), told.getMessage()) == (
        "a context provider failed on HeldIdle",
        str(sample(HeldIdle)),
    )


def test_an_event_that_nobody_logs_is_not_taken_apart(
    providers: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> dict[str, object]:
        raise AssertionError("nobody asked")

    providers.append(fail)
    with caplog.at_level(logging.CRITICAL, logger="stanch"):
        events.log(sample(HeldIdle))
