"""The cases, those first that one waits for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bench.cases import (
    counts,
    distance,
    fairness,
    growth,
    hold_time,
    imports,
    instructions,
    instruments,
    overload,
    rates,
    restart,
    waiting,
    workers,
)

if TYPE_CHECKING:
    from bench.cases.case import Case

CASES: Final[tuple[Case, ...]] = (
    instructions.CASE,
    counts.CASE,
    distance.CASE,
    rates.CASE,
    fairness.CASE,
    hold_time.CASE,
    overload.CASE,
    restart.CASE,
    waiting.CASE,
    workers.CASE,
    imports.CASE,
    instruments.CASE,
    growth.CASE,
)
