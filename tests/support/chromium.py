# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A headless Chromium that playwright drives, and its tabs, which collect the errors of their pages."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextlib.contextmanager
def running_chromium() -> Iterator[Chromium]:
    """Yield the Chromium of this machine; end its processes afterwards."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        raise FileNotFoundError(f"expected one of {', '.join(NAMES)} on the PATH; apt-get install chromium")
    options = {"executable_path": program, "args": ["--disable-gpu"]}
    with sync_playwright() as playwright, playwright.chromium.launch(**options) as browser:
        yield Chromium(browser)


class Chromium:
    """One process of Chromium; ``open`` shows a file in a tab of its own."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser

    def open(self, path: Path, *, width: int = 1280, height: int = 800, dark: bool = False) -> Tab:
        """Return a tab that has loaded the file, and whose script has set ``data-ready`` or shown a problem."""
        scheme = "dark" if dark else "light"
        tab = Tab(self._browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme))
        tab.page.goto(path.resolve().as_uri(), wait_until="commit")
        tab.wait_for("document.querySelector('html[data-ready], #problem:not([hidden])')")
        return tab


class Tab:
    """One page in short words; ``page`` is playwright's object, which can do more."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.problems: list[str] = []
        """Every error and warning of the console, every exception and every violation of the policy of the page."""
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.problems.append(str(error)))

    def value(self, expression: str) -> Any:
        return self.page.evaluate(expression)

    def wait_for(self, expression: str, seconds: float = 30) -> None:
        """Return when the expression is true; raise playwright's Error if it stays false or fails.

        The page's policy forbids ``eval``, which playwright's own wait_for_function calls in the page.
        """
        message = json.dumps(f"not true within {seconds} s: {expression}")
        self.value(f"""(async () => {{
            const end = Date.now() + {1000 * seconds};
            while (!({expression})) {{
                if (Date.now() > end) throw new Error({message});
                await new Promise((done) => setTimeout(done, 10));
            }}
        }})()""")

    def resize(self, width: int, height: int = 800) -> None:
        """Give the page another size; return when the page has answered the event of it, which comes with a frame."""
        self.page.set_viewport_size({"width": width, "height": height})
        self.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def click(self, selector: str) -> None:
        self.page.click(selector)

    def hover(self, selector: str) -> None:
        self.page.hover(selector)

    def key(self, name: str) -> None:
        self.page.keyboard.press(name)

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning", "assert"):
            self.problems.append(message.text)
