"""What the fault runs share: a seed that is printed, a database with the app's tables, and a place for logs."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest

from tests.faults.subject import prepare

if TYPE_CHECKING:
    from tests.support.judge import FreshDatabase


@pytest.fixture
def seed() -> int:
    """``STANCH_SEED=…`` repeats a run; it is printed with every failure."""
    seed = int(os.environ.get("STANCH_SEED", "20261122"))
    print(f"STANCH_SEED={seed}")
    return seed


@pytest.fixture
def chance(seed: int) -> random.Random:
    return random.Random(seed)


@pytest.fixture
async def judged(fresh_database: FreshDatabase) -> FreshDatabase:
    """The test's own database, with the tables of the app under test."""
    await prepare(fresh_database)
    return fresh_database
