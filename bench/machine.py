"""What a run ran on: never the name of a machine or a path, which are nobody's business."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bench.subjects import Subject
    from stanch.embedded import EmbeddedPostgres

PACKAGES: Final = (
    "stanch",
    "fastapi",
    "starlette",
    "pydantic",
    "sqlalchemy",
    "greenlet",
    "asyncpg",
    "psycopg",
    "uvicorn",
    "uvloop",
    "httptools",
)
"""What every subject stands on; of the last two uvicorn works without."""


def machine() -> dict[str, Any]:
    """The processor, how much of it there is, and how busy it was at this moment."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "memory_gib": _memory(),
        "system": _system(),
        "architecture": platform.machine(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "load": load(),
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def versions(server: EmbeddedPostgres, subjects: Iterable[Subject]) -> dict[str, str]:
    """Of everything that had a part in it."""
    peers = dict.fromkeys(subject.package for subject in subjects if subject.package)
    found = {"PostgreSQL": server.version}
    for package in dict.fromkeys((*PACKAGES, *peers)):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    if commit := _commit():
        found["stanch"] = f"{found.get('stanch', '')} ({commit})".strip()
    return found


def cores() -> int:
    """Those that this process may use."""
    asked = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(asked(0)) if asked else os.cpu_count() or 1


def load() -> float | None:
    """How many processes wanted to run, on average of the last minute; None where nobody counts that."""
    with suppress(OSError, AttributeError):
        return round(os.getloadavg()[0], 2)
    return None


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    if sys.platform == "darwin":
        return _said_by("sysctl", "-n", "machdep.cpu.brand_string")
    return platform.processor() or "unknown"


def _memory() -> float | None:
    with suppress(ValueError, OSError, AttributeError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return None


def _system() -> str:
    kernel = f"{platform.system()} {platform.release()}"
    with suppress(OSError):
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {kernel}"
    return kernel


def _commit() -> str:
    """Of this tree, and whether it was changed since; nothing where it is no repository."""
    return _said_by("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")


def _said_by(*command: str) -> str:
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)  # noqa: S603  # as above
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
