"""What there is to see at one moment of a run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stanch.demo.journal import Journal
from stanch.demo.server import Layer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stanch.demo.faults import Faults


@dataclass(slots=True, kw_only=True)
class Scene:
    """The state of a run, looked at by the view and changed by nobody else than the run."""

    url: str
    """Of the shop on stanch."""
    seconds: float
    faults: Faults
    journals: Mapping[Layer, Journal] = field(default_factory=lambda: {layer: Journal() for layer in Layer})
    pool: Mapping[str, int] | None = None
    """What the shop on stanch says of its pool; None while it does not answer."""
    since: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds since the traffic began."""
        return time.monotonic() - self.since

    @property
    def left(self) -> float:
        """Seconds until the last request is due."""
        return max(0.0, self.seconds - self.elapsed)

    @property
    def pool_in_words(self) -> str:
        """Such as ``2 in use, 3 idle, 0 waiting``."""
        if self.pool is None:
            return "no answer"
        return f"{self.pool['in_use']} in use, {self.pool['idle']} idle, {self.pool['waiting']} waiting"
