"""What a session layer adds to the start of an app."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final, NamedTuple

from bench.cases.case import Scale
from bench.cases.rounds import Gathered, rotated
from bench.subjects import BASELINE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.cases.case import Ground
    from bench.results import Figure

ALONE: Final = "import fastapi, sqlalchemy.ext.asyncio, asyncpg"
"""What every app on these has to import."""
LAYERS: Final = {
    BASELINE: (),
    "advanced-alchemy": ("advanced_alchemy.extensions.fastapi",),
    "context-async": ("context_async_sqlalchemy", "context_async_sqlalchemy.fastapi_utils"),
    "fastapi-async": ("fastapi_async_sqlalchemy",),
    "fastapi-toolsets": ("fastapi_toolsets.db",),
    "sqlmodel": ("sqlmodel",),
    "stanch": ("stanch", "stanch.fastapi"),
}
"""What an app imports of each beside; the others import nothing."""
COUNTED_QUICKLY: Final = frozenset({BASELINE, "stanch"})
"""Whose instructions are counted in a quick run, too."""
ROUNDS: Final = {Scale.QUICK: 3, Scale.FULL: 21}
TOLD: Final = """
import pathlib, re, resource
used = resource.getrusage(resource.RUSAGE_SELF)
status = pathlib.Path("/proc/self/status")
peak = re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1] if status.exists() else used.ru_maxrss // 1024
print(used.ru_utime + used.ru_stime, peak)
"""
"""Seconds, and KiB. ``ru_maxrss``: Linux has a process begin with its parent's, macOS counts bytes (getrusage(2))."""
TIMEOUT: Final = 600
IMPORTING: Final = 0.6
COUNTING: Final = 8.0
"""Seconds of an import, and of one under valgrind."""


class Imports:
    """The case."""

    name = "imports"
    title = "Import: what a session layer adds to the start of an app"
    method = (
        f"`{ALONE}` in a new process, alone ({BASELINE}) and with what an app imports of each layer; from bytecode that"
        " was compiled before, as every start after the first does it. Seconds of the processor, user's and system's,"
        " and the instructions that valgrind's cachegrind counts, without the cyclic collector, whose rounds fall to"
        " whom luck has it; both less those of an interpreter that imports nothing. And the most memory that the"
        " process had."
    )

    def needs(self) -> str | None:
        """Nothing; without valgrind instructions are left out."""
        return None

    def seconds(self, ground: Ground) -> float:
        """By the number of layers."""
        names = _names(ground)
        counted = -(-len(_counted(ground, names)) // (os.cpu_count() or 1)) * COUNTING
        return len(names) * IMPORTING * (ROUNDS[ground.scale] + 1) + counted

    def run(self, ground: Ground) -> Iterator[Figure]:
        """Compile, count, then the rounds."""
        names, gathered = _names(ground), Gathered(self.name)
        with TemporaryDirectory(prefix="bench-bytecode-") as folder:
            python = _Python(Path(folder))
            for name in names:
                ground.step(f"compiling: {name}")
                python.used(_code(name))
            for name, instructions in _instructions(ground, python, names):
                gathered.of(name).less("instructions", "million", instructions / 1e6)
            for number in range(ROUNDS[ground.scale]):
                ground.step(f"round {number + 1} of {ROUNDS[ground.scale]}")
                nothing = python.used("pass")
                for name in rotated(names, number):
                    used = python.used(_code(name))
                    gathered.of(name).less("CPU", "s", used.cpu - nothing.cpu)
                    gathered.of(name).less("peak memory", "MiB", used.memory / 2**20)
        yield from gathered.figures()


def _names(ground: Ground) -> list[str]:
    """The baseline in any case: all others are compared with it."""
    asked = [subject.name for subject in ground.subjects if subject.name in LAYERS]
    return [BASELINE, *(name for name in asked if name != BASELINE)]


def _counted(ground: Ground, names: list[str]) -> list[str]:
    if shutil.which("valgrind") is None:
        return []
    return [name for name in names if ground.scale is Scale.FULL or name in COUNTED_QUICKLY]


def _code(name: str) -> str:
    return ", ".join((ALONE, *LAYERS[name]))


def _instructions(ground: Ground, python: _Python, names: list[str]) -> list[tuple[str, int]]:
    counted = _counted(ground, names)
    if not counted:
        return []
    ground.step(f"counting instructions: {', '.join(counted)}")
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # they are the same, whoever else is at work
        nothing, *those = threads.map(python.instructions, ["pass", *map(_code, counted)])
    return [(name, instructions - nothing) for name, instructions in zip(counted, those, strict=True)]


class Used(NamedTuple):
    """What a process has used."""

    cpu: float
    """Seconds."""
    memory: float
    """Bytes, at most."""


class _Python:
    """An interpreter that keeps its bytecode in *folder*."""

    def __init__(self, folder: Path) -> None:
        # Nothing else: where Python's objects lie in memory, and so how its caches collide, depends on every variable.
        kept = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")
        self._environment = {
            **{name: os.environ[name] for name in kept if name in os.environ},
            "PYTHONHASHSEED": "0",
            "PYTHONPYCACHEPREFIX": str(folder),
        }

    def used(self, code: str) -> Used:
        """By *code*, and the start of the interpreter."""
        cpu, memory = self._said(sys.executable, "-c", f"{code}{TOLD}").split()
        return Used(float(cpu), float(memory) * 1024)

    def instructions(self, code: str) -> int:
        """Of *code*, and of the start of the interpreter; in user space."""
        valgrind = ("valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null")
        said = self._said(*valgrind, sys.executable, "-c", f"import gc; gc.disable()\n{code}")
        found = re.search(r"I +refs: +([\d,]+)", said)
        assert found, "valgrind says it otherwise"
        return int(found[1].replace(",", ""))

    def _said(self, *command: str) -> str:
        done = subprocess.run(  # noqa: S603  # our own words
            command, env=self._environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return done.stdout + done.stderr


CASE: Final = Imports()
