"""The ledger against a small model: first come first served, never above the bound, nothing lost."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from stanch.ledger import Ledger, Stats, Waiter

if TYPE_CHECKING:
    from hypothesis.stateful import MultipleResults


@dataclass(eq=False)
class Slot:
    """What the ledger hands out here; the ledger must not look inside."""

    number: int


@dataclass(eq=False)
class Place:
    """A waiter as the model sees it: woken how often."""

    waiter: Waiter[Slot]
    woken: list[int] = field(default_factory=list[int])


def ledger_of(
    pool_size: int = 1, max_overflow: int = 0, *, keeps_idle: bool = True, opening: bool = False
) -> Ledger[Slot]:
    """A ledger that has seen a first connection, unless it is still *opening* one."""
    ticks = count()
    ledger = Ledger[Slot](
        pool_size=pool_size,
        max_overflow=max_overflow,
        clock=lambda: float(next(ticks)),
        keeps_idle=keeps_idle,
    )
    if not opening:
        ledger.open_up(new=lambda: pytest.fail("nobody waits"))
    return ledger


def waiter() -> Place:
    woken: list[int] = []
    return Place(Waiter[Slot](None, wake=lambda: woken.append(1)), woken)


class Books(RuleBasedStateMachine):
    """Every step is done to the ledger and to three plain collections; both must tell the same story."""

    held: Bundle[Slot] = Bundle("held")
    waiting: Bundle[Place] = Bundle("waiting")

    def __init__(self) -> None:
        super().__init__()
        self.numbers = count()
        self.opened: set[Slot] = set()
        self.idle: deque[Slot] = deque()
        self.out: list[Slot] = []
        self.queue: deque[Place] = deque()

    @initialize(
        pool_size=st.integers(1, 3),
        max_overflow=st.integers(0, 2),
        keeps_idle=st.booleans(),
        opening=st.booleans(),
    )
    def begin(self, pool_size: int, max_overflow: int, keeps_idle: bool, opening: bool) -> None:
        self.ledger = ledger_of(pool_size, max_overflow, keeps_idle=keeps_idle, opening=opening)
        self.whole = pool_size + max_overflow
        self.opening = opening
        self.bound = 1 if opening else self.whole
        self.to_keep = pool_size if keeps_idle else 0

    def new(self) -> Slot:
        slot = Slot(next(self.numbers))
        self.opened.add(slot)
        return slot

    @rule(target=held)
    def take(self) -> Slot | MultipleResults[Slot]:
        slot = self.ledger.take(None, new=self.new)
        if self.queue or (not self.idle and len(self.out) >= self.bound):
            assert slot is None
            return multiple()
        assert slot is not None
        if self.idle:
            assert slot is self.idle.popleft(), "the longest idle is the next one out"
        self.out.append(slot)
        return slot

    @rule()
    def open_up(self) -> None:
        """A first connection is ready, or one more: who waits gets the room that this makes, in order."""
        self.opening, self.bound = False, self.whole
        served = [self.queue.popleft() for _ in range(min(len(self.queue), self.bound - len(self.out)))]
        self.ledger.open_up(new=self.new)
        for place in served:
            assert place.waiter.slot is not None
            assert place.woken == [1]
            self.out.append(place.waiter.slot)

    @rule(target=waiting)
    def enqueue(self) -> Place | MultipleResults[Place]:
        if not self.queue and (self.idle or len(self.out) < self.bound):
            return multiple()  # the pool asks take() first, and would have been served
        place = waiter()
        self.ledger.enqueue(place.waiter)
        self.queue.append(place)
        return place

    def expect_given(self, slot: Slot, *, usable: bool, stays: bool) -> None:
        """The model's part of a slot that comes free."""
        self.out.remove(slot)
        if self.queue:
            first = self.queue.popleft()
            assert stays
            assert first.waiter.slot is slot, "who has waited longest is served first"
            assert first.woken == [1], "and told once"
            self.out.append(slot)
        elif usable and len(self.idle) < self.to_keep:
            assert stays
            self.idle.append(slot)
        else:
            assert not stays
            self.opened.discard(slot)

    @rule(slot=consumes(held), usable=st.booleans())
    def give_back(self, slot: Slot, usable: bool) -> None:
        stays = self.ledger.give_back(slot, usable=usable)
        self.expect_given(slot, usable=usable, stays=stays)

    @rule(target=held, place=consumes(waiting))
    def arrive(self, place: Place) -> Slot | MultipleResults[Slot]:
        """A waiter that was served goes off with its slot; one that was not gives up for good."""
        if place.waiter.slot is not None:
            return place.waiter.slot
        assert self.ledger.give_up(place.waiter, usable=lambda _slot: True) is None
        self.queue.remove(place)
        assert place.woken == []
        return multiple()

    @rule(place=consumes(waiting), usable=st.booleans())
    def give_up(self, place: Place, usable: bool) -> None:
        """Cancelled, perhaps in the moment of the hand-over: then the slot passes on."""
        slot = place.waiter.slot
        unwanted = self.ledger.give_up(place.waiter, usable=lambda _slot: usable)
        if slot is None:
            assert unwanted is None
            self.queue.remove(place)
            return
        assert unwanted in {None, slot}
        self.expect_given(slot, usable=usable, stays=unwanted is None)

    @rule()
    def clear_idle(self) -> None:
        assert self.ledger.clear_idle() == list(self.idle)
        self.opened -= set(self.idle)
        self.idle.clear()

    @invariant()
    def the_counts_are_true(self) -> None:
        stats = self.ledger.stats()
        assert (stats.in_use, stats.idle, stats.waiting) == (len(self.out), len(self.idle), len(self.queue))
        assert stats.size <= self.bound <= stats.pool_size + stats.max_overflow
        assert self.ledger.is_opening == self.opening

    @invariant()
    def nothing_is_lost(self) -> None:
        assert {slot for slot, _ in self.ledger.held()} == set(self.out)
        assert set(self.out) | set(self.idle) == self.opened

    @invariant()
    def nobody_waits_beside_a_free_slot(self) -> None:
        if self.queue:
            assert not self.idle
            assert len(self.out) == self.bound


