"""A headless Chromium, driven by Playwright, and pages in it whose console must stay empty."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 20_000  # ms for whatever is waited for


@contextmanager
def started_browser() -> Iterator[Any]:
    """Start a browser: one that is installed, else Playwright's own; skip the test where there is neither."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        command = next(filter(None, map(shutil.which, NAMES)), None)
        if command is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip(f"no browser: neither {', '.join(NAMES)} nor Playwright's own is installed (.ci/browser)")
        # its sandbox needs rights that containers often lack; the pages are ours
        browser = driver.chromium.launch(executable_path=command, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """One page in a browser context of its own. `complaints` holds what its console said; `check` wants it empty."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requested: list[str] = []
        self.page.on("console", lambda message: self._said(message.type, message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.goto(url)

    def _said(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.complaints.append(f"{kind}: {text}")

    def forget(self, *expected: str) -> None:
        """Take complaints that the test provokes off the list: those that contain one of the texts."""
        self.complaints = [line for line in self.complaints if not any(text in line for text in expected)]

    def check(self) -> None:
        """No error, no warning, no violation of the security policy, and nothing loaded from elsewhere."""
        home = "/".join(self.page.url.split("/")[:3])
        assert not self.complaints
        assert not [url for url in self.requested if not url.startswith((home + "/", f"blob:{home}/"))]

    def close(self) -> None:
        """Check and close."""
        self.check()
        self.context.close()

    def fingers(self, kind: str, *points: tuple[float, float]) -> None:
        """Send one event of touch (touchStart, touchMove, touchEnd) with all fingers at their points."""
        if not hasattr(self, "_session"):
            self._session = self.context.new_cdp_session(self.page)
        places = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
        self._session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})

    def swipe(self, x: float, y: float, dx: float, dy: float = 0.0, steps: int = 6) -> None:
        """Put one finger down at (x, y), move it by (dx, dy), and lift it."""
        self.fingers("touchStart", (x, y))
        for step in range(1, steps + 1):
            self.fingers("touchMove", (x + dx * step / steps, y + dy * step / steps))
        self.fingers("touchEnd")
