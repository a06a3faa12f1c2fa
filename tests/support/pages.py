"""Runs a page of the documentation as its reader would: every block, in its order, on one event loop.

- A ``python`` block is executed; the blocks of a page share one namespace, and ``await`` works at the top level.
  If its first line is a comment that is a file name (``# shop.py``), it is also saved, and can be imported.
- What a block shows (``print``, warnings, log lines from WARNING up, at last the error it raised) must be the next
  ``text`` block, word for word; ``...`` stands for anything. Nothing shown means no ``text`` block.
- A ``console`` block that begins with ``$ pytest`` or ``$ python`` is run as well, in a process of its own, and the
  rest of it is compared in the same way. Other ``console`` blocks (installing, make) are for people.

What the reader does not see: ``app@localhost/NAME`` in a block means an empty PostgreSQL database of this page's own
for each NAME, and is replaced by its address; what is shown is translated back. Files land in an empty folder.
Memory addresses are shown as ``0x...``, SQLAlchemy's line *Background on this error* is left out, and the
``await_only()`` of SQLAlchemy 2.0 is shown as 2.1's ``await_()``: they differ from run to run or from release to
release. The garbage collector runs after each block, so that what it complains of belongs to the block. Where a line of
the page is named, it is shown as the line of its block, in a file ``shop.py``.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import doctest
import gc
import inspect
import logging
import os
import re
import sys
import traceback
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.ext.asyncio import AsyncEngine

from stanch import Database
from tests.support.judge import FreshDatabase, assert_nothing_left

if TYPE_CHECKING:
    from collections.abc import Generator

    from stanch.embedded import EmbeddedPostgres

FENCE: Final = re.compile(r"^```(?P<language>[^\n`]*)\n(?P<body>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
INDENTED_FENCE: Final = re.compile(r"^[ \t]+(```|~~~)|^~~~", re.MULTILINE)
FILE_NAME: Final = re.compile(r"# (?P<stem>[a-z_]+)\.py\n")
PLACEHOLDER: Final = re.compile(r"app@localhost/(?P<name>[a-z_]+)")
LANGUAGES: Final = frozenset({"python", "text", "console", "ini", "json", "toml", "sql", "yaml"})
"""What a block may be called. Only these, so that no ``py`` or ``pycon`` slips by unexecuted."""

NOT_SHOWN_TO_READERS: Final = (DeprecationWarning, PendingDeprecationWarning, ResourceWarning)
"""Python's own choice, outside of ``__main__``."""

BACKGROUND: Final = re.compile(r"\n?\(Background on this error at: [^)]*\)")
PYTEST_OPTIONS: Final = ("-p", "anyio.pytest_plugin", "-p", "no:cacheprovider")
"""Only the plugin that the pages use: loading all of them takes longer than the tests."""

COMMAND: Final = 120.0
"""Seconds that a command has; it needs a few, on a machine with nothing else to do."""

ORPHANS: Final = 1.0
"""Seconds that a task has which a block has started and not awaited."""
ADDRESS: Final = re.compile(r"\b0x[0-9a-f]{6,16}\b")


@dataclass(frozen=True)
class Block:
    """One fenced block, and the line of its page on which its text begins."""

    language: str
    body: str
    line: int


