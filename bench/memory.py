"""How much memory a process has, in its own words."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Final

ROLLUP: Final = Path("/proc/self/smaps_rollup")
"""Counted when it is read; ``statm`` and ``status`` are some hundred KiB behind (proc_pid_status(5))."""


def lacks() -> str | None:
    """Why it cannot be said here, or None."""
    return None if ROLLUP.exists() else f"{ROLLUP}, which Linux has"


def resident() -> int:
    """Bytes of this process that are in memory, after garbage was collected."""
    gc.collect()
    found = re.search(r"^Rss:\s+(\d+) kB", ROLLUP.read_text(), re.MULTILINE)
    assert found, "the kernel tells it otherwise"
    return int(found[1]) * 1024