def test_ledger_tells_the_same_story_as_the_model() -> None:
    run_state_machine_as_test(
        Books,
        settings=settings(
            max_examples=120,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


def test_take_never_overtakes_a_waiter() -> None:
    ledger = ledger_of(pool_size=2)
    first, second = (ledger.take(None, new=lambda: Slot(0)) for _ in range(2))
    assert first is not None
    assert second is not None
    ledger.enqueue(waiter().waiter)
    ledger.enqueue(waiter().waiter)
    ledger.give_back(first, usable=True)
    assert ledger.take(None, new=lambda: Slot(9)) is None, "one still waits"


def test_slot_handed_to_a_cancelled_waiter_passes_to_the_next() -> None:
    ledger = ledger_of()
    slot = ledger.take(None, new=lambda: Slot(0))
    assert slot is not None
    cancelled, patient = waiter(), waiter()
    ledger.enqueue(cancelled.waiter)
    ledger.enqueue(patient.waiter)
    assert ledger.give_back(slot, usable=True)
    assert cancelled.waiter.slot is slot
    assert ledger.give_up(cancelled.waiter, usable=lambda _slot: True) is None
    assert patient.waiter.slot is slot
    assert (cancelled.woken, patient.woken) == ([1], [1])
    assert ledger.stats() == Stats(pool_size=1, max_overflow=0, in_use=1, idle=0, waiting=0)


def test_unusable_slot_is_handed_on_as_the_right_to_connect() -> None:
    ledger = ledger_of()
    slot = ledger.take(None, new=lambda: Slot(0))
    assert slot is not None
    patient = waiter()
    ledger.enqueue(patient.waiter)
    assert ledger.give_back(slot, usable=False)
    assert patient.waiter.slot is slot


def test_until_the_first_connection_is_ready_one_at_a_time_may_open_it() -> None:
    """And a failure passes the right on: a hundred who wait on a dead server each get their try, in order."""
    ledger = ledger_of(pool_size=5, max_overflow=10, opening=True)
    slot = ledger.take(None, new=lambda: Slot(0))
    assert slot is not None
    places = [waiter() for _ in range(100)]
    for place in places:
        assert ledger.take(None, new=lambda: Slot(9)) is None
        ledger.enqueue(place.waiter)
    for place in places[:40]:
        assert ledger.give_back(slot, usable=False)
        assert place.waiter.slot is slot
        assert ledger.stats().in_use == 1
    numbers = count(1)
    ledger.open_up(new=lambda: Slot(next(numbers)))
    assert [place.waiter.slot.number for place in places[40:54] if place.waiter.slot] == [*range(1, 15)]
    assert ledger.stats() == Stats(pool_size=5, max_overflow=10, in_use=15, idle=0, waiting=46)


def test_slot_given_back_twice_is_refused() -> None:
    ledger = ledger_of()
    slot = ledger.take(None, new=lambda: Slot(0))
    assert slot is not None
    ledger.give_back(slot, usable=True)
    with pytest.raises(KeyError):
        ledger.give_back(slot, usable=True)
    assert ledger.stats().idle == 1


def test_longest_held_is_named_first() -> None:
    ledger = ledger_of(pool_size=3)
    numbers = count()
    taken = [ledger.take(None, new=lambda: Slot(next(numbers))) for _ in range(3)]
    first = taken[0]
    assert first is not None
    ledger.give_back(first, usable=True)
    assert ledger.take(None, new=lambda: Slot(99)) is first, "taken again, so now the shortest held"
    assert [slot.number for slot, _ in ledger.held()] == [1, 2, 0]
