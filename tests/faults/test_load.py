"""The whole stack under load, beside the pattern by hand in the same run: what `make bench` measures in seconds.

Here only what holds on any machine: more is served in time than by the pool that refuses nobody. The figures, and their
limits, are those of ``bench/overload.py`` and ``bench/fairness.py``; turns and virtual time are tested in
``tests/test_pool.py`` and ``tests/test_overload.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench import overload

if TYPE_CHECKING:
    from stanch.embedded import EmbeddedPostgres

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


def test_overload_is_refused_and_more_is_served_in_time_than_where_nobody_is(
    postgres: EmbeddedPostgres, driver: str
) -> None:
    outcomes = overload.compare(postgres.url(driver))
    for ours, theirs in zip(outcomes["stanch"], outcomes["by hand"], strict=True):
        assert ours.refused > 0
        assert theirs.refused == 0
        assert ours.part > theirs.part, (ours, theirs)
