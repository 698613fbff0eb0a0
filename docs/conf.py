"""The project as a web page (`make book`): README, notebooks with their outputs, recorded tables and figures.

Sphinx reads the repository as it lies there, and executes nothing. The pages ask no other host for anything: fonts are
the system's, MathJax lies beside the pages, and the search runs in the browser.
"""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "docs/*.md", "notebooks/*.ipynb", "figures/*/claims.md"]
MATHJAX = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax" / "tex-svg.js"

project = "Mamba-Shedder Companion"
root_doc = "README"
include_patterns = PAGES
exclude_patterns = [path.name for path in ROOT.iterdir() if path.name not in {page.split("/")[0] for page in PAGES}]
extensions = ["myst_nb"]
myst_enable_extensions = ["attrs_block", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
mathjax_path = MATHJAX.name
html_theme = "furo"
html_title = project
html_static_path = ["book.css", str(MATHJAX)]
html_css_files = ["book.css"]
html_copy_source = False
html_show_copyright = False
html_show_search_summary = False  # a summary is fetched, which browsers refuse for pages opened as files
html_use_index = False

NAVIGATION = """
```{toctree}
:hidden:
:caption: Notebooks
:glob:
/notebooks/*
```
```{toctree}
:hidden:
:caption: Results and documents
:glob:
/docs/report
/figures/*/claims
/docs/*
/CONTRIBUTING
```
"""


def complete(app: Sphinx, page: str, source: list[str]) -> None:
    """Add what the files leave to the page: navigation, a heading over the claims, all tables and figures."""
    if page == root_doc:
        source[0] += NAVIGATION
    elif page == "docs/report":
        source[0] += "".join(recorded(folder) for folder in sorted(ROOT.glob("figures/*/")))
    elif page.startswith("figures/"):
        _, caption, table = source[0].split("**", 2)
        heading = f"# Claims and verdicts: profile {page.split('/')[1]}"
        source[0] = f"{heading}\n\n{caption}.\n\n{{.claims}}\n{table.lstrip()}"


def recorded(folder: Path) -> str:
    """All figures and tables of one profile's folder in Markdown, in the order of their numbers."""
    shown = [f"\n## Profile {folder.name}\n"]
    for file in sorted(folder.glob("*_*.json"), key=lambda file: [file.stem[0], len(file.stem), file.stem]):
        caption = json.loads(file.read_text(encoding="utf-8"))["caption"]
        there = f"../figures/{folder.name}/{file.stem}"
        title = re.match(r"Figure \d+|.+?(?= against|:| \(|$)", caption)[0]
        body = f"![{title}]({there}.png)\n\n*{caption}*\n"
        if file.with_suffix(".md").exists():
            body = file.with_suffix(".md").read_text(encoding="utf-8").split("**", 2)[2]
        forms = [form for form in ("csv", "tex", "pdf", "json") if file.with_suffix(f".{form}").exists()]
        links = ", ".join(f"[{form}]({there}.{form})" for form in forms)
        shown.append(f"\n### {title}\n\n{body}\nFiles: {links}\n")
    return "".join(shown)


def front_page(app: Sphinx, failure: Exception | None) -> None:
    """Let the README be what a browser opens first."""
    if failure is None:
        shutil.copyfile(app.outdir / "README.html", app.outdir / "index.html")


def setup(app: Sphinx) -> None:
    """Tell Sphinx of the functions above."""
    app.connect("source-read", complete)
    app.connect("build-finished", front_page)
