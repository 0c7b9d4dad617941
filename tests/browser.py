"""Pages in a headless Chromium, as people open them from disk, and what they did there."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--force-color-profile=srgb"]


@dataclass
class Opened:
    """A page with what went wrong on it, what it asked the network for, and the dialogs that it opened."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def is_quiet(self) -> bool:
        """Nothing of all that; pytest shows what there was."""
        assert (self.errors, self.requests, self.dialogs) == ([], [], [])
        return True

    def sideways_px(self) -> int:
        """By how much the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def pixel(self, selector: str) -> tuple[int, ...]:
        """The colour in the middle of the first element of a selector, as it is painted."""
        with Image.open(io.BytesIO(self.page.locator(selector).first.screenshot(animations="allow"))) as image:
            pixels = np.asarray(image.convert("RGB"))
        return tuple(int(value) for value in pixels[pixels.shape[0] // 2, pixels.shape[1] // 2])

    def shown_frames(self) -> list[str]:
        """Where the pictures of all films lie at one moment."""
        look = "[...document.querySelectorAll('.film')].map((film) => getComputedStyle(film).backgroundPosition.split(',')[0])"
        return self.page.evaluate(look)

    def frames_seen(self, looks: int = 60) -> Iterator[list[str]]:
        """What all films show at `looks` moments, at odd distances."""
        for _ in range(looks):
            yield self.shown_frames()
            self.page.wait_for_timeout(45)


@contextmanager
def opened(browser: Any, path: Path, width: int = 1280, **context: Any) -> Iterator[Opened]:
    """Open a file in a window `width` pixels wide; `context` goes to Playwright's `new_context`."""
    with browser.new_context(viewport={"width": width, "height": 844}, **context) as made:
        shown = Opened(made.new_page())
        page, own = shown.page, path.as_uri()
        page.on("pageerror", lambda error: shown.errors.append(str(error)))
        page.on("console", lambda said: shown.errors.append(said.text) if said.type in ("error", "warning") else None)
        page.on(
            "request", lambda asked: None if asked.url.startswith(("data:", own)) else shown.requests.append(asked.url)
        )
        page.on("dialog", lambda dialog: (shown.dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(own, wait_until="load")
        yield shown
