"""Every block of the README and of docs/ is executed; what it shows must be what the page says.

``tests/support/pages.py`` runs the pages and says what is replaced: ``app@localhost/shop`` in a block means an empty
PostgreSQL database made for this page.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.pages import FENCE, Page, PageError, blocks_of

if TYPE_CHECKING:
    from _pytest.mark import ParameterSet

    from stanch.embedded import EmbeddedPostgres

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LEAKING = {"docs/tutorial/from-the-article.md", "docs/explanation/life-of-a-request.md"}
"""Pages that show how the hand-written pattern leaks connections; the collector's complaint is part of the page."""


OF_TODAY = LEAKING | {"docs/explanation/unknown-is-not-failed.md"}
"""Pages with the exact errors of today's releases, and what FastAPI does since 0.118."""


def is_of_today() -> bool:
    releases = {"fastapi": (0, 118), "sqlalchemy": (2, 1)}
    return all(
        tuple(int(part) for part in version(name).split(".")[:2]) >= least for name, least in releases.items()
    )


def page_parameters() -> list[ParameterSet]:
    def marks(name: str) -> list[pytest.MarkDecorator]:
        told = "the page shows what SQLAlchemy 2.1 and FastAPI 0.118 do, and here is an older one"
        leaking = [pytest.mark.abandons_connections] if name in LEAKING else []
        return [*leaking, pytest.mark.skipif(name in OF_TODAY and not is_of_today(), reason=told)]

    return [pytest.param(name, marks=marks(name)) for name in (str(page.relative_to(ROOT)) for page in PAGES)]


@pytest.mark.anyio
@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", page_parameters())
async def test_every_block_of_the_page_does_what_the_page_says(
    name: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    page = Page(ROOT / name, postgres, tmp_path)
    await page.run()

    assert page.ran == sum(
        block.language == "python" or block.body.startswith(("$ pytest", "$ python")) for block in page.blocks
    )


def test_every_link_of_the_readme_leads_somewhere() -> None:
    """The links between the pages of docs/ are checked when they are built; the README's are not."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#([^)]+))?\)", (ROOT / "README.md").read_text())
    assert len(links) > 20

    for path, anchor in links:
        assert (ROOT / path).is_file(), path
        if anchor:
            assert anchor in headings_of((ROOT / path).read_text()), f"{path}#{anchor}"


def headings_of(page: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


BROKEN = {
    "it raises": "```python\n1 / 0\n```\n",
    "it raises another error than the page says": "```python\n1 / 0\n```\n```text\nValueError: no\n```\n",
    "it does not raise what the page says": "```python\npass\n```\n```text\nValueError: no\n```\n",
    "it prints what the page does not show": "```python\nprint(1)\n```\n",
    "it prints something else": "```python\nprint(1)\n```\n```text\n2\n```\n",
    "it warns": "```python\nimport warnings; warnings.warn('careful', stacklevel=1)\n```\n",
    "it logs a warning": "```python\nimport logging; logging.getLogger('x').warning('careful')\n```\n",
    "a coroutine is never awaited": "```python\nimport asyncio; asyncio.sleep(0); None\n```\n",
    "its second block is broken": "```python\na = 1\n```\n```python\nassert a == 2\n```\n",
    "its await fails": "```python\nawait missing()\n```\n",
    "its script fails": (
        "```python\n# tell.py\nprint('two')\n```\n```text\ntwo\n```\n```console\n$ python tell.py\none\n```\n"
    ),
    "it stores nothing": (
        "```python\nfrom stanch import Database\nfrom sqlalchemy import text\n"
        "db = Database('postgresql+asyncpg://app@localhost/shop')\n"
        "async with db.begin() as connection: print(await connection.scalar(text('select 1')))\n```\n"
        "```text\n2\n```\n"
    ),
}


@pytest.mark.anyio
@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
async def test_a_planted_broken_block_turns_the_page_red(
    text: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    with pytest.raises(PageError, match=r"planted\.md:\d+"):
        await Page(Path("planted.md"), postgres, tmp_path, text=text).run()


@pytest.mark.parametrize(
    "text",
    [
        "- a list\n\n  ```python\n  1 / 0\n  ```\n",
        "```py\n1 / 0\n```\n",
        "```python\n1 / 0\n",
        "~~~python\n1/0\n~~~\n",
    ],
)
def test_a_block_that_would_be_overlooked_is_refused(text: str) -> None:
    with pytest.raises(PageError):
        blocks_of(text)


@pytest.mark.anyio
async def test_a_block_sees_the_blocks_before_it_and_a_database_of_its_own(
    postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    """The runner's own promises: shared names, saved files, real URLs that are translated back."""
    text = (
        "```python\n# words.py\nurl = 'postgresql+asyncpg://app@localhost/shop'\n```\n"
        "```python\nimport words\nprint(words.url == url, url)\n```\n"
        "```text\nTrue postgresql+asyncpg://app@localhost/shop\n```\n"
        "```python\nimport asyncpg\nc = await asyncpg.connect(url.replace('+asyncpg', ''))\n"
        "print(await c.fetchval('select 6 * 7'))\nawait c.close()\nraise LookupError(object())\n```\n"
        "```text\n42\nLookupError: <object object at 0x...>\n```\n"
    )
    page = Page(Path("good.md"), postgres, tmp_path, text=text)
    await page.run()

    assert page.ran == 3
