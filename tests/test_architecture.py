"""The house stands: floors, a light door, a sentence at the head of each module, nothing of one machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import stanch

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "stanch"
MODULES = sorted(SOURCE.rglob("*.py"))

CONTRACTS = {
    contract["id"]: contract
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "importlinter"
    ]["contracts"]
}
EDGES_AND_ASSEMBLIES = set(re.findall(r"\w+", " ".join(CONTRACTS["floors"]["layers"][:2])))
DRIVERS = {"drivers.asyncpg", "drivers.psycopg", "drivers.aiosqlite"}

# Written as patterns that do not match themselves.
FORBIDDEN = re.compile(
    r"""py[p]i\.org | python[h]osted\. | registry\.np[m]js | deb\.deb[i]an\.
    | /wor[k]/ | /ro[o]t/ | /far[m]/ | /hom[e]/\w | \.pyen[v]/
    | \bcl[a]ude | \banthr[o]pic | \bopen[a]i\b | \bchat[g]pt | \bll[m]s?\b
    | \bA[I]\s+(?:session|agent|assistant)
    | DESIG[N]\.md | \bresearc[h]/\w+\.md | \bissue[ ]\#?\d""",
    re.VERBOSE | re.IGNORECASE,
)


def dotted(path: Path) -> str:
    """`src/stanch/drivers/__init__.py` is `stanch.drivers`."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


CORE = [
    name
    for name in map(dotted, MODULES)
    if (inner := name.removeprefix("stanch").removeprefix(".")).split(".")[0] not in EDGES_AND_ASSEMBLIES
    and inner not in DRIVERS
]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=55, check=False
    )


def strangers_after(code: str) -> list[str]:
    """The packages that *code* makes a fresh interpreter load, beyond SQLAlchemy and what it loads itself."""
    report = "\nimport sys as s; print(*sorted({m.partition('.')[0] for m in s.modules} - known))"
    prelude = (
        "import sys, sqlalchemy.ext.asyncio, sqlalchemy.orm\n"
        "known = {m.partition('.')[0] for m in sys.modules} | sys.stdlib_module_names\n"
    )
    done = run("-c", prelude + code + report)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "stanch" in loaded
    return sorted(loaded - {"stanch"})


def test_every_module_imports_only_from_lower_floors() -> None:
    """The contract stands in pyproject.toml; a module it does not know breaks it, too."""
    done = run("-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_of_the_core_is_kept_from_the_web_frameworks() -> None:
    """The contract about web frameworks lists its modules; this is what keeps the list whole."""
    core = {".".join(name.split(".")[:2]) for name in CORE if name != "stanch"}
    assert set(CONTRACTS["no-web"]["source_modules"]) == core


def test_importing_stanch_loads_nothing_but_what_it_depends_on() -> None:
    """No web framework, no driver, no pydantic: `import stanch` costs SQLAlchemy and itself."""
    assert strangers_after("import stanch") == []


def test_no_module_of_the_core_needs_an_extra() -> None:
    """Every floor below the edges loads without a web framework or a driver."""
    assert strangers_after("import " + ", ".join(CORE)) == []


def test_nothing_below_the_door_comes_back_through_it() -> None:
    """Inside, `from stanch.pool import Pool`; only users, and the demo that shows how, write `from stanch`.

    A module of the package may be imported by its own name in either spelling.
    """
    through_the_door = [
        f"{dotted(path)}:{node.lineno}"
        for path in MODULES
        if not dotted(path).startswith("stanch.demo")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and node.module == "stanch" and not submodules_only(node))
        or (isinstance(node, ast.Import) and any(alias.name == "stanch" for alias in node.names))
    ]
    assert through_the_door == []


def submodules_only(node: ast.ImportFrom) -> bool:
    inside = {dotted(path) for path in MODULES}
    return all(f"stanch.{alias.name}" in inside for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_opens_by_saying_what_it_is(path: Path) -> None:
    """One sentence, then a blank line if there is more."""
    first, _, rest = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")
    assert first.endswith((".", ":"))
    assert not rest or rest.startswith("\n")


def test_the_door_names_everything_it_shows_in_order() -> None:
    """`stanch.__all__` is complete, true and sorted: constants, classes, functions."""
    shown = {
        name
        for name, thing in vars(stanch).items()
        if not name.startswith("_") and not isinstance(thing, ModuleType) and name != "annotations"
    }
    assert shown == set(stanch.__all__)
    assert list(stanch.__all__) == sorted(stanch.__all__, key=lambda name: (not name.isupper(), name))


def tree() -> list[Path]:
    """Every file that git tracks or would track."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_nothing_in_the_tree_speaks_of_the_place_where_it_was_written() -> None:
    """No package host, no path of a machine, no lock file that names hosts."""
    found: list[str] = []
    files = tree()
    assert SOURCE / "errors.py" in files
    for path in files:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {hit.group()}"
            for number, line in enumerate(lines, 1)
            if (hit := FORBIDDEN.search(line))
        ]
    assert found == []
    assert {path.name for path in files} & {"uv.lock", ".python-version"} == set()
