"""A headless Chromium for the tests that look at pages as a person does; where there is none, they are skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
         "disable-component-update", "disable-sync")  # fmt: skip
TIMEOUT_MS = 300_000
"""How long any one step may take: other work may keep the machine busy."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with a profile of its own, for as long as the body runs."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium found: install it (Debian, Ubuntu: apt-get install chromium) or name one in CHROMIUM")
    with sync_playwright() as playwright:
        options = [f"--{option}" for option in QUIET]
        browser = playwright.chromium.launch(executable_path=found, args=options, timeout=TIMEOUT_MS)
        try:
            yield browser
        finally:
            browser.close()
