"""The whole stack under load, beside the pattern by hand in the same run: what `make bench` measures, as a test.

Seconds are the machine's as well as ours, and a machine that is busy with something else can only make them worse: a
run that falls short is repeated, at most twice. What holds on any machine, in turns and in virtual time, is tested in
``tests/test_pool.py`` and ``tests/test_overload.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

import pytest

from bench import fairness, overload

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.fairness import Rate
    from bench.load import Kind
    from bench.overload import Outcome
    from stanch.embedded import EmbeddedPostgres

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

T = TypeVar("T")

RUNS: Final = 3


def measured(measure: Callable[[], T], is_fine: Callable[[T], bool]) -> T:
    """What the first fine run found, or the last one."""
    for _ in range(RUNS - 1):
        if is_fine(found := measure()):
            return found
    return measure()


def all_in_time(outcomes: dict[Kind, list[Outcome]]) -> bool:
    return all(
        each.part >= overload.GOOD and each.p99 <= overload.P99 and each.told <= overload.TOLD
        for each in outcomes["stanch"]
    )


def test_overload_is_refused_and_the_rest_is_served_in_time(postgres: EmbeddedPostgres, driver: str) -> None:
    outcomes = measured(lambda: overload.compare(postgres.url(driver)), all_in_time)
    for ours, theirs in zip(outcomes["stanch"], outcomes["by hand"], strict=True):
        assert ours.refused > 0
        assert ours.part >= overload.GOOD, ours
        assert ours.p99 <= overload.P99, ours
        assert ours.told <= overload.TOLD, ours
        assert theirs.part < 0.6, "the bad subject: SQLAlchemy's pool, which refuses nobody"


def is_even_and_fast(rates: dict[Kind, Rate]) -> bool:
    ours, theirs = rates["stanch"], rates["by hand"]
    return ours.p99 <= fairness.SPREAD * ours.p50 and ours.per_second >= theirs.per_second


def test_keep_alive_clients_wait_alike_and_are_served_as_fast(
    postgres: EmbeddedPostgres, driver: str
) -> None:
    rates = measured(lambda: fairness.compare(postgres.url(driver)), is_even_and_fast)
    ours, theirs = rates["stanch"], rates["by hand"]
    print(f"{driver}: stanch {ours}; by hand {theirs}")
    assert ours.p99 <= fairness.SPREAD * ours.p50
    assert ours.per_second >= theirs.per_second
