"""The web page: built without a warning, whole by itself, in a browser without an error, with figures and search."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from browser import TIMEOUT_MS, chromium
from bs4 import BeautifulSoup
from playwright.sync_api import Page

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CLAIMS = sorted(ROOT.glob("figures/*/claims.md"))
SOURCES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")), *NOTEBOOKS, *CLAIMS]


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pages."""
    folder = tmp_path_factory.mktemp("book") / "html"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    return folder


@cache
def parsed(page: Path) -> BeautifulSoup:
    return BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")


def pages(book: Path) -> list[Path]:
    return sorted(book.rglob("*.html"))


def test_every_source_has_a_page_that_the_front_page_lists(book: Path) -> None:
    listed = {link["href"] for link in parsed(book / "index.html").select(".sidebar-tree a")}
    for source in SOURCES[1:]:
        page = source.relative_to(ROOT).with_suffix(".html")
        assert (book / page).exists()
        assert str(page) in listed
    assert (book / "index.html").read_bytes() == (book / "README.html").read_bytes()


def test_links_and_their_anchors_exist(book: Path) -> None:
    broken = []
    for page in pages(book):
        for tag in parsed(page).select("[href], [src]"):
            url = urlsplit(tag.get("href") or tag.get("src"))
            if url.scheme or url.netloc or not (url.path or url.fragment):
                continue
            target = (page.parent / unquote(url.path)).resolve() if url.path else page
            anchored = url.fragment and target.suffix == ".html"
            if not target.is_file() or (anchored and not parsed(target).find(id=unquote(url.fragment))):
                broken.append((page.name, url.geturl()))
    assert not broken


def test_nothing_is_loaded_from_another_host(book: Path) -> None:
    for page in pages(book):
        for tag in parsed(page).select("[src], [srcset], link[href], object[data]"):
            url = urlsplit(tag.get("src") or tag.get("srcset") or tag.get("href") or tag.get("data"))
            assert url.scheme in ("", "data"), (page.name, tag)
            assert not url.netloc, (page.name, tag)
    for style in book.rglob("*.css"):
        elsewhere = re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//.*", style.read_text(encoding="utf-8"))
        assert not elsewhere, style.name


def test_every_recorded_picture_and_table_is_shown(book: Path) -> None:
    report = parsed(book / "docs" / "report.html")
    shown = {Path(image["src"]).name for image in report.select("article img")}
    recorded = list(ROOT.glob("figures/*/*.png"))
    assert recorded
    assert len(shown) == len(recorded)
    assert len(report.select("article table")) == len(list(ROOT.glob("figures/*/table_*.md")))
    for file in NOTEBOOKS:
        cells = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
        outputs = [output.get("data", {}) for cell in cells for output in cell.outputs]
        page = parsed(book / "notebooks" / f"{file.stem}.html")
        assert len(page.select("article img")) == sum("image/png" in data for data in outputs)
        assert len(page.select(".cell_output table")) >= sum("text/html" in data for data in outputs)
        assert not page.find(string=re.compile(r"^\s*\| --- "))  # a table that stayed Markdown


@pytest.fixture(scope="module")
def window() -> Iterator[Page]:
    """A browser's window."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(TIMEOUT_MS)
        yield page


@pytest.fixture
def trouble(window: Page) -> Iterator[list[str]]:
    """What the browser complains of while a test runs, and what it asks of other hosts."""
    found: list[str] = []
    listeners = {
        "console": lambda message: message.type in ("error", "warning") and found.append(message.text),
        "pageerror": lambda error: found.append(str(error)),
        "requestfailed": lambda request: found.append(f"{request.failure}: {request.url}"),
        "request": lambda request: urlsplit(request.url).netloc and found.append(f"asked: {request.url}"),
    }
    for event, listener in listeners.items():
        window.on(event, listener)
    yield found
    for event, listener in listeners.items():
        window.remove_listener(event, listener)


def test_every_page_renders_in_a_browser(book: Path, window: Page, trouble: list[str]) -> None:
    for page in pages(book):
        window.goto(page.as_uri())
        window.wait_for_function("!document.querySelector('.math:not(:has(mjx-container))')", polling=100)
        assert window.locator("article h1").count() == (page.name != "search.html"), page.name
        assert window.locator("[data-mml-node=merror]").count() == 0, f"{page.name}: a formula is not TeX"
        empty = window.evaluate("[...document.images].filter(image => !image.naturalWidth).map(image => image.src)")
        assert not empty, page.name
        wider = window.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wider <= 0, f"{page.name}: wider than the window"
        assert not trouble, page.name
    assert len(pages(book)) > len(SOURCES)


def test_formulas_are_there_to_be_rendered(book: Path) -> None:
    sources = {file: nbformat.read(file, as_version=4).cells for file in NOTEBOOKS}
    written = {
        file.stem: sum(len(re.findall(r"\$\$.+?\$\$", cell.source, re.DOTALL)) for cell in cells)
        for file, cells in sources.items()
    }
    found = {stem: len(parsed(book / "notebooks" / f"{stem}.html").select("div.math")) for stem in written}
    assert found == written
    assert any(written.values())


def test_search_finds_pages(book: Path, window: Page, trouble: list[str]) -> None:
    window.goto((book / "index.html").as_uri())
    window.get_by_placeholder("Search").first.fill("Falcon-Mamba")
    window.keyboard.press("Enter")
    window.wait_for_url("**/search.html?*")
    window.locator("#search-results li a", has_text="Falcon-Mamba: blocks or SSMs?").click()
    window.wait_for_url("**/05_falcon_mamba.html*")
    window.goto((book / "search.html").as_uri() + "?q=xylophone")
    window.get_by_text("did not match any documents").wait_for()
    assert not trouble


def test_without_a_browser_tests_are_skipped_and_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CHROMIUM", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"), chromium():
        pass
