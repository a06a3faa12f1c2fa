"""A real browser, Debian's chromium, and a visit to a page that is watched: nothing red, nothing from elsewhere."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from playwright.async_api import async_playwright

from tests.support.optional import path_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from playwright.async_api import Browser, Page

FLAGS = (
    "--no-sandbox",  # the tests may run as root
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@dataclass
class Visit:
    """One page, and whatever the browser complained of or asked for meanwhile."""

    page: Page
    complaints: list[str] = field(default_factory=list[str])
    asked: list[str] = field(default_factory=list[str])

    async def text(self, selector: str) -> str:
        """What a person reads there now."""
        return await self.page.locator(selector).inner_text()

    def assert_calm(self, *, but: tuple[str, ...] = ()) -> None:
        """Nothing was complained of, *but* what the test has brought about; no request has left the origin."""
        unasked = [text for text in self.complaints if not any(part in text for part in but)]
        assert not unasked, unasked
        own = urlsplit(self.page.url).netloc
        assert {urlsplit(url).netloc for url in self.asked} <= {own}, self.asked


@asynccontextmanager
async def browsing() -> AsyncGenerator[Browser]:
    """The browser, with an empty profile that is gone afterwards."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path_of("chromium"), args=FLAGS)
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def visiting(browser: Browser, url: str, **options: Any) -> AsyncGenerator[Visit]:
    """Open *url* as a visitor of its own; *options* are those of a browser context."""
    chosen: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}} | options
    context = await browser.new_context(**chosen)
    try:
        page = await context.new_page()
        visit = Visit(page)
        page.on("console", lambda said: visit.complaints.append(f"{said.type}: {said.text}"))
        page.on("pageerror", lambda error: visit.complaints.append(f"uncaught: {error}"))
        page.on("dialog", lambda dialog: visit.complaints.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: visit.asked.append(request.url))
        await page.goto(url)
        yield visit
    finally:
        await context.close()