class PageError(AssertionError):
    """A block did not do what its page says. The text names page and line."""


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of *page*; an indented fence would be overlooked, so it is refused."""
    if stray := INDENTED_FENCE.search(page):
        raise PageError(
            f"line {page.count(chr(10), 0, stray.start()) + 1}: write fences as ``` in the first column"
        )
    found = [
        Block(match["language"].strip(), match["body"], page.count("\n", 0, match.start("body")) + 1)
        for match in FENCE.finditer(page)
    ]
    if 2 * len(found) != len(re.findall(r"^```", page, re.MULTILINE)):
        raise PageError("a fence is opened and not closed")
    for block in found:
        if block.language not in LANGUAGES:
            raise PageError(
                f"line {block.line}: a block is one of {sorted(LANGUAGES)}, not {block.language!r}"
            )
    return found


class Page:
    """One page being run. *folder* is empty and becomes the current folder."""

    def __init__(
        self, path: Path, server: EmbeddedPostgres, folder: Path, *, text: str | None = None
    ) -> None:
        self.path = path
        self.blocks = blocks_of(path.read_text() if text is None else text)
        self.ran = 0
        self._server = server
        self._folder = folder
        self._databases: dict[str, FreshDatabase] = {}
        self._module = types.ModuleType("page")
        self._shown: list[str] = []

    async def run(self) -> None:
        """Run every block; raises ``PageError`` at the first that does not do what the page says."""
        with self._stage():
            try:
                for number, block in enumerate(self.blocks):
                    after = self.blocks[number + 1] if number + 1 < len(self.blocks) else None
                    await self._run_block(block, after)
                for judged in self._databases.values():
                    await assert_nothing_left(judged)
            finally:
                await self._clear()

    # One block --------------------------------------------------------------------------------------------------

    async def _run_block(self, block: Block, after: Block | None) -> None:
        if block.language == "console":
            await self._run_command(block)
        if block.language != "python":
            return
        expected = after.body if after is not None and after.language == "text" else ""
        self._shown.clear()
        raised, story = await self._execute(block)
        self._compare(block, expected, "".join(self._shown) + raised, story)
        self.ran += 1

    async def _execute(self, block: Block) -> tuple[str, str]:
        """What the block raised, in its last words and with its traceback; two empty texts for nothing."""
        source = await self._substituted(block.body)
        module = self._module
        if named := FILE_NAME.match(source):
            (self._folder / f"{named['stem']}.py").write_text(source)
            module = sys.modules[named["stem"]] = types.ModuleType(named["stem"])
        code = compile(
            "\n" * (block.line - 1) + source, str(self.path), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        )
        others = asyncio.all_tasks()
        try:
            result: Any = eval(code, module.__dict__)
            if inspect.iscoroutine(result):
                await result
        except Exception as error:
            # As text: its frames hold sessions and connections, and the collector shall find them now.
            return "".join(traceback.format_exception_only(error)), traceback.format_exc()
        finally:
            if module is not self._module:
                self._module.__dict__.update(
                    {name: value for name, value in vars(module).items() if not name.startswith("__")}
                )
            await self._settle(others)
        return "", ""

    async def _settle(self, others: set[asyncio.Task[Any]]) -> None:
        """Let what the block left behind come to its end, so that what is said about it is said now."""
        if orphans := asyncio.all_tasks() - others:
            await asyncio.wait(orphans, timeout=ORPHANS)
        await asyncio.sleep(0)  # what was closed just now says so to the loop
        gc.collect()

    async def _run_command(self, block: Block) -> None:
        command, _, expected = block.body.partition("\n")
        words = command.removeprefix("$ ").split()
        if words[0] not in {"pytest", "python"}:
            return
        if words[0] == "pytest":
            words = ["python", "-m", "pytest", *PYTEST_OPTIONS, *words[1:]]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *words[1:],
            cwd=self._folder,
            env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "COLUMNS": "80"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(COMMAND):
                output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        self._compare(block, expected, output.decode(), "")
        self.ran += 1

    def _compare(self, block: Block, expected: str, shown: str, story: str) -> None:
        shown = self._translated(shown).strip("\n")
        expected = expected.strip("\n")
        if not expected and not shown:
            return
        checker = doctest.OutputChecker()
        if expected and checker.check_output(expected + "\n", shown + "\n", doctest.ELLIPSIS):
            return
        where = f"{self.path.name}:{block.line}"
        page, block_shows = expected or "(nothing)", shown or "(nothing)"
        raise PageError(
            f"{where}: the page shows\n\n{page}\n\nbut the block shows\n\n{block_shows}\n\n{story}"
        )

    # What the reader does not see -------------------------------------------------------------------------------

    async def _substituted(self, source: str) -> str:
        for name in {match["name"] for match in PLACEHOLDER.finditer(source)} - self._databases.keys():
            self._databases[name] = await FreshDatabase.create(self._server)
        return PLACEHOLDER.sub(
            lambda match: self._databases[match["name"]].url(None).partition("://")[2], source
        )

    def _translated(self, shown: str) -> str:
        for name, judged in self._databases.items():
            address = judged.url(None).partition("://")[2]
            shown = shown.replace(address, f"app@localhost/{name}").replace(judged.name, name)
            shown = shown.replace(address.partition("@")[2].partition("/")[0], "localhost:5432")
        shown = shown.replace("await_only()", "await_()")
        shown = re.sub(rf"{re.escape(self.path.name)}:(\d+)", lambda match: self._place(int(match[1])), shown)
        shown = ADDRESS.sub("0x...", BACKGROUND.sub("", shown))
        return "\n".join(line.rstrip() for line in shown.splitlines())

    def _place(self, line: int) -> str:
        """A line of the page as a line of the block it stands in, so that it survives an edit further up."""
        return f"shop.py:{line - max(block.line for block in self.blocks if block.line <= line) + 1}"

    @contextlib.contextmanager
    def _stage(self) -> Generator[None]:
        home, modules = Path.cwd(), set(sys.modules)
        handler = _Shown(self._shown)
        os.chdir(self._folder)
        sys.path.insert(0, str(self._folder))
        sys.modules["page"] = self._module
        logging.getLogger().addHandler(handler)
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(_Writer(self._shown)):
                warnings.simplefilter("always")
                for kind in NOT_SHOWN_TO_READERS:
                    warnings.simplefilter("ignore", kind)
                warnings.showwarning = self._show_warning
                yield
        finally:
            logging.getLogger().removeHandler(handler)
            for name in ["page", *(set(sys.modules) - modules)]:
                if name == "page" or (self._folder / f"{name}.py").exists():
                    sys.modules.pop(name, None)
            sys.path.remove(str(self._folder))
            os.chdir(home)

    def _show_warning(
        self, message: Warning | str, category: type[Warning], *_where: object, **_more: object
    ) -> None:
        if f"{message}\n" not in self._shown:  # SQLAlchemy's pool says it to the log and as a warning
            self._shown.append(f"{category.__name__}: {message}\n")

    async def _clear(self) -> None:
        for value in list(vars(self._module).values()):
            # Also what the page has left open: its connections end here.
            engine: Any = value.engine if isinstance(value, Database) else value
            if isinstance(engine, AsyncEngine):
                await engine.dispose()
        vars(self._module).clear()
        gc.collect()
        for judged in self._databases.values():
            await judged.drop()


class _Writer:
    def __init__(self, shown: list[str]) -> None:
        self._shown = shown

    def write(self, text: str) -> int:
        self._shown.append(text)
        return len(text)

    def flush(self) -> None:
        pass


class _Shown(logging.Handler):
    """As Python does where logging is not configured: the message alone, from WARNING up."""

    def __init__(self, shown: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._shown = shown

    def emit(self, record: logging.LogRecord) -> None:
        self._shown.append(record.getMessage() + "\n")
