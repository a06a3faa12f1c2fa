"""The script of a run: who does what and when, the same for both shops, decided by the seed alone."""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from stanch.demo.journal import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

RATE: Final = 40.0
"""Acts per second and shop."""

DECK: Final = {
    Kind.ORDER: 28,
    Kind.READ: 14,
    Kind.PAIR: 14,
    Kind.RAISED: 3,
    Kind.RETURNED: 4,
    Kind.STATUS_SET: 4,
    Kind.INVALID: 3,
    Kind.FAILING_COMMIT: 8,
    Kind.SWALLOWED: 5,
    Kind.SLEEPS: 5,
    Kind.STREAM: 3,
    Kind.HANGS_UP: 6,
    Kind.HANGS_UP_IN_STREAM: 3,
}
"""One hundred acts. The script is dealt from shuffled decks, so that a short run has its share of everything."""


@dataclass(frozen=True, slots=True)
class Act:
    """One thing that one client does, *due* seconds after the start.

    *order_id* is the order that it places, or asks for. *patience*: seconds until it hangs up, if it does.
    """

    kind: Kind
    due: float
    order_id: uuid.UUID
    item_id: int
    quantity: int
    patience: float


def write_script(seed: int, seconds: float, *, items: int, patience: float, rate: float = RATE) -> list[Act]:
    """All acts of *seconds* seconds, in the order in which they are due, *rate* in each.

    *items*: there are items 1 to this. *patience*: the longest time in seconds before a client hangs up.

    >>> one, other = (write_script(7, 5.0, items=5, patience=0.1) for _ in range(2))
    >>> one == other, len(one)
    (True, 200)
    """
    dice = random.Random(seed)
    kinds = _deal(dice)
    acts: list[Act] = []
    placed: list[uuid.UUID] = []
    for number in range(int(seconds * rate)):
        kind = next(kinds)
        fresh = uuid.UUID(int=dice.getrandbits(128), version=4)
        acts.append(
            Act(
                kind=kind,
                due=number / rate,
                order_id=dice.choice(placed) if kind is Kind.READ and placed else fresh,
                item_id=dice.randint(1, items),
                quantity=dice.randint(1, 9),
                patience=dice.uniform(0.1, 1.0) * patience,
            )
        )
        if kind is Kind.ORDER:
            placed.append(fresh)
    return acts


def _deal(dice: random.Random) -> Iterator[Kind]:
    while True:
        deck = [kind for kind, number in DECK.items() for _ in range(number)]
        dice.shuffle(deck)
        yield from deck
